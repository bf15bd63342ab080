"""SwiGLU and GeGLU against fp64: the three activations, both gradients, halves of one projection, extremes."""

from __future__ import annotations

import pytest
import torch
from dist_cpt_kernels import dispatch, gated, gated_gradients, reference
from dist_cpt_kernels.gated import ACTIVATIONS, BLOCK

from tests.kernel_inputs import gated as case


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_that_of_torch(dtype, activation):
    for shape in ((1,), (1, 1), (3, 123), (2, 3, 507), (3, BLOCK), (2, 2 * BLOCK + 1)):
        case.assert_gated_right(*case.inputs(shape, dtype), activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_tails_and_around_zero(activation):
    """Where the logistic function is 0 or 1 to fp32, where the cube of bf16 overflows, and where it is a line."""
    gate = torch.cat((torch.linspace(-120, 120, 2001), torch.linspace(-1e-3, 1e-3, 101), torch.tensor([1e4, -1e4])))
    up = torch.linspace(-2, 2, len(gate))
    for dtype in (torch.float32, torch.bfloat16):
        case.assert_gated_right(gate.to(dtype), up.to(dtype), torch.ones_like(up).to(dtype), activation)
    ends = torch.tensor([3e38, -3e38])
    out, dgate, dup = case.gradients(gated, ends, torch.ones(2), torch.ones(2), activation)
    assert out.tolist() == dup.tolist() == [ends[0].item(), 0.0]
    assert dgate.tolist() == [1.0, 0.0]


def test_small_values_keep_their_digits():
    """silu(-20) is -4e-8: of 1 - 1 / (1 + e^20) nothing would be left in fp32."""
    gate = torch.linspace(-60.0, -10.0, 101)
    ones = torch.ones_like(gate)
    for activation in ("silu", "gelu_tanh"):
        short = gate if activation == "silu" else gate / 10
        actual = case.gradients(gated, short, ones, ones, activation)
        truth = case.gradients(reference.gated, short.double(), ones.double(), ones.double(), activation)
        for ours, exact in zip(actual, truth, strict=True):
            torch.testing.assert_close(ours.double(), exact, rtol=2e-5, atol=0.0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_halves_of_one_projection_and_other_strides(activation):
    both, other = torch.randn(2, 5, 4, 2 * 123, generator=torch.Generator().manual_seed(1)).unbind()
    pairs = (both.chunk(2, dim=-1), (both[..., ::2], both[..., 1::2]), (both[:, 1, :7], other[:, 2, :7]),
             (both[:1].expand(5, 4, 246), other), (both.transpose(0, 1), other.transpose(0, 1)))  # fmt: skip
    for gate, up in pairs:
        grad = torch.randn(gate.shape).movedim(0, -1).contiguous().movedim(-1, 0)
        actual = case.gradients(gated, gate, up, grad, activation)
        expected = case.gradients(gated, gate.contiguous(), up.contiguous(), grad.contiguous(), activation)
        assert all(map(torch.equal, actual, expected))


def test_offsets_beyond_two_to_the_31():
    """Rows of gate and up 2^30 elements apart, over memory that is never touched between them."""
    stride, width = 2**30, 123
    inputs = case.inputs((3, width), torch.bfloat16)
    expected = case.gradients(gated, *inputs, "silu")
    gate, up = (torch.empty(2 * stride + width, dtype=torch.bfloat16).as_strided((3, width), (stride, 1)) for _ in "12")
    gate.copy_(inputs[0])
    up.copy_(inputs[1])
    assert all(map(torch.equal, case.gradients(gated, gate, up, inputs[2], "silu"), expected))


@pytest.mark.parametrize("interpreted", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_for_a_backward_pass_by_hand(monkeypatch, interpreted, activation):
    monkeypatch.setattr(dispatch, "interpret_cpu_tensors", interpreted)
    gate, up, grad = case.inputs((3, 507), torch.bfloat16)
    kept = [t.clone() for t in (gate, up, grad)]
    out, dgate, dup = case.gradients(gated, gate, up, grad, activation)
    assert [x if x is None else x.tolist() for x in gated_gradients(grad, gate, up, activation)] == [
        dgate.tolist(), dup.tolist(), None,
    ]  # fmt: skip
    actual = gated_gradients(grad, gate, up, activation, want_value=True)
    assert all(map(torch.equal, actual, (dgate, dup, out)))
    assert all(map(torch.equal, (gate, up, grad), kept))
    over = gated_gradients(grad, gate, up, activation, want_value=True, overwrite=True)
    assert all(map(torch.equal, over, actual))
    assert [x.data_ptr() for x in over] == [x.data_ptr() for x in (gate, up, grad)]


def test_saved_buffers_are_not_written():
    gate, up, grad = case.inputs((3, 507))
    kept = [t.clone() for t in (gate, up, grad)]
    inputs = gate.requires_grad_(), up.requires_grad_()
    out = gated(*inputs)
    first, second = (torch.autograd.grad(out, inputs, grad, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, (gate, up, grad), kept))


def test_empty_and_not_finite():
    for shape in ((0, 7), (3, 0)):
        inputs = torch.empty(shape, requires_grad=True), torch.empty(shape, requires_grad=True)
        gated(*inputs).sum().backward()
        assert inputs[0].grad.shape == shape
    for activation in ACTIVATIONS:
        gate = torch.tensor([1.0, float("nan"), float("inf"), 2.0])
        out = gated(gate, torch.ones(4), activation)
        assert out[1].isnan()
        assert out[2] == float("inf")
        assert out[[0, 3]].isfinite().all()


def test_a_second_derivative_is_refused_and_not_wrong():
    gate, up, _ = case.inputs((3, 16))
    (grad,) = torch.autograd.grad(gated(gate.requires_grad_(), up).square().sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_wrong_arguments_are_named():
    gate = torch.ones(3, 16)
    with pytest.raises(ValueError, match=r"activation: .* got 'gelu'"):
        gated(gate, gate, "gelu")
    with pytest.raises(ValueError, match="gate and up: "):
        gated(gate, gate[:2])
    with pytest.raises(ValueError, match="grad: "):
        gated_gradients(gate[:2], gate, gate)
    with pytest.raises(ValueError, match="overwrite: "):
        gated_gradients(gate, gate.T.contiguous().T, gate, overwrite=True)
