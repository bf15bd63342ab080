"""What trains, its names and dtypes, and which mistakes are refused in one line."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from dist_cpt.adapters.peft_folder import canonical_name
from dist_cpt.config.load import build
from dist_cpt.config.schema import RunConfig
from dist_cpt.errors import ConfigError
from dist_cpt.model.architectures import check_config
from dist_cpt.model.base_model import build_config, describe, load_base, with_vocabulary_size
from dist_cpt.model.load import load_model
from dist_cpt.model.loss import LossHead
from dist_cpt.run_folder.json_files import canonical_json
from dist_cpt.runtime.liveness import listen

CPU = torch.device("cpu")
V = 53
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": V,
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of random bases, by name; each made once."""
    from transformers import AutoConfig, AutoModelForCausalLM

    root = tmp_path_factory.mktemp("bases")
    variants = {
        "untied": LLAMA,
        "tied": LLAMA | {"tie_word_embeddings": True},
        "gpt2": {
            "model_type": "gpt2",
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 32,
            "vocab_size": V,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
    }
    for name, values in variants.items():
        torch.manual_seed(0)
        settings = {key: value for key, value in values.items() if key != "model_type"}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(values["model_type"], **settings))
        model.save_pretrained(root / name)
    return root


def recipe(model: dict, **changes) -> RunConfig:
    values = {
        "name": "x",
        "model": model,
        "adapter": {"rank": 3, "alpha": 6},
        "embeddings": {"train": ["embed_tokens", "lm_head"]},
        "data": {"seq_len": 16, "tokenizer": "t", "sources": [{"path": "x"}]},
        "batch": {"global_tokens": 16},
        "train": {"tokens": 16},
    }
    return build(values | changes, where="test")


