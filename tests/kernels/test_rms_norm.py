"""RMSNorm and its fusion with the residual addition against fp64: both castings, strides, extremes, every gradient."""

from __future__ import annotations

import sys

import pytest
import torch
from dist_cpt_kernels import add_rms_norm, rms_norm
from dist_cpt_kernels.rms_norm import (
    MAX_DIM,
    MAX_SHARED_DIM,
    SHARE_ROWS,
    _num_programs,
    rms_norm_backward_kernel,
    rms_norm_kernel,
    tile,
)

from tests.kernel_inputs import rms_norm as case

rms_norm_file = sys.modules[rms_norm.__module__]  # the package's name of it is the function


@pytest.mark.parametrize("casting", case.CASTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_that_of_torch(dtype, casting):
    for num_rows, dim in ((1, 1), (123, 1), (1, 507), (13, 123), (123, 64), (7, 1500)):
        case.assert_both_right(case.inputs(num_rows, dim, dtype), casting)


@pytest.mark.parametrize("casting", case.CASTINGS)
def test_a_master_weight_in_fp32_under_bf16_rows(casting):
    inputs = case.inputs(13, 123, torch.bfloat16, torch.float32)
    case.assert_both_right(inputs, casting)
    assert rms_norm(inputs[0], inputs[2], casting=casting).dtype == torch.bfloat16


@pytest.mark.parametrize("casting", case.CASTINGS)
@pytest.mark.parametrize("size", [0.0, 1e-12, 1e4])
def test_rows_of_zeros_tiny_and_huge(casting, size):
    """Where eps rules, and where one outlier makes the rest of its row small."""
    for dtype in (torch.float32, torch.bfloat16):
        inputs = case.inputs(5, 123, dtype, size=size)
        inputs[0][2, 60] = 3e4
        case.assert_both_right(inputs, casting)


def test_castings_are_those_of_the_model_families():
    """Llama rounds before the weight, Gemma after: in bf16 the two differ, each as its family's modules do."""
    x, _, weight, _, _ = case.inputs(64, 123, torch.bfloat16)
    normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + case.EPS)
    llama, gemma = (rms_norm(x, weight, case.EPS, casting=casting) for casting in case.CASTINGS)
    assert float((llama == weight * normed.bfloat16()).float().mean()) > 0.999
    assert float((gemma == (normed * (1 + weight.float())).bfloat16()).float().mean()) > 0.999
    once = (normed * weight.float()).bfloat16()
    assert float((llama == once).float().mean()) < 0.9


def test_the_sum_is_rounded_before_it_is_normalised():
    x, residual, weight, _, _ = case.inputs(13, 123, torch.bfloat16)
    out, total = add_rms_norm(x, residual, weight)
    assert torch.equal(total, x + residual)
    assert torch.equal(out, rms_norm(total, weight))


def test_strides_views_and_an_expanded_gradient():
    base = torch.randn(6, 4, 2 * 64, generator=torch.Generator().manual_seed(0))
    weight = torch.linspace(0.5, 1.5, 64)
    views = (base[..., 3:67], base[:, :, ::2], base[::2, 1:3, :64], base[:1, :1, :64].expand(5, 4, 64),
             base.transpose(0, 1)[..., 64:])  # fmt: skip
    for view in views:
        for op in (lambda x, w: rms_norm(x, w).sum(), lambda x, w: sum(out.sum() for out in add_rms_norm(x, x, w))):
            grads = []
            for x in (view.detach(), view.detach().contiguous().clone()):
                leaves = x.requires_grad_(), weight.clone().requires_grad_()
                grads.append(torch.autograd.grad(op(*leaves), leaves))
            assert all(map(torch.equal, *grads))


