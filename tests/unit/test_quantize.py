"""NF4 layers hold what bitsandbytes makes of their weight, multiply by it, and never change."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from dist_cpt.adapters.quantize import BLOCKSIZE, load_nf4, quantisation_state
from dist_cpt.config.schema import RunConfig
from dist_cpt.errors import ConfigError, MissingExtraError
from dist_cpt.model.export import load_fp32, nf4_gap
from dist_cpt.model.flops import model_flops
from dist_cpt.model.load import frozen_hash, load_model
from tests.tiny import llama

CPU = torch.device("cpu")
SIZES = {"hidden_size": 96, "intermediate_size": 144}  # rows of 16 n elements, not 64 n: blocks go across rows
LINEAR = 2 * 7


def recipe(base: Path, weights: str = "nf4", **sections: Any) -> RunConfig:
    values: dict[str, Any] = {
        "name": "nf4",
        "model": {"path": str(base), "weights": weights},
        "adapter": {"rank": 4, "alpha": 4},
        "embeddings": {"train": ["embed_tokens", "lm_head"]},
        "data": {"seq_len": 64, "sources": [{"path": "none.jsonl"}]},
        "batch": {"global_tokens": 64},
        "train": {"tokens": 64},
    }
    return RunConfig.model_validate(values | sections)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in fp32."""
    return save(tmp_path_factory.mktemp("nf4") / "base", **llama(**SIZES))


def save(folder: Path, **values: Any) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values)).save_pretrained(folder)
    return folder


