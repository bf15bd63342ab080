"""Experts in NF4, int8 and fp8: the codes of each are those of a layer by itself, and products are by what they say."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from dist_cpt_kernels import reference
from torch import nn

from dist_cpt.adapters.experts import Groups, LowRank, adapted_experts, experts_of
from dist_cpt.adapters.quantised_experts import QuantisedExperts, stacks_of
from dist_cpt.adapters.quantize import dequantise, load_quantised, quantisation_state
from dist_cpt.model.load import load_model
from tests.frozen import FrozenCopy
from tests.quantised_base import recipe, source
from tests.tiny_mixtures import write_moe

pytestmark = pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
CPU = torch.device("cpu")
FORMATS = ("nf4", "int8", "fp8")
KINDS = ("qwen3_moe", "gpt_oss")  # the second stores its matrices transposed, and has biases


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {kind: write_moe(root / kind, kind) for kind in KINDS}


def definition(weights: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """What one matrix [O, I] in bf16 is stored as by itself."""
    from bitsandbytes.functional import quantize_4bit

    if weights == "nf4":
        codes, state = quantize_4bit(weight.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4")
        assert state.state2 is not None
        outer = {"offset": state.offset, "nested_absmax": state.state2.absmax, "nested_quant_map": state.state2.code}
        return {"codes": codes, "absmax": state.absmax, "quant_map": state.code} | outer
    if weights == "fp8":
        rows = reference.quantize_rows(weight)
        return {"codes": rows.codes, "row_scales": rows.scales}
    absmax = weight.float().abs().amax(1)
    return {"codes": (weight.float() * (127 / absmax)[:, None]).round().to(torch.int8), "row_absmax": absmax}


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_expert_is_stored_as_a_layer_by_itself(kind: str, weights: str, bases: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM

    model = load_quantised(bases[kind], None, CPU, weights)
    plain = AutoModelForCausalLM.from_pretrained(bases[kind], dtype=torch.bfloat16)
    found, parameters = dict(quantisation_state(model)), dict(model.named_parameters())
    stacks = list(stacks_of(model))
    assert len(stacks) == 4 - 2 * (weights == "fp8" and kind == "qwen3_moe")  # 16 does not divide its 24
    for path, _, _, stack in stacks:
        weight_EOI = plain.get_parameter(path).data
        weight_EOI = weight_EOI.mT if stack.transposed else weight_EOI
        for expert, weight in enumerate(weight_EOI):
            want = definition(weights, weight)
            assert torch.equal(parameters[path].data[expert], want.pop("codes"))
            for key, values in want.items():
                scale = found[f"{path}.{key}"]
                assert torch.equal(scale if key in stack.form.tables else scale[expert], values), key
    dense = dequantise(model)
    assert not list(stacks_of(dense))
    assert not any(isinstance(module, QuantisedExperts) for module in dense.modules())
    for path, *_ in stacks:
        weight = plain.get_parameter(path).data.float()
        off = float((dense.get_parameter(path).data - weight).norm() / weight.norm())
        assert 0 < off < (0.15 if weights == "nf4" else 0.03)


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_a_loop_over_dequantised_experts(
    kind: str, weights: str, bases: dict[str, Path]
) -> None:
    """In fp64, which multiplies by exactly what the codes say; every token's experts are written out."""
    torch.manual_seed(1)
    model = load_quantised(bases[kind], None, CPU, weights)
    experts: Any = next(module for _, module in experts_of(model))
    for parameter in experts.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.double()
    matrices, leaves, low_rank = {}, [], {}
    for name in ("gate_up_proj", "down_proj"):
        stack = experts.stacks.get(name)
        stored = getattr(experts, name).data
        if stack is not None:
            stored = stack.matrices(stored, torch.float64)
            factors = stack.row_factors()
            stored = stored if factors is None else stored * factors.double()[..., None]
        matrices[name] = stored
        _, outputs, inputs = stored.shape
        a, b = torch.randn(4, 3, inputs).double(), torch.randn(4, outputs, 3).double()
        leaves += [a.requires_grad_(), b.requires_grad_()]
        low_rank[name] = LowRank(a, b, 0.7)
    hidden = torch.randn(11, 64).double().requires_grad_()
    index = torch.stack([torch.randperm(3)[:2] for _ in range(11)])  # expert 3 gets no token
    routed = torch.rand(11, 2).double().requires_grad_()

    def product(name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        pair = low_rank[name]
        y = (matrices[name][expert] + pair.scale * pair.b[expert] @ pair.a[expert]) @ x
        return y + getattr(experts, f"{name}_bias")[expert] if experts.has_bias else y

    rows = []
    for token in range(11):
        row = torch.zeros(64).double()
        for expert, weight in zip(index[token].tolist(), routed[token], strict=True):
            inner = experts._apply_gate(product("gate_up_proj", expert, hidden[token]))
            row = row + weight * product("down_proj", expert, inner)
        rows.append(row)
    expected, out_grad = torch.stack(rows), torch.randn(11, 64).double()
    actual = adapted_experts(experts, low_rank, hidden, index, routed, by_loop=True)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    inputs = [hidden, routed, *leaves]
    for ours, theirs in zip(
        torch.autograd.grad(actual, inputs, out_grad), torch.autograd.grad(expected, inputs, out_grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("weights", FORMATS)
def test_the_grouped_product_is_the_loop(weights: str, bases: dict[str, Path]) -> None:
    model = load_quantised(bases["gpt_oss"], None, CPU, weights)
    experts: Any = next(module for _, module in experts_of(model))
    expert_S, ends_E = torch.tensor([0] * 3 + [2] * 5 + [3] * 8), torch.tensor([3, 3, 8, 16], dtype=torch.int32)
    results = []
    for by_loop in (True, False):
        x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
        out = experts.frozen_product(x, "gate_up_proj", Groups(expert_S, ends_E, by_loop))
        (grad,) = torch.autograd.grad(out.sum(), x)  # which has a gradient of stride 0
        results.append((out.detach(), grad))
    for loop, grouped in zip(*results, strict=True):
        torch.testing.assert_close(grouped, loop)


@pytest.mark.parametrize("weights", FORMATS)
def test_the_adapter_is_that_of_a_16_bit_base_and_every_frozen_bit_stays(weights: str, bases: dict[str, Path]) -> None:
    quantised, plain = (load_model(recipe(bases["gpt_oss"], w), device=CPU) for w in (weights, "bf16"))
    assert quantised.adapter_config == plain.adapter_config
    shapes = {name: parameter.shape for name, parameter in quantised.trainable.items()}
    assert shapes == {name: parameter.shape for name, parameter in plain.trainable.items()}
    assert quantised.left_out == plain.left_out
    assert quantised.identity["weights_quantisation"]["experts"] == ["down_proj", "gate_up_proj"]
    json.dumps(quantised.identity)
    quantised.module.train().bfloat16()  # as an engine does to what computes
    frozen = FrozenCopy(quantised.module)
    ids = torch.arange(64)[None]
    borders = torch.tensor([0, 64], dtype=torch.int32)
    loss, loss_sum = quantised.module(ids, ids, borders, 64, ids)
    loss.backward()
    assert not frozen.changed()
    assert all(p.grad is not None for p in quantised.trainable.values())
    with torch.no_grad():
        want = float(plain.module.bfloat16()(ids, ids, borders, 64, ids)[1])
    assert float(loss_sum.detach()) == pytest.approx(want, rel=0.02)
    name, scales = next(entry for entry in quantisation_state(quantised.module) if ".experts." in entry[0])
    scales.view(-1)[0] += 1
    assert frozen.changed() == [name]


def test_frozen_experts_count_with_all_their_parameters(bases: dict[str, Path]) -> None:
    adapter = {"rank": 4, "alpha": 4, "experts": "frozen"}
    quantised, plain = (
        load_model(recipe(bases["qwen3_moe"], w, adapter=adapter), device=CPU).left_out for w in ("nf4", "bf16")
    )
    assert quantised == plain
    assert plain["mlp.experts.gate_up_proj"] == 2 * 4 * 48 * 64


def test_experts_of_sizes_that_do_not_fit_are_named(bases: dict[str, Path], caplog: Any) -> None:
    with caplog.at_level(logging.INFO, logger="dist_cpt"):
        model = load_quantised(bases["qwen3_moe"], None, CPU, "fp8")
    assert "model.weights: fp8: experts of these sizes stay in bf16: down_proj 64 x 24" in caplog.text
    experts = next(module for _, module in experts_of(model))
    assert isinstance(experts.down_proj, nn.Parameter)
    assert experts.down_proj.dtype == torch.bfloat16
    assert source(bases["qwen3_moe"])  # its own files are untouched
