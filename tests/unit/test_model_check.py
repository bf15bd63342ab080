"""`dist-cpt model-check` says what the run itself would do or refuse."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from dist_cpt.adapters.experts import expert_parameters
from dist_cpt.adapters.language_model import decoder_of
from dist_cpt.adapters.lora import left_out, target_modules
from dist_cpt.engines.activation_checkpoint import mlp_of
from dist_cpt.errors import ConfigError
from dist_cpt.model.architectures import TESTED, check_config, parts_of
from dist_cpt.model.loss import install_loss_head
from dist_cpt.model.recurrence import install_recurrence
from dist_cpt.model.self_check import self_check_packing
from dist_cpt.plan.families import FAMILIES
from dist_cpt.plan.model_check import NEUTRAL, as_text, check_model
from tests.command import command
from tests.plan_cases import model_folder
from tests.tiny_hybrids import REQUIRED

LAYERS = 2
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "vocab_size": 64,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "shared_expert_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "pad_token_id": 0,
}
OTHERS = {"logits_soft_cap": 20.0, "altup_coef_clip": 120.0}


def built(kind: str, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """(transformers' model of two layers on the meta device, its config.json)."""
    layers = {"n_layer" if kind == "gpt2" else "num_hidden_layers": LAYERS}
    config = CONFIG_MAPPING[kind](**layers, **REQUIRED.get(kind, {}), **changes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return model, json.loads(config.to_json_string(use_diff=False)) | {"model_type": kind}


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_lora_trains_is_what_peft_is_given(kind):
    model, values = built(kind)
    check = check_model(values)
    targets = target_modules(model, "all-linear", model.get_output_embeddings())
    adapted = {name for name, _ in model.named_modules() if any(name == t or name.endswith(f".{t}") for t in targets)}
    adapted |= set(expert_parameters(model))
    within = {re.sub(r"^.*\.\d+\.", "", name) for name in adapted}
    assert {part.name for part in check.trained} == within
    assert sum(part.layers for part in check.trained) == len(adapted)
    layers = parts_of(model).layers
    assert check.shapes.num_layers == len(layers)
    model.requires_grad_(False)
    assert {part.name for part in check.not_trained} == set(left_out(layers)) - within


@pytest.mark.parametrize("kind", FAMILIES)
def test_plans_recompute_mlps_of_layers_where_an_engine_finds_them(kind):
    model, values = built(kind)
    install_recurrence(decoder_of(model))
    found = [mlp_of(layer) is not None for layer in parts_of(model).layers]
    assert check_model(values).shapes.has_mlp_everywhere == all(found)


@pytest.mark.parametrize("kind", FAMILIES)
def test_it_refuses_settings_that_a_run_refuses(kind):
    model, values = built(kind)
    check_config(model.config)
    refused = set(check_model(values).refused)
    for key, value in OTHERS.items():
        assert key in NEUTRAL
        (line,) = set(check_model(values | {key: value}).refused) - refused
        assert key in line
        setattr(model.config, key, value)
        with pytest.raises(ConfigError, match=key):
            check_config(model.config)
        setattr(model.config, key, None)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=() if kind in ("granite", "olmo2") else pytest.mark.matrix)
        for kind in FAMILIES
        if kind not in TESTED
    ],
)
def test_packing_passes_the_check_that_a_run_makes(kind):
    """The check that a run makes of an untested architecture, on a model of a few thousand weights."""
    keys = CONFIG_MAPPING[kind]().to_dict()
    sizes = SMALL | REQUIRED.get(kind, {})
    config = CONFIG_MAPPING[kind](**{key: value for key, value in sizes.items() if key in keys})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    head = parts_of(model).head
    install_loss_head(head, config, use_reference=False)
    values = json.loads(config.to_json_string(use_diff=False)) | {"model_type": kind}
    assert not check_model(values).refused
    self_check_packing(model)


def test_layers_that_cannot_separate_documents_are_refused():
    refusal = check_model(
        {"model_type": "qwen3", "num_hidden_layers": 2, "layer_types": ["linear_attention"] * 2}
    ).refused
    assert refusal == ("layers of type linear_attention cannot separate packed documents",)


def test_experts_train_and_the_router_is_named(tmp_path):
    ended = command("model-check", model_folder(tmp_path / "m", {"model_type": "mixtral"}))
    assert ended.code == 0
    (line,) = [line for line in ended.out.splitlines() if line.startswith("LoRA leaves out")]
    assert line.startswith("LoRA leaves out: mlp.gate (")
    (line,) = [line for line in ended.out.splitlines() if line.startswith("LoRA on all-linear trains")]
    assert "mlp.experts.gate_up_proj" in line
    assert "46.7 B parameters, 12.9 B active" in ended.out.splitlines()[0]


def test_a_refused_model_ends_with_64_and_the_reason(tmp_path):
    folder = model_folder(tmp_path / "m", {"model_type": "mixtral", "logits_soft_cap": 20.0})
    ended = command("model-check", folder, "--json")
    assert ended.code == 64
    assert json.loads(ended.out)["refused"] == ["logits_soft_cap = 20.0 is not implemented by the loss"]
    assert len(ended.error_lines) == 1
    ended = command("model-check", model_folder(tmp_path / "m", {"model_type": "mamba2"}))
    assert (ended.code, len(ended.err.splitlines())) == (64, 1)


def test_a_type_outside_the_table_is_built(tmp_path):
    folder = model_folder(tmp_path / "m", {"model_type": "helium", "num_hidden_layers": 2})
    assert command("model-check", folder).code == 64
    ended = command("model-check", folder, "--build")
    assert ended.code == 0
    assert ended.out.splitlines()[0] == "built: HeliumForCausalLM; 2 decoder layers"
    assert "mlp.down_proj" in ended.out.splitlines()[1]
    ended = command("model-check", model_folder(tmp_path / "n", {"model_type": "bert"}), "--build")
    assert (ended.code, len(ended.error_lines)) == (64, 1)


def test_every_line_is_short_of_a_traceback():
    for kind in FAMILIES:
        assert len(list(as_text(check_model({"model_type": kind})))) >= 7