def test_lora_and_both_matrices_train_and_nothing_else(bases):
    model = load_model(recipe({"path": str(bases / "untied"), "weights": "bf16"}), device=CPU)
    linears = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    suffixes = {name.split(".")[-3] for name in model.trainable if ".lora_" in name}
    assert suffixes == set(linears)
    assert len(model.trainable) == 2 * 7 * 2 + 2
    assert {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"} <= set(model.trainable)
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in model.trainable
    assert all(p.dtype == torch.float32 for p in model.trainable.values())
    frozen = [p for p in model.module.parameters() if not p.requires_grad]
    assert len(frozen) == 2 * 9 + 1
    assert all(p.dtype == torch.bfloat16 for p in frozen)
    assert model.ties == []
    assert model.aliases == {}
    assert len(model.layers) == 2
    assert isinstance(model.module.hf_model.get_output_embeddings(), LossHead)


@pytest.mark.parametrize("base", ["untied", "tied", "gpt2"])
def test_no_second_copy_of_the_matrices(bases, base):
    model = load_model(recipe({"path": str(bases / base), "weights": "fp32"}), device=CPU)
    vocabulary = {p.data_ptr() for p in model.module.parameters() if V in p.shape}
    assert len(vocabulary) == (2 if base == "untied" else 1)
    assert all(p.requires_grad for p in model.module.parameters() if V in p.shape)


@pytest.mark.parametrize(("base", "embedding"), [("tied", "model.embed_tokens"), ("gpt2", "transformer.wte")])
@pytest.mark.parametrize("train", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_a_tied_pair_trains_as_one_and_is_saved_twice(bases, base, embedding, train):
    model = load_model(recipe({"path": str(bases / base)}, embeddings={"train": train}), device=CPU)
    name, alias = f"base_model.model.{embedding}.weight", "base_model.model.lm_head.weight"
    assert model.ties == [(name, alias)]
    assert model.aliases == {alias: name}
    hf_model = model.module.hf_model
    assert hf_model.get_output_embeddings().weight is hf_model.get_input_embeddings().weight
    assert hf_model.get_output_embeddings().weight is model.trainable[name]
    assert model.adapter_config is not None
    assert model.adapter_config["ensure_weight_tying"] is True
    assert model.adapter_config["modules_to_save"] == sorted([embedding.rpartition(".")[2], "lm_head"])


def test_without_matrices_the_tie_stays_frozen(bases):
    model = load_model(recipe({"path": str(bases / "tied")}, embeddings={"train": []}), device=CPU)
    assert all(".lora_" in name for name in model.trainable)
    assert model.aliases == {}
    assert model.adapter_config is not None
    assert model.adapter_config["modules_to_save"] is None


def test_full_parameters_have_their_plain_names(bases):
    config = recipe({"path": str(bases / "untied"), "weights": "bf16"}, adapter={"kind": "none"}, embeddings={})
    model = load_model(config, device=CPU)
    assert model.adapter_config is None
    assert set(model.trainable) == set(model.module.hf_model.state_dict())
    assert all(p.dtype == torch.float32 for p in model.trainable.values())


def test_from_scratch_is_the_seed_and_the_config():
    def weights(seed: int):
        config = recipe({"config": dict(LLAMA)}, adapter={"kind": "none"}, embeddings={}, seed=seed)
        torch.manual_seed(seed + 17)  # whatever the process drew before
        return load_model(config, device=CPU)

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(p, again.trainable[name]) for name, p in first.trainable.items())
    assert not all(torch.equal(p, other.trainable[name]) for name, p in first.trainable.items())
    assert first.identity == again.identity
    assert first.identity["sha256"] != other.identity["sha256"]
    assert first.identity["architectures"] == ["LlamaForCausalLM"]


def test_a_model_from_scratch_has_the_tokenizers_rows():
    values = {key: value for key, value in LLAMA.items() if key != "vocab_size"}
    config = recipe({"config": values}, adapter={"kind": "none"}, embeddings={})
    model = load_model(with_vocabulary_size(config, 1_501), device=CPU)
    assert model.hf_config.vocab_size == model.identity["vocab_size"] == 1_536
    given = recipe({"config": dict(LLAMA)}, adapter={"kind": "none"}, embeddings={})
    assert with_vocabulary_size(given, 1_501) == given


def test_lora_starts_the_same_on_every_rank(bases):
    config = recipe({"path": str(bases / "untied")})
    first = load_model(config, device=CPU)
    torch.rand(3)
    second = load_model(config, device=CPU)
    assert all(torch.equal(p, second.trainable[name]) for name, p in first.trainable.items())
    assert all(p.any() != name.endswith("lora_B.weight") for name, p in first.trainable.items())


def test_identity_follows_the_weights(bases, tmp_path):
    import shutil

    copied = tmp_path / "copied"
    shutil.copytree(bases / "untied", copied)
    first = load_model(recipe({"path": str(copied)}), device=CPU).identity
    assert first["path"] == str(copied)
    assert first["sha256"] == load_model(recipe({"path": str(bases / "untied")}), device=CPU).identity["sha256"]
    data = bytearray((copied / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copied / "model.safetensors").write_bytes(data)
    assert load_model(recipe({"path": str(copied)}), device=CPU).identity["sha256"] != first["sha256"]


def test_dropout_is_off_unless_asked_for(bases):
    assert load_model(recipe({"path": str(bases / "gpt2")}), device=CPU).hf_config.resid_pdrop == 0.0
    values = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "resid_pdrop": 0.2}
    config = build_config(values | {"bos_token_id": 0, "eos_token_id": 0})
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0.2, 0.0, 0.0)


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ({"path": "/nowhere/model"}, {}, "model.path: folder not found: /nowhere/model"),
        ({"path": "."}, {}, "model.path: . has no config.json"),
        (
            {"path": "untied"},
            {"adapter": {"targets": ["q_prj"]}},
            "'q_prj' -- did you mean q_proj",
        ),
        ({"path": "untied"}, {"adapter": {"targets": ["lm_head"]}}, "adapter.targets: lm_head"),
        ({"path": "untied"}, {"adapter": {"targets": ["embed_tokens"]}}, "'embed_tokens'"),
        (
            {"path": "gpt2"},
            {"data": {"seq_len": 64, "sources": [{"path": "x"}]}, "batch": {"global_tokens": 64}},
            "32 positions",
        ),
        ({"config": LLAMA | {"model_type": "lama"}}, {}, "'lama' -- did you mean llama"),
        ({"config": LLAMA | {"hiden_size": 1}}, {}, "'hiden_size' -- did you mean hidden_size"),
        ({"config": LLAMA | {"num_attention_heads": 3}}, {}, "model.config:"),
    ],
)
def test_mistakes_are_one_line(bases, model, changes, message):
    if model.get("path") in ("untied", "gpt2"):
        model = {"path": str(bases / model["path"])}
    if "config" in model:
        changes = changes | {"adapter": {"kind": "none"}, "embeddings": {}}
    with pytest.raises(ConfigError) as caught:
        load_model(recipe(model, **changes), device=CPU)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_refused(bases, tmp_path):
    import shutil

    shutil.copy(bases / "untied" / "config.json", tmp_path / "config.json")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ConfigError, match=r"model\.path: .*pickled"):
        load_model(recipe({"path": str(tmp_path)}), device=CPU)


