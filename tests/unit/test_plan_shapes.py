"""The table of shapes against transformers' own modules, built on the meta device."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from dist_cpt.adapters.language_model import recurrent_mixers
from dist_cpt.config.load import build
from dist_cpt.engines.activation_checkpoint import mlp_of
from dist_cpt.engines.tiled_mlp import can_be_tiled
from dist_cpt.errors import ConfigError
from dist_cpt.model.architectures import FUSABLE, parts_of
from dist_cpt.model.recurrence import install_recurrence
from dist_cpt.plan.families import FAMILIES, RECURRENT_LAYERS
from dist_cpt.plan.model_check import check_model
from dist_cpt.plan.shapes import ModelShapes, read_config, shapes_of
from dist_cpt.plan.step_model import token_work
from dist_cpt.plan.tensors import training_of
from dist_cpt.plan.widths import layer_widths
from tests import tiny
from tests.contract.model import recipe as contract_recipe
from tests.plan_cases import recipe
from tests.tiny_hybrids import REQUIRED

LAYERS = 4
SIZES = {
    "hidden_size": 64,
    "n_embd": 64,
    "intermediate_size": 112,
    "vocab_size": 320,
    "num_hidden_layers": LAYERS,
    "n_layer": LAYERS,
    "num_attention_heads": 4,
    "n_head": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "num_experts": 6,
    "num_local_experts": 6,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 72,
    "n_shared_experts": 2,
    "kv_lora_rank": 16,
    "q_lora_rank": 20,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 14,
    "first_k_dense_replace": 1,
    "decoder_sparse_step": 2,
    "n_group": 1,
    "topk_group": 1,
    "pad_token_id": 0,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 20,
    "full_attention_interval": 2,
    "full_attn_idxs": [1, 2],
    "attn_layer_indices": [1],
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 6,
    "mamba_d_ssm": 96,
    "mamba_d_state": 10,
    "ssm_state_size": 10,
    "mamba_n_groups": 2,
    "n_groups": 2,
    "mamba_d_conv": 3,
    "conv_L_cache": 5,
    "shared_intermediate_size": 56,
    "moe_shared_expert_intermediate_size": 88,
    "num_dense_layers": 1,
}
SWITCHES = (
    *("attention_bias", "mlp_bias", "use_bias", "qkv_bias", "attention_out_bias", "use_qk_norm", "use_post_norm"),
    *("conv_bias", "mamba_conv_bias", "mamba_proj_bias", "projectors_bias", "mamba_rms_norm", "use_conv_bias"),
    "block_auto_adjust_ff_dim",
)


def built(kind: str, values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(transformers' model on the meta device, the content of the config.json that it would write)."""
    values = REQUIRED.get(kind, {}) | values
    config = CONFIG_MAPPING[kind](**values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return model, json.loads(config.to_json_string(use_diff=False)) | {"model_type": kind}


def known(kind: str, values: dict[str, Any]) -> dict[str, Any]:
    """Those of `values` that the configuration of `kind` has."""
    keys = CONFIG_MAPPING[kind]().to_dict()
    layers = {key: value * (LAYERS // 2) for key, value in REQUIRED.get(kind, {}).items()}
    return layers | {key: value for key, value in values.items() if key in keys}


def require_equal(shapes: ModelShapes, model: Any) -> None:
    parameters = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert {weight.name: weight.shape for weight in shapes.weights} == parameters
    assert len(shapes.weights) == len(parameters)
    assert shapes.num_parameters == sum(p.numel() for p in model.parameters())
    head = model.get_output_embeddings()
    linear = {
        f"{name}.weight": (module.weight.shape[1], module.weight.shape[0])[:: -1 if isinstance(module, Conv1D) else 1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    assert {weight.name: (weight.inputs, weight.outputs) for weight in shapes.of("linear")} == linear
    assert shapes.tied == (head.weight is model.get_input_embeddings().weight)


@pytest.mark.parametrize("kind", FAMILIES)
def test_names_shapes_and_counts_are_transformers(kind):
    model, config = built(kind, known(kind, SIZES))
    require_equal(shapes_of(config), model)


@pytest.mark.parametrize("kind", FAMILIES)
def test_so_they_are_with_every_switch_turned(kind):
    defaults = CONFIG_MAPPING[kind]().to_dict()
    turned = {key: not defaults[key] for key in (*SWITCHES, "tie_word_embeddings") if key in defaults}
    latent = {"q_lora_rank": None} if "q_lora_rank" in defaults else {}
    latent |= {"moe_latent_size": 44} if "moe_latent_size" in defaults else {}
    derived = {key for key, value in FAMILIES[kind].defaults.items() if value is None}  # left to other sizes
    sizes = {key: value for key, value in SIZES.items() if key not in derived}
    model, config = built(kind, known(kind, sizes) | turned | latent)
    require_equal(shapes_of(config), model)


@pytest.mark.parametrize("kind", [kind for kind, family in FAMILIES.items() if family.mixers])
def test_a_recurrence_is_its_layers_and_its_state(kind):
    model, config = built(kind, known(kind, SIZES))
    shapes = shapes_of(config)
    mixers = recurrent_mixers(model)
    assert shapes.layer_types == tuple(model.config.layer_types)
    assert sum(layer in RECURRENT_LAYERS for layer in shapes.layer_types) == len(mixers)
    mamba = {"falcon_h1": 96, "nemotron_h": 8 * 6}.get(kind, 2 * 64) * 10
    assert shapes.state_elements == (4 * 12 * 20 if kind.startswith("qwen3") else 0 if "lfm2" in kind else mamba)


def test_a_recurrence_costs_three_products_with_its_state_and_attention_those_with_its_keys():
    shapes = shapes_of({"model_type": "qwen3_next"})
    training = training_of(contract_recipe("base", {"kind": "single"}, "lora", "bf16"), shapes)
    state, features, seq_len = 32 * 128 * 128, 16 * 256, 4096
    expected = 36 * 3 * 2 * state + 12 * 2 * seq_len / 2 * 2 * features
    assert token_work(training, seq_len).attention_forward == expected
    assert {(layer.query > 0, layer.recurrent) for layer in training.widths} == {
        (True, 0),
        (False, 2 * 16 * 128 + 2 * 32 * 128 + 2 * 32),
    }


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("granitemoehybrid", {"layer_types": ["mamba", "attention", "mamba"], "num_hidden_layers": 3}),
        ("nemotron_h", {"hybrid_override_pattern": "M-*E-M*"}),
        ("lfm2", {"full_attn_idxs": [1], "num_hidden_layers": 3, "block_ff_dim": 300}),
        ("bamba", {"attn_layer_indices": [2], "num_hidden_layers": 3}),
        ("qwen3_next", {"full_attention_interval": 3, "num_hidden_layers": 4}),
    ],
)
def test_layer_types_are_read_from_older_files(kind, values):
    model, _ = built(kind, values)
    shapes = shapes_of({"model_type": kind} | values)
    assert shapes.layer_types == tuple(model.config.layer_types)
    require_equal(shapes, model)
    assert not check_model({"model_type": kind} | values).refused


@pytest.mark.parametrize("kind", FAMILIES)
def test_absent_keys_have_transformers_defaults(kind):
    layers = {"n_layer" if "n_layer" in FAMILIES[kind].defaults else "num_hidden_layers": 2}
    model, _ = built(kind, layers)
    require_equal(shapes_of({"model_type": kind} | layers | REQUIRED.get(kind, {})), model)


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_the_plan_counts_in_tiles_computes_in_tiles(kind):
    """Every MLP where each layer has one, and no block of experts, whose tokens share a router."""
    model, config = built(kind, known(kind, SIZES))
    shapes = shapes_of(config)
    counted = shapes.num_experts == 1 and all(layer.up for layer in layer_widths(shapes, ()))
    install_recurrence(parts_of(model).decoder)
    mlps = [mlp_of(layer) for layer in parts_of(model).layers]
    assert all(mlp is not None and can_be_tiled(mlp) for mlp in mlps) == counted


def test_the_table_is_wide_and_knows_what_is_fused():
    assert len(FAMILIES) >= 30
    assert {kind for kind, family in FAMILIES.items() if family.fused} == set(FUSABLE)


def test_the_text_model_of_a_multimodal_one_is_read():
    text = {"model_type": "gemma3_text", "num_hidden_layers": 3}
    assert shapes_of({"model_type": "gemma3", "text_config": text}) == shapes_of(text)
    assert shapes_of({"model_type": "mistral3", "text_config": {"model_type": "mistral"}}).num_layers == 32


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "gemma2", "gemma3_text", "olmo3", "exaone4", "gpt_oss", "llama"])
def test_windows_are_those_of_the_layers(kind):
    model, _ = built(kind, {"num_hidden_layers": 12})
    types = getattr(model.config, "layer_types", None)
    window = getattr(model.config, "sliding_window", None)
    wanted = [window if t == "sliding_attention" else None for t in types] if types else [window] * 12
    assert list(shapes_of({"model_type": kind, "num_hidden_layers": 12}).windows) == wanted
    config = json.loads(model.config.to_json_string(use_diff=False)) | {"model_type": kind}
    assert list(shapes_of(config).windows) == wanted


def test_experts_that_a_token_does_not_visit_do_not_count():
    shapes = shapes_of({"model_type": "mixtral"})
    assert {shapes.active_share(weight) for weight in shapes.of("experts")} == {2 / 8}
    assert {shapes.active_share(weight) for weight in shapes.of("linear")} == {1.0}


def test_a_trained_router_trains_with_its_bias():
    model = {"path": "gpt_oss", "weights": "bf16", "router": "train"}
    config = build(recipe("gpt_oss") | {"model": model}, "r")
    planned = training_of(config, shapes_of({"model_type": "gpt_oss", "num_hidden_layers": 2}))
    assert [tensor.shape for tensor in planned.trained if tensor.group == "router"] == 2 * [(128, 2880), (128,)]
    assert not any(tensor.shape == (128,) for tensor in planned.frozen)


def test_experts_in_16_bits_beside_codes_on_the_disk_stay_so():
    kind = {"model_type": "mixtral", "num_hidden_layers": 1}
    config = build(recipe("mixtral", "nf4"), "r")
    for stored, element_bytes in (({}, 1), ({"quantization_config": {"load_in_4bit": True}}, 2)):
        planned = training_of(config, shapes_of(kind | stored))
        sizes = {tensor.element_bytes for tensor in planned.frozen if tensor.role == "experts"}
        assert sizes == {element_bytes}


def test_a_folder_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny.llama()))
    assert shapes_of(read_config(tmp_path)).model_type == "llama"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"model_type": "lama"}', "did you mean llama"),
        ('{"model_type": "mamba2"}', "not in the table"),
        ('{"model_type": ["llama"]}', "not in the table"),
        ('{"model_type": "llama", "hidden_size": "many"}', "make no llama model"),
        ('{"model_type": "llama", "num_attention_heads": 0}', "make no llama model"),
        ("{}", "not in the table"),
        ("[]", "not a JSON object"),
        ("{", "not readable as JSON"),
        (None, "has no config.json"),
    ],
)
def test_what_is_no_known_model_is_refused_in_one_line(tmp_path, content, said):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError) as error:
        shapes_of(read_config(tmp_path))
    assert said in str(error.value)
    assert "\n" not in str(error.value)