def test_more_rows_than_programs_and_the_same_bits_every_time():
    rows, _, _ = tile(64)
    num_rows = 3 * rows * _num_programs(torch.device("cpu")) + 5
    inputs = case.inputs(num_rows, 64, torch.float32)
    case.assert_both_right(inputs, "llama")
    first, second = (case.added(add_rms_norm, *inputs) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_rows_too_long_for_one_kernel(monkeypatch):
    """Above one length the weight's gradient has a kernel of its own, above another all is left to torch."""
    case.assert_both_right(case.inputs(3, MAX_DIM + 1, torch.bfloat16), "llama")
    monkeypatch.setattr(rms_norm_file, "_num_programs", lambda device: 40)  # two shares
    inputs = case.inputs(2 * SHARE_ROWS + 1, MAX_SHARED_DIM + 1, torch.bfloat16)
    case.assert_both_right(inputs, "gemma")
    every = case.added(add_rms_norm, *inputs)
    leaves = [t.detach().requires_grad_(i == 2) for i, t in enumerate(inputs[:3])]
    (alone,) = torch.autograd.grad(add_rms_norm(*leaves, case.EPS), leaves[2:], inputs[3:])
    assert torch.equal(alone, every[4])


def test_offsets_beyond_two_to_the_31(number_programs_from):
    """The last three rows of tensors with more than 2^31 elements, of which only these rows touch memory."""
    dim, num_rows = 1500, 2**31 // 1500 + 3
    x, residual, weight, grad, grad_total = case.inputs(3, dim, torch.bfloat16)
    expected = case.added(add_rms_norm, x, residual, weight, grad, grad_total)
    rows, block, _ = tile(dim)
    assert rows == 1  # one program per row
    sizes = {"GEMMA": False, "ROWS": rows, "BLOCK": block}
    large = [torch.empty(num_rows, dim, dtype=torch.bfloat16) for _ in range(4)]
    rstd = torch.empty(num_rows)
    number_programs_from(num_rows - 3)
    large[0][-3:], large[1][-3:] = x, residual
    out, total = large[2], large[3]
    rms_norm_kernel[(3,)](large[0], large[1], weight, out, total, rstd, num_rows, dim, case.EPS, **sizes)
    assert torch.equal(out[-3:], expected[0])
    assert torch.equal(total[-3:], expected[1])
    large[0][-3:], large[1][-3:] = grad, grad_total
    rms_norm_backward_kernel[(3,)](large[0], large[1], total, weight, rstd, out, None, num_rows, dim, **sizes)
    assert torch.equal(out[-3:], expected[2])


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_only_the_gradients_that_are_asked_for(wanted):
    x, residual, weight, grad, grad_total = case.inputs(13, 123, torch.float32)
    every = case.added(add_rms_norm, x, residual, weight, grad, grad_total)[2:]
    inputs = [t.detach().requires_grad_(i in wanted) for i, t in enumerate((x, residual, weight))]
    torch.autograd.backward(add_rms_norm(*inputs, case.EPS), (grad, grad_total))
    for i, tensor in enumerate(inputs):
        assert (tensor.grad is not None) == (i in wanted)
        assert tensor.grad is None or torch.equal(tensor.grad, every[i])


def test_either_output_may_go_unused():
    inputs = case.inputs(13, 123, torch.float32)
    zeros = torch.zeros(13, 123)
    for unused in (0, 1):
        leaves = [t.detach().requires_grad_() for t in inputs[:3]]
        outs = add_rms_norm(*leaves, case.EPS)
        actual = torch.autograd.grad(outs[1 - unused], leaves, inputs[4 - unused], allow_unused=True)
        grads = [zeros if i == unused else inputs[3 + i] for i in (0, 1)]
        expected = case.added(add_rms_norm, *inputs[:3], *grads)[2:]
        for ours, wanted in zip(actual, expected, strict=True):
            assert not wanted.any() if ours is None else torch.equal(ours, wanted)


def test_inputs_and_gradients_are_not_written():
    """The sum has another consumer, and so may have every gradient."""
    inputs = case.inputs(13, 123, torch.float32)
    before = [t.clone() for t in inputs]
    leaves = [t.requires_grad_() for t in inputs[:3]]
    out, total = add_rms_norm(*leaves, case.EPS)
    kept = total.detach().clone()
    first, second = (torch.autograd.grad((out, total), leaves, inputs[3:], retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert torch.equal(total, kept)
    assert all(map(torch.equal, inputs, before))
    total.detach().add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad((out, total), leaves, inputs[3:])


def test_empty_and_not_finite():
    weight = torch.ones(123, requires_grad=True)
    x = torch.empty(0, 4, 123, requires_grad=True)
    out, total = add_rms_norm(x, x, weight)
    (out.sum() + total.sum()).backward()
    assert out.shape == x.shape == x.grad.shape
    assert not weight.grad.any()
    x = case.inputs(3, 123, torch.float32)[0]
    x[1, 60] = float("nan")
    out = rms_norm(x, weight)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


def test_a_second_derivative_is_refused_and_not_wrong():
    x = torch.randn(3, 16, requires_grad=True)
    (grad,) = torch.autograd.grad(rms_norm(x, torch.ones(16)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_wrong_arguments_are_named():
    x, weight = torch.ones(3, 16), torch.ones(16)
    with pytest.raises(ValueError, match=r"x and weight: .* \[3, 16\] and \[15\]"):
        rms_norm(x, weight[:15])
    with pytest.raises(ValueError, match=r"residual: .* torch.bfloat16"):
        add_rms_norm(x, x.bfloat16(), weight)
    with pytest.raises(ValueError, match=r"casting: .* got 'none'"):
        rms_norm(x, weight, casting="none")