def source(base: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(base / "model.safetensors")


def unpack(codes: torch.Tensor, state: Any) -> torch.Tensor:
    """The weight in fp32 by the definition of the format: two codes a byte, the high half first; a table of 16
    values; one scale per block, itself looked up in a table and scaled per 256, around a common offset."""
    indices = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], 1).flatten()[: state.shape.numel()].long()
    scale_blocks = torch.arange(state.absmax.numel()) // 256
    scales = state.state2.code[state.absmax.long()] * state.state2.absmax[scale_blocks] + state.offset
    return (state.code[indices] * scales[torch.arange(indices.numel()) // BLOCKSIZE]).view(state.shape)


def test_codes_and_scales_are_those_of_bitsandbytes(base: Path) -> None:
    from bitsandbytes.functional import quantize_4bit

    model = load_nf4(base, None, CPU)
    weights = source(base)
    layers = {name: m for name, m in model.named_modules() if getattr(m, "quant_state", None) is not None}
    assert len(layers) == LINEAR
    for name, layer in layers.items():
        weight = weights[f"{name}.weight"].bfloat16()
        codes, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        got = dict(quantisation_state(nn.ModuleDict({"x": layer})))
        assert torch.equal(layer.weight.data, codes), name
        assert codes.dtype == torch.uint8
        assert torch.equal(got["x.weight.absmax"], state.absmax)
        assert state.absmax.dtype == torch.uint8
        assert state.absmax.numel() == -(-weight.numel() // 64)
        assert torch.equal(got["x.weight.nested_absmax"], state.state2.absmax)
        assert torch.equal(got["x.weight.offset"], state.offset.view(1))
        assert torch.equal(got["x.weight.quant_map"], state.code)
        assert torch.equal(got["x.weight.nested_quant_map"], state.state2.code)
    rest = {name: p for name, p in model.named_parameters() if name.removesuffix(".weight") not in layers}
    assert {p.dtype for p in rest.values()} == {torch.bfloat16}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= rest.keys()


@pytest.mark.parametrize(("rows", "columns"), [(96, 64), (48, 96), (10, 30), (30, 45), (13, 7)])
def test_a_layer_multiplies_by_what_its_codes_say(rows: int, columns: int, tmp_path: Path) -> None:
    """Among the shapes are those whose rows are no multiple of the block, and an odd number of elements."""
    from bitsandbytes.functional import quantize_4bit

    from dist_cpt.adapters.quantize import _forward

    torch.manual_seed(0)
    layer: Any = nn.Linear(columns, rows).bfloat16().requires_grad_(False)
    codes, layer.quant_state = quantize_4bit(
        layer.weight.data, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    original = layer.weight.float()
    layer.weight = nn.Parameter(codes, requires_grad=False)
    want = unpack(codes, layer.quant_state)
    # A code's interval is at most 0.15 of its block's largest element wide on either side, 1/14 on average.
    assert float((want - original).norm() / original.norm()) < 0.15
    x = torch.randn(5, columns).bfloat16().requires_grad_()
    y = _forward(layer, x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, F.linear(x, want.bfloat16(), layer.bias))
    grad = torch.randn_like(y)
    y.backward(grad)
    assert x.grad is not None
    assert torch.equal(x.grad, grad @ want.bfloat16())


def test_training_and_evaluating_leave_every_bit(base: Path) -> None:
    model = load_model(recipe(base), device=CPU)
    before = frozen_hash(model.module)
    codes = dict(model.module.named_parameters())
    stored = {name: p.clone() for name, p in codes.items() if p.dtype == torch.uint8}
    ids = torch.arange(64)[None]
    arguments = (ids, ids, torch.tensor([0, 64], dtype=torch.int32), 64, ids)
    loss, _ = model.module(*arguments)
    loss.backward()
    model.module.eval()
    with torch.no_grad():
        model.module(*arguments)
    assert frozen_hash(model.module) == before
    assert len(stored) == LINEAR
    assert all(torch.equal(codes[name], values) for name, values in stored.items())
    _, absmax = next(quantisation_state(model.module))
    absmax[0] += 1
    assert frozen_hash(model.module) != before


def test_adapters_and_vocabulary_train_in_fp32_over_it(base: Path) -> None:
    quantised, plain = (load_model(recipe(base, weights), device=CPU) for weights in ("nf4", "bf16"))
    assert list(quantised.trainable) == list(plain.trainable)
    assert quantised.adapter_config == plain.adapter_config
    for name, parameter in quantised.trainable.items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, plain.trainable[name]), "it does not start from the same values"
    kinds = {type(m).__module__ for m in quantised.module.modules() if type(m).__name__ == "Linear4bit"}
    assert kinds == {"peft.tuners.lora.bnb", "bitsandbytes.nn.modules"}


def test_it_is_close_to_the_base_and_counts_as_many_flops(base: Path) -> None:
    quantised, plain = (load_model(recipe(base, weights), device=CPU) for weights in ("nf4", "fp32"))
    ids = torch.arange(64)[None]
    arguments = (ids, ids, torch.tensor([0, 64], dtype=torch.int32), 64, ids)
    quantised.module.bfloat16()  # as an engine does to what computes
    with torch.no_grad():
        got, want = (float(model.module(*arguments)[1]) / 64 for model in (quantised, plain))
    assert abs(got - want) < 0.02 * want
    assert got != want

    def flops(model: Any) -> Any:
        return model_flops(
            model.module, model.hf_config, embeddings=model.module.hf_model.get_input_embeddings(), tied=False
        )

    assert flops(quantised) == flops(plain)


def test_the_identity_names_the_quantisation_and_nothing_new_otherwise(base: Path) -> None:
    quantised, plain = (load_model(recipe(base, weights), device=CPU).identity for weights in ("nf4", "bf16"))
    added = {"weights": "nf4", "weights_quantisation": {"blocksize": 64, "double_quant": True}}
    assert quantised == plain | added
    assert not plain.keys() & added.keys()
    json.dumps(quantised)


def test_gpt2_stores_its_weights_the_other_way_round(tmp_path: Path) -> None:
    """Its layers are quantised turned around; the adapter still says how they lie on the disk."""
    values = {"vocab_size": 131, "n_embd": 48, "n_layer": 1, "n_head": 3, "n_positions": 64}
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    folder = save(tmp_path / "gpt2", model_type="gpt2", **values, **tokens)
    quantised, plain = (load_model(recipe(folder, weights), device=CPU) for weights in ("nf4", "bf16"))
    assert quantised.adapter_config == plain.adapter_config
    assert plain.adapter_config is not None
    assert plain.adapter_config["fan_in_fan_out"] is True
    layer = quantised.module.get_submodule("causal_lm.base_model.model.transformer.h.0.mlp.c_fc.base_layer")
    weight = source(folder)["transformer.h.0.mlp.c_fc.weight"].T
    assert layer.quant_state.shape == weight.shape
    assert float((unpack(layer.weight.data, layer.quant_state) - weight).norm() / weight.norm()) < 0.15


def test_a_merge_says_how_far_it_is_from_the_trainer(base: Path, tmp_path: Path) -> None:
    """The gap is that of the two bases under one adapter, here computed from the definition of the format."""
    from safetensors.torch import save_file

    model = load_model(recipe(base), device=CPU)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name, parameter in model.trainable.items():
        if "lora_B" in name:
            nn.init.normal_(parameter.data, std=0.02)
    save_file({name: p.data for name, p in model.trainable.items()}, folder / "adapter_model.safetensors")
    model.write_config(folder)
    manifest = {"adapter": True, "base": model.identity}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    gap = nf4_gap(folder)
    states = {name.removesuffix(".base_layer"): m.quant_state for name, m in model.module.named_modules()
              if "base_layer" in name}  # fmt: skip
    trainers = load_fp32(folder, base)
    probe = torch.randint(0, 512, (1, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = trainers(probe).logits
        for name, m in trainers.named_modules():
            if name.endswith("base_layer"):
                codes = model.module.get_submodule(f"causal_lm.{name}").weight.data
                m.weight.copy_(unpack(codes, states[f"causal_lm.{name.removesuffix('.base_layer')}"]).bfloat16())
        expected = float((trainers(probe).logits - want).abs().max())
    assert gap is not None
    assert gap == pytest.approx(expected, rel=1e-3)
    assert gap > 1e-3
    del manifest["base"]["weights"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert nf4_gap(folder) is None


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        ({"model": {"path": "x", "weights": "int8"}}, "weights: 'int8' is not available in this version; use nf4"),
        ({"model": {"path": "x", "weights": "fp4"}}, "weights must be fp32, bf16 or nf4, not 'fp4'"),
        ({"adapter": {"kind": "none"}, "embeddings": {}}, "a base in nf4 cannot train in full"),
        (
            {"model": {"config": {"model_type": "llama"}, "weights": "nf4"}, "adapter": {"kind": "none"}},
            "model.weights nf4 quantises a pretrained base",
        ),
    ],
)
def test_recipes_that_make_no_sense_are_refused(sections: dict[str, Any], why: str) -> None:
    if "config" in sections.get("model", {}):
        sections = sections | {"data": {"seq_len": 64, "sources": [{"path": "x"}], "tokenizer": "x"}}
    with pytest.raises(ValidationError, match=why):
        recipe(Path("x"), **sections)


def test_bitsandbytes_is_an_extra(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtraError, match=r"^model\.weights: nf4 needs the extra 'qlora'.* pip install"):
        load_model(recipe(base), device=CPU)


@pytest.mark.parametrize("weights", ["nf4", "bf16"])
def test_a_base_that_is_quantised_already_is_refused(base: Path, tmp_path: Path, weights: str) -> None:
    folder = tmp_path / "quantised"
    load_nf4(base, None, CPU).save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"holds quantised weights .* give the unquantised model"):
        load_model(recipe(folder, weights), device=CPU)
