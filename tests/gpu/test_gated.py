"""SwiGLU and GeGLU on a GPU: right by the rule, far tails, views, results over their inputs, elements beyond 2^31."""

from __future__ import annotations

import pytest
import torch
from dist_cpt_kernels import dispatch, gated, gated_gradients
from dist_cpt_kernels.gated import ACTIVATIONS

from tests.kernel_inputs import gated as case

pytestmark = pytest.mark.gpu


def assert_right_and_repeatable(gate, up, grad, activation):
    case.assert_gated_right(gate, up, grad, activation)
    first, second = (case.gradients(gated, gate, up, grad, activation) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("shape", [(1,), (3, 507), (2, 257, 1003), (1024, 14336)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_that_of_torch(dtype, activation, shape):
    assert not dispatch.INTERPRETED, "run with TRITON_INTERPRET=0"
    assert_right_and_repeatable(*case.inputs(shape, dtype, device="cuda"), activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_tails_and_around_zero(activation):
    gate = torch.cat((torch.linspace(-120, 120, 2001), torch.linspace(-1e-3, 1e-3, 101), torch.tensor([1e4, -1e4])))
    gate, up = gate.cuda(), torch.linspace(-2, 2, len(gate), device="cuda")
    for dtype in (torch.float32, torch.bfloat16):
        assert_right_and_repeatable(gate.to(dtype), up.to(dtype), torch.ones_like(up).to(dtype), activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_halves_of_one_projection_and_results_over_the_inputs(activation):
    both = torch.randn(257, 2 * 1408, device="cuda", dtype=torch.bfloat16)
    gate, up = both.chunk(2, dim=-1)
    grad = torch.randn_like(gate)
    actual = case.gradients(gated, gate, up, grad, activation)
    plain = [x.contiguous() for x in (gate, up, grad)]
    assert all(map(torch.equal, actual, case.gradients(gated, *plain, activation)))
    over = gated_gradients(plain[2], plain[0], plain[1], activation, want_value=True, overwrite=True)
    assert all(map(torch.equal, over, (*actual[1:], actual[0])))
    assert [x.data_ptr() for x in over] == [x.data_ptr() for x in plain]


@pytest.mark.parametrize("contiguous", [True, False])
def test_offsets_beyond_two_to_the_31(contiguous):
    width = 14336
    rows = 2**31 // width + 16
    gate = torch.randn(rows, width if contiguous else 2 * width, device="cuda", dtype=torch.bfloat16)[:, :width]
    actual = gated(gate, gate)
    last = gate[-16:].contiguous()
    assert torch.equal(actual[-16:], gated(last, last))
    actual = gated_gradients(gate, gate, gate)
    expected = gated_gradients(last, last, last)
    assert all(torch.equal(ours[-16:], wanted) for ours, wanted in zip(actual[:2], expected[:2], strict=True))


def test_no_host_sync():
    gate, up, grad = case.inputs((64, 1408), torch.bfloat16, device="cuda")
    case.gradients(gated, gate, up, grad, "silu")  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.gradients(gated, gate, up, grad, "silu")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_kernel_runs_where_its_tensors_are():
    gate, up, grad = (x.to("cuda:1") for x in case.inputs((257, 1408), torch.bfloat16, device="cuda"))
    assert torch.cuda.current_device() == 0
    assert_right_and_repeatable(gate, up, grad, "silu")