@pytest.mark.parametrize("weights", ["fp32", "nf4"])
def test_a_base_without_one_of_its_weights_is_refused(bases, tmp_path, weights):
    """transformers would only warn and draw the missing weights at random."""
    import shutil

    from safetensors.torch import load_file, save_file

    from dist_cpt.export.checkpoint_model import plain_model

    folder = shutil.copytree(bases / "untied", tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"], tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"model\.path: .*lm_head\.weight and 1 more"):
        load_model(recipe({"path": str(folder), "weights": weights}), device=CPU)
    with pytest.raises(ConfigError, match=r"lm_head\.weight"):
        plain_model(folder)


@pytest.mark.parametrize("weights", ["bf16", "nf4"])
def test_every_weight_that_is_read_is_progress(bases, weights):
    pieces: list[int] = []
    listen(lambda: pieces.append(1))
    try:
        load_base(recipe({"path": str(bases / "untied"), "weights": weights}), CPU, base_sha256="known")
    finally:
        listen(None)
    with safe_open(bases / "untied" / "model.safetensors", "pt") as file:
        assert len(pieces) >= len(file.keys())


def test_a_vocabulary_matrix_of_another_name_has_its_own_rate_or_is_refused(tmp_path, monkeypatch):
    from transformers import AutoConfig, AutoModelForCausalLM

    import dist_cpt.model.load as load
    from dist_cpt.optim.groups import param_groups

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("gpt_neox", **sizes, vocab_size=V)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    values = recipe({"path": str(tmp_path), "weights": "fp32"}, embeddings={"train": ["embed_tokens", "lm_head"]})
    groups = {
        group.name: group.names for group in param_groups(load_model(values, device=CPU).trainable, values.optim, True)
    }
    prefix = "base_model.model"
    assert groups["embeddings"] == (f"{prefix}.gpt_neox.embed_in.weight", f"{prefix}.lm_head.weight")
    assert all(".lora_" in name for name in groups["adapter"])
    monkeypatch.setattr(load, "VOCABULARY_NAMES", ("lm_head",))
    with pytest.raises(ConfigError, match=r"gpt_neox\.embed_in"):
        load_model(values, device=CPU)


def test_an_unknown_hub_name_is_one_line():
    with pytest.raises(ConfigError, match=r"^model\.path: no-such-org/no-such-model [^\n]*$"):
        load_model(recipe({"path": "no-such-org/no-such-model"}), device=CPU)


@pytest.mark.parametrize(
    ("model_type", "values"),
    [
        ("bart", {}),
        ("mixtral", {"logits_soft_cap": 20.0}),
        ("kimi_linear", {}),
        ("jamba", {}),
    ],
)
def test_a_config_that_loss_or_packing_would_compute_wrong_is_refused(model_type, values):
    from transformers import AutoConfig

    with pytest.raises(ConfigError, match=f"model type {model_type}: "):
        check_config(AutoConfig.for_model(model_type, **values))


@pytest.mark.parametrize("kind", ["bamba", "llama"])
def test_the_description_of_a_base_is_what_a_manifest_gives_back(kind):
    """Mamba's time step has an upper limit of infinity, for which JSON has no number."""
    from transformers import AutoConfig

    described = describe(AutoConfig.for_model(kind, num_labels=3))
    assert json.loads(canonical_json(described)) == described


UNTESTED = {key: value for key, value in LLAMA.items() if key != "model_type"}


@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        ("phi3", {"pad_token_id": 0}),
        ("gpt_neox", {}),
        ("olmo2", {}),
        ("granite", {"logits_scaling": 8.0}),
        ("cohere", {"logit_scale": 0.3, "pad_token_id": 0}),
        ("gemma", {"head_dim": 8}),
        ("gpt_oss", {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}),
    ],
)
def test_another_architecture_loads_after_its_self_check(model_type, more):
    values = UNTESTED | {"model_type": model_type} | more
    if model_type == "gpt_neox":
        del values["num_key_value_heads"]
    config = recipe({"config": values}, adapter={"kind": "none"}, embeddings={})
    assert len(load_model(config, device=CPU).layers) == 2


