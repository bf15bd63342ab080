"""Multi-tensor AdamW and the gradient norm on a GPU: right by the rule beside torch's own, no host sync."""

from __future__ import annotations

import pytest
import torch
from dist_cpt_kernels import adamw_, adamw_8bit_, bias_corrections, clip, dispatch, reference, sum_of_squares

from tests.kernel_inputs import adamw as case
from tests.kernels.error_rule import assert_right

pytestmark = pytest.mark.gpu
SIZES = (1, 507, 16384, 1_000_003)


@pytest.mark.parametrize("step", [1, 1000])
def test_update_beside_torchs_fused_adamw(step):
    assert not dispatch.INTERPRETED, "run with TRITON_INTERPRET=0"
    params, grads, exp_avgs, exp_avg_sqs = case.state(SIZES, device="cuda")
    hyper = case.HYPER
    torchs, truth, actual = (
        [[tensor.to(dtype, copy=True) for tensor in tensors] for tensors in (params, exp_avgs, exp_avg_sqs)]
        for dtype in (torch.float32, torch.float64, torch.float32)
    )
    update = case.update(step, "cuda")
    case.torch_fused(torchs[0], grads, torchs[1], torchs[2], step, case.HYPER)
    reference.adamw_(
        truth[0], [grad.double() for grad in grads], truth[1], truth[2],
        step_size=hyper["lr"] / update["corrections"][0], denominator=update["corrections"][1].double(),
        decay=1 - hyper["lr"] * hyper["weight_decay"], betas=hyper["betas"], eps=hyper["eps"],
        grad_factor=update["grad_factor"], skip=update["skip"],
    )  # fmt: skip
    copies = [torch.empty_like(param, dtype=torch.bfloat16) for param in params]
    adamw_(actual[0], grads, actual[1], actual[2], copies=copies, **update)
    for ours, theirs, exact in zip(actual, torchs, truth, strict=True):
        assert_right(ours, theirs, exact)
    assert all(torch.equal(copy, param.bfloat16()) for copy, param in zip(copies, actual[0], strict=True))


def test_clip_and_skip_without_a_host_sync():
    params, grads, exp_avgs, exp_avg_sqs = ([torch.ones(n, device="cuda") for n in SIZES] for _ in range(4))
    step = torch.ones((), device="cuda")
    for attempt in range(2):  # the first call compiles
        torch.cuda.set_sync_debug_mode("error" if attempt else "default")
        try:
            _, factor, skip = clip(sum_of_squares([*grads, grads[2].bfloat16()]), 1.0)
            options = case.HYPER | {"corrections": bias_corrections(step, case.HYPER["betas"])}
            adamw_(params, grads, exp_avgs, exp_avg_sqs, grad_factor=factor, skip=skip, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    before = [param.clone() for param in params]
    grads[3][77] = float("nan")
    _, factor, skip = clip(sum_of_squares(grads), 1.0)
    adamw_(params, grads, exp_avgs, exp_avg_sqs, **(case.update(2, "cuda") | {"grad_factor": factor, "skip": skip}))
    assert all(map(torch.equal, params, before))


def test_sum_of_squares():
    tensors = [torch.randn(n, device="cuda") for n in SIZES]
    actual = sum_of_squares(tensors)
    torch.testing.assert_close(actual, reference.sum_of_squares(tensors), rtol=1e-6, atol=0.0)
    assert torch.equal(actual, sum_of_squares(tensors))


def test_views_that_are_not_aligned():
    shifted, straight = (
        [[torch.ones(n + 3, device="cuda")[offset : offset + n] for n in SIZES] for _ in range(4)] for offset in (3, 0)
    )
    for lists in (shifted, straight):
        adamw_(*lists, **case.update(1, "cuda"))
    assert all(torch.equal(*pair) for pair in zip(shifted[0], straight[0], strict=True))
    # in another order: how many neighbours a thread reads depends on the alignment
    torch.testing.assert_close(sum_of_squares(shifted[0]), sum_of_squares(straight[0]), rtol=1e-6, atol=0.0)


def test_eight_bit_moments_beside_the_specification():
    """In fp32 both round a few times, in another order: a code at a border may be its neighbour."""
    size = 1_000_003
    params, grads, _, _ = (tensors[0].clone() for tensors in case.state((size,)))
    blocks = -(-size // reference.QUANTISATION_BLOCK)
    tables = torch.stack([torch.linspace(-1, 1, 256), torch.linspace(0, 1, 256)])
    tables = torch.cat([tables, torch.nn.functional.pad((tables[:, 1:] + tables[:, :-1]) / 2, (0, 1), value=torch.inf)])
    results = []
    for device in ("cpu", "cuda"):
        moments = [(torch.full((size,), 128, dtype=torch.uint8), torch.full((blocks,), 1e-4)) for _ in range(2)]
        moments = [(codes.to(device), scales.to(device)) for codes, scales in moments]
        param = params.to(device, copy=True)
        options = case.update(2, device) | {"grad_factor": torch.full((), 0.5, device=device)}
        adamw_8bit_([param], [grads.to(device)], moments[:1], moments[1:], tables.to(device), **options)
        results.append([param.cpu(), *(part.cpu() for packed in moments for part in packed)])
    for which, (spec, ours) in enumerate(zip(*results, strict=True)):
        if spec.dtype == torch.uint8:
            assert float((spec == ours).float().mean()) > 0.999, which
        else:
            torch.testing.assert_close(ours, spec, rtol=1e-5, atol=1e-12)
