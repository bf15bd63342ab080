"""RMSNorm on a GPU: right by the rule, the same bits twice, no host sync, rows beyond 2^31."""

from __future__ import annotations

import pytest
import torch
from dist_cpt_kernels import add_rms_norm, dispatch, reference, rms_norm
from dist_cpt_kernels.rms_norm import MAX_DIM

from tests.kernel_inputs import rms_norm as case
from tests.kernels.error_rule import assert_right

pytestmark = pytest.mark.gpu
OPS = ((case.alone, rms_norm, reference.rms_norm), (case.added, add_rms_norm, reference.add_rms_norm))


# one row, heads of 128, Llama 8B, an odd size, and the longest row a program takes
@pytest.mark.parametrize(
    ("num_rows", "dim"), [(1, 1), (5000, 128), (1003, 507), (2048, 4096), (517, 8192), (130, MAX_DIM)]
)
@pytest.mark.parametrize("casting", case.CASTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_that_of_torch(dtype, casting, num_rows, dim):
    assert not dispatch.INTERPRETED, "run with TRITON_INTERPRET=0"
    inputs = case.inputs(num_rows, dim, dtype, device="cuda")
    doubles = [tensor.double() for tensor in inputs]
    for run, ours, spec in OPS:
        truth = run(spec, *doubles, casting=casting)
        actual = run(ours, *inputs, casting=casting)
        assert_right(actual, run(spec, *inputs, casting=casting), truth)
        assert all(map(torch.equal, actual, run(ours, *inputs, casting=casting)))


@pytest.mark.parametrize("casting", case.CASTINGS)
def test_a_master_weight_and_rows_of_extremes(casting):
    for size in (0.0, 1e-12, 1e4):
        inputs = case.inputs(64, 4096, torch.bfloat16, torch.float32, size, device="cuda")
        inputs[0][2, 60] = 3e4
        doubles = [tensor.double() for tensor in inputs]
        for run, ours, spec in OPS:
            truth = run(spec, *doubles, casting=casting)
            assert_right(run(ours, *inputs, casting=casting), run(spec, *inputs, casting=casting), truth)


def test_views_give_the_bits_of_their_copies():
    base = torch.randn(64, 8, 256, device="cuda", dtype=torch.bfloat16)
    weight = torch.rand(128, device="cuda", dtype=torch.bfloat16)
    for view in (
        base[..., 3:131],
        base[..., ::2],
        base[:1, :1, :128].expand(50, 4, 128),
        base.transpose(0, 1)[..., 128:],
    ):
        grads = []
        for x in (view.detach(), view.detach().contiguous().clone()):
            leaves = x.requires_grad_(), weight.clone().requires_grad_()
            grads.append(torch.autograd.grad(sum(out.sum() for out in add_rms_norm(x, x, leaves[1])), leaves))
        assert all(map(torch.equal, *grads))


def test_offsets_beyond_two_to_the_31():
    num_rows, dim = 2**31 // 4096 + 64, 4096
    x = torch.randn(num_rows, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.rand(dim, device="cuda", dtype=torch.bfloat16)
    out = rms_norm(x, weight)
    (grad,) = torch.autograd.grad(out, x, out.detach())
    last = x[-64:].detach().requires_grad_()
    expected = rms_norm(last, weight)
    assert torch.equal(out[-64:], expected)
    assert torch.equal(grad[-64:], torch.autograd.grad(expected, last, expected.detach())[0])


def test_no_host_sync():
    inputs = case.inputs(512, 4096, torch.bfloat16, device="cuda")
    case.added(add_rms_norm, *inputs)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.added(add_rms_norm, *inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