def test_another_architecture_passes_its_self_check_in_bf16(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoModelForCausalLM.from_config(AutoConfig.for_model("olmo2", **UNTESTED)).save_pretrained(tmp_path)
    model = load_model(recipe({"path": str(tmp_path), "weights": "bf16"}), device=CPU)
    assert len(model.trainable) == 2 * 7 * 2 + 2


def test_an_architecture_with_other_attention_is_refused():
    """Doge adds a mask of its own to the scores, which packed attention does not take."""
    values = UNTESTED | {"model_type": "doge"}
    config = recipe({"config": values | {"initializer_range": 1.0}}, adapter={"kind": "none"}, embeddings={})
    with pytest.raises(ConfigError, match=r"^model type doge cannot run on packed documents: [^\n]*$"):
        load_model(config, device=CPU)


def test_buffers_that_full_checkpoints_would_lack_are_kept(tmp_path):
    """Apertus' xIELU has constants that are buffers: a reader would find whatever is in memory in their place."""
    config = recipe({"config": UNTESTED | {"model_type": "apertus"}}, adapter={"kind": "none"}, embeddings={})
    model = load_model(config, device=CPU)
    buffers = model.buffers
    assert {name.rpartition(".")[2] for name in buffers} == {"beta", "eps"}
    assert {float(value) for name, value in buffers.items() if name.endswith("beta")} == {0.5}
    model.module.hf_model.save_pretrained(tmp_path / "base")
    adapted = load_model(recipe({"path": str(tmp_path / "base")}, embeddings={}), device=CPU)
    assert not adapted.buffers


def test_canonical_names():
    prefix = "causal_lm.base_model.model.model.layers.0.self_attn.q_proj"
    assert canonical_name(f"{prefix}.lora_A.default.weight") == f"{prefix[10:]}.lora_A.weight"
    assert canonical_name("causal_lm.base_model.model.lm_head.weight") == "base_model.model.lm_head.weight"
    assert canonical_name("causal_lm.model.default.weight") == "model.default.weight"


def test_one_target_alone(bases):
    config = recipe({"path": str(bases / "gpt2")}, adapter={"rank": 2, "targets": "c_attn"}, embeddings={})
    names = set(load_model(config, device=CPU).trainable)
    assert len(names) == 4
    assert all(".attn.c_attn.lora_" in name for name in names)
