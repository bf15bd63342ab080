"""e4m3 by rows: bits that the kernel and the specification share, errors within those of the format."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from dist_cpt_kernels import QuantisedRows, dispatch, fp8_linear, lora_linear, lora_mlp, quantize_rows, reference
from dist_cpt_kernels.fp8 import MULTIPLE, product_by_torch, why_not
from dist_cpt_kernels.self_test import self_test_fp8

from dist_cpt.plan import tensors
from tests.kernel_inputs import lora_linear as case
from tests.kernel_inputs.fp8 import adversarial

TOKENS, WIDTH, OUT = 21, 256, 96
U = 2.0**-4  # unit roundoff of e4m3: 3 bits of mantissa
STEP = 2.0**-10  # half the step of its subnormal numbers
FP32, BF16 = 2.0**-24, 2.0**-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 160, 5000])
def test_the_kernel_gives_the_bits_of_the_specification(monkeypatch, columns, dtype):
    rows = adversarial(0, 9, max(columns, 8))[:, :columns].to(dtype)
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # every code, and every tie
    ties = torch.cat([values, (values[1:] + values[:-1]) / 2, torch.tensor([448.0])])[None].to(dtype)
    for x, factor in ((rows, None), (rows, case.random(1, columns)), (ties, None), (-ties, None), (rows[:0], None)):
        codes, scales = reference.quantize_rows(x, factor)
        monkeypatch.setattr(dispatch, "interpret_cpu_tensors", True)
        kernel = quantize_rows(x, factor)
        monkeypatch.setattr(dispatch, "interpret_cpu_tensors", False)
        assert torch.equal(kernel.codes, codes)
        assert torch.equal(kernel.scales, scales)


def test_every_code_is_its_own_value():
    """And a matrix that is quantised again keeps its bits, as a continued adapter over stored codes needs."""
    codes = torch.arange(256, dtype=torch.uint8)[None]
    codes = codes[codes.view(torch.float8_e4m3fn).float().isfinite()][None]
    again = quantize_rows(codes.view(torch.float8_e4m3fn).float() * 0.37)
    assert torch.equal(again.codes, codes)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of inf / inf in the interpreter
@pytest.mark.parametrize("interpreted", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_in_its_row(monkeypatch, bad, interpreted):
    monkeypatch.setattr(dispatch, "interpret_cpu_tensors", interpreted)
    x = case.random(0, 3, 32)
    x[1, 4] = bad
    weight = reference.quantize_rows(case.random(1, 16, 32))
    y = fp8_linear(x, *weight)
    assert y.isnan()[1].all()
    assert y[[0, 2]].isfinite().all()


@pytest.fixture(autouse=True)
def specification(monkeypatch):
    """Of products: the interpreter takes a program for each row, and the bits are the same."""
    monkeypatch.setattr(dispatch, "interpret_cpu_tensors", False)


def bound(values):
    """The largest error of each element that is quantised with its row, in fp64."""
    scale = values.abs().amax(1, keepdim=True).double() / 448
    exact = values.double().abs()
    return torch.maximum(U * exact, STEP * scale) + 2 * FP32 * exact + 2.0**-126


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_input_gradient_are_within_the_bounds_of_the_format(dtype):
    """Against fp64 over the weight before it was quantised, element by element."""
    x, grad = adversarial(0, TOKENS, WIDTH).to(dtype), adversarial(1, TOKENS, OUT).to(dtype)
    x[5], grad[5] = x[7], grad[7]  # 1e30 times 1e4 is no number to train with
    weight = adversarial(2, OUT, WIDTH)
    weight[5] *= 1e-30
    stored = quantize_rows(weight)
    decoded = stored.codes.view(torch.float8_e4m3fn).double() * stored.scales.double()[:, None]
    off = bound(weight)
    assert bool(((decoded - weight).abs() <= off).all())
    leaf = x.clone().requires_grad_()
    y = fp8_linear(leaf, *stored)
    y.backward(grad)
    assert leaf.grad is not None
    x, dy, w = x.double(), grad.double(), weight.double()
    # W's scales multiply dy before it is quantised, so an element of dy errs in proportion to the largest product
    scales, codes = stored.scales.double(), stored.codes.view(torch.float8_e4m3fn).double()
    pairs = (
        (y, x @ w.T, bound(x) @ decoded.abs().T + x.abs() @ off.T, x.abs() @ decoded.abs().T),
        (leaf.grad, dy @ w, bound(dy * scales) @ codes.abs() + dy.abs() @ off, dy.abs() @ decoded.abs()),
    )
    rounding = BF16 if dtype == torch.bfloat16 else 2 * FP32
    for got, want, allowed, size in pairs:
        slack = (rounding + 2 * WIDTH * FP32) * (size + allowed) + 2.0**-126
        assert bool(((got.detach().double() - want).abs() <= allowed + slack).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_layers_compute_what_their_composition_computes(dtype):
    """One rounding of an activation that falls on the other side of a tie changes a code by a step, so a layer that
    rounds in other places is as far from fp64 as the composition, and no closer."""
    one = partial(case.projection_of, width=112, dtype=dtype, fp8=True)
    x = case.random(50, 33, 112, dtype=dtype)
    several = (
        [one(48)],
        [one(112, bias=True)],
        [one(112, bias=True), one(48, seed=10), case.projection_of(30, 112, dtype, seed=20)],
        [one(48, rank=0), one(48, seed=10, dropout=0.2)],
    )
    for projections in several:
        case.assert_lora_right(lora_linear, reference.lora_linear, x, projections)
    shapes = ((64, 112), (64, 112), (112, 64))
    mlp = [case.projection_of(*shape, dtype, seed=10 * i, fp8=True) for i, shape in enumerate(shapes)]
    case.assert_lora_right(lora_mlp, reference.lora_mlp, x, mlp)
    again = case.run(partial(lora_mlp, recompute=True), x, mlp)
    assert all(map(torch.equal, again, case.run(lora_mlp, x, mlp)))


def test_the_gradient_is_that_of_the_weight_of_the_forward_pass():
    """dx of a dy that e4m3 holds exactly, with scales that are powers of two, is exact."""
    codes = torch.randint(0, 0x7F, (OUT, WIDTH), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    weight = QuantisedRows(codes, 2.0 ** -torch.randint(0, 3, (OUT,)).float())
    x = torch.zeros(4, WIDTH, requires_grad=True)
    grad = torch.zeros(4, OUT)
    grad[torch.arange(4), torch.arange(4)] = torch.tensor([1.0, -2.0, 0.5, 448.0])
    fp8_linear(x, *weight).backward(grad)
    decoded = codes.view(torch.float8_e4m3fn).float() * weight.scales[:, None]
    assert x.grad is not None
    torch.testing.assert_close(x.grad, grad @ decoded, rtol=2 * FP32, atol=0)


def test_torch_takes_the_arguments_and_gives_the_specifications_product():
    """The call that a GPU runs, on a CPU; factors as forward and backward give them."""
    weight = quantize_rows(adversarial(0, 48, 64)[7:])  # 41 rows: a bf16 output of any number of tokens
    x = quantize_rows(case.random(1, 16, 64))
    turned = QuantisedRows(quantize_rows(case.random(2, 64, 32)).codes.T.contiguous(), torch.ones(32))
    for a, b in ((weight, x), (x, turned)):
        out, spec = (torch.empty(len(a.codes), len(b.codes), dtype=torch.bfloat16) for _ in range(2))
        reference.scaled_product(a, b, spec)
        assert product_by_torch(a, b, out) is out
        assert float((out.double() - spec.double()).norm() / spec.double().norm()) <= BF16


def test_old_cards_are_named(monkeypatch):
    assert why_not(torch.device("cpu")) is None
    for capability, fits in (((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert (why_not(torch.device("cuda")) is None) == fits


def test_the_self_check_finds_another_scale_and_another_sum(monkeypatch):
    device = torch.device("cpu")
    assert self_test_fp8(device) == 0.0
    wrong = QuantisedRows(*reference.quantize_rows(case.random(0, 320, 256)))
    monkeypatch.setattr("dist_cpt_kernels.self_test.quantize_rows", lambda x: wrong)
    assert self_test_fp8(device) == float("inf")
    monkeypatch.undo()
    monkeypatch.setattr("dist_cpt_kernels.self_test.fp8_linear", lambda *args: reference.fp8_linear(*args) * 1.02)
    assert 0.015 < self_test_fp8(device) < 0.03


def test_the_plan_knows_which_sizes_fit():
    assert tensors._FP8_MULTIPLE == MULTIPLE
