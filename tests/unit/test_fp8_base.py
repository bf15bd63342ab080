"""fp8 bases: whole matrices by rows, layers of other sizes in bf16 and named, refused where it cannot run."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from dist_cpt_kernels import reference
from torch import nn

from dist_cpt.adapters.fp8_linear import Fp8Linear
from dist_cpt.adapters.quantize import dequantise, load_quantised, quantisation_state, read_weight, write_weight
from dist_cpt.errors import ConfigError
from dist_cpt.export.checkpoint_model import load_fp32
from dist_cpt.export.merge import quantisation_gap
from dist_cpt.model.load import load_model
from tests.frozen import FrozenCopy
from tests.quantised_base import recipe, save, source, write_adapter
from tests.tiny import llama

CPU = torch.device("cpu")
LAYERS = 2 * 7


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("fp8") / "base", **llama())


def block() -> tuple[Any, ...]:
    ids = torch.arange(64)[None]
    return ids, ids, torch.tensor([0, 64], dtype=torch.int32), 64, ids


def test_codes_and_scales_are_those_of_the_whole_matrix(base: Path) -> None:
    model = load_quantised(base, None, CPU, "fp8")
    weights, found = source(base), dict(quantisation_state(model))
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Fp8Linear)}
    assert len(layers) == len(found) == LAYERS
    for name, layer in layers.items():
        want = reference.quantize_rows(weights[f"{name}.weight"].bfloat16())
        assert layer.weight.dtype == torch.uint8
        assert torch.equal(layer.weight.data, want.codes)
        assert torch.equal(found[f"{name}.weight.row_scales"], want.scales)
        before = layer.weight.data.clone()
        write_weight(layer, read_weight(layer))  # as fold does
        assert torch.equal(layer.weight.data, before)
    rest = {name: p for name, p in model.named_parameters() if name.removesuffix(".weight") not in layers}
    assert {p.dtype for p in rest.values()} == {torch.bfloat16}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= rest.keys()


def test_a_step_trains_the_adapter_and_leaves_every_frozen_bit(base: Path) -> None:
    quantised, plain = (load_model(recipe(base, weights), device=CPU) for weights in ("fp8", "bf16"))
    assert list(quantised.trainable) == list(plain.trainable)
    assert quantised.adapter_config == plain.adapter_config
    assert quantised.identity == plain.identity | {
        "weights": "fp8", "weights_quantisation": {"row_wise": True, "codes": "e4m3fn"}
    }  # fmt: skip
    json.dumps(quantised.identity)
    for name, parameter in quantised.trainable.items():
        assert parameter.dtype == torch.float32
        if "lora_" not in name:  # PEFT draws over codes in fp32, not rounded to the dtype of a weight
            assert torch.equal(parameter, plain.trainable[name])
    frozen = FrozenCopy(quantised.module)
    loss, loss_sum = quantised.module(*block())
    loss.backward()
    assert not frozen.changed()
    assert all(p.grad is not None for name, p in quantised.trainable.items() if "lora_A" not in name)
    name, scales = next(quantisation_state(quantised.module))
    scales[0] += 1
    assert frozen.changed() == [name]
    with torch.no_grad():
        want = float(plain.module.bfloat16()(*block())[1])
    assert abs(float(loss_sum) - want) < 0.01 * want
    assert float(loss_sum) != want


def test_sizes_that_do_not_fit_stay_in_bf16_and_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save(tmp_path / "odd", **llama(intermediate_size=100))
    with caplog.at_level(logging.INFO):
        model = load_quantised(folder, None, CPU, "fp8")
    [line] = [record.message for record in caplog.records if "model.weights: fp8" in record.message]
    assert "gate_proj 100 x 64" in line
    assert "down_proj 64 x 100" in line
    assert "q_proj" not in line
    assert "lm_head" not in line
    layer = model.model.layers[0]
    assert isinstance(layer.self_attn.q_proj, Fp8Linear)
    assert type(layer.mlp.down_proj) is nn.Linear
    assert layer.mlp.down_proj.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_model_without_a_layer_that_fits_is_refused(kind: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"vocab_size": 131, "n_embd": 48, "n_layer": 1, "n_head": 3, "n_positions": 64,
                             "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
    values = llama(hidden_size=36, intermediate_size=100, num_attention_heads=2) if kind == "llama" else sizes
    folder = save(tmp_path / kind, **values | {"model_type": kind})
    with pytest.raises(ConfigError, match=r"no linear layer .* model\.weights: fp8") as refused:
        load_quantised(folder, None, CPU, "fp8")
    assert refused.value.exit_code == 64


def test_a_card_without_e4m3_products_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    with pytest.raises(ConfigError, match=r"model\.weights: fp8: A100 has compute capability 8\.0") as refused:
        load_model(recipe(base, "fp8"), device=torch.device("cuda"))
    assert refused.value.exit_code == 64


def test_dequantised_layers_are_plain_ones(base: Path) -> None:
    quantised = load_quantised(base, None, CPU, "fp8")
    weights = {name: read_weight(m) for name, m in quantised.named_modules() if isinstance(m, Fp8Linear)}
    plain = dequantise(quantised)
    assert not list(quantisation_state(plain))
    for name, weight in weights.items():
        layer = plain.get_submodule(name)
        assert type(layer) is nn.Linear
        assert torch.equal(layer.weight.data, weight)


def test_a_merge_says_how_far_it_is_from_the_trainer(base: Path, tmp_path: Path) -> None:
    """The gap of the two bases under one adapter, activations quantised as in training."""
    model = load_model(recipe(base, "fp8"), device=CPU)
    folder = write_adapter(tmp_path / "checkpoint", model)
    gap = quantisation_gap(folder)
    trainers = load_fp32(folder, base)
    probe = torch.randint(0, 512, (1, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = trainers(probe).logits
        for name, layer in trainers.named_modules():
            if name.endswith("base_layer"):
                codes = model.module.get_submodule(f"causal_lm.{name}")
                layer.forward = lambda x, codes=codes: reference.fp8_linear(x, codes.weight, codes.row_scales)
        expected = float((trainers(probe).logits - want).abs().max())
    assert gap is not None
    assert gap == pytest.approx(expected, rel=1e-2)
    assert gap > 1e-3
