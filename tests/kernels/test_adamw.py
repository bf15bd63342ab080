"""Multi-tensor AdamW against torch's fused one, the device-side clip and skip, and the gradient norm."""

from __future__ import annotations

import pytest
import torch
from dist_cpt_kernels import adamw_, clip, dispatch, reference, self_test, sum_of_squares
from dist_cpt_kernels.adamw import PIECE, _Launch
from dist_cpt_kernels.self_test import ALLOWED, self_test_adamw

from tests.kernel_inputs import adamw as case


def _clone(tensors):
    return [tensor.clone() for tensor in tensors]


@pytest.mark.parametrize(("step", "weight_decay"), [(1, 0.1), (7, 0.0), (1000, 0.1)])
def test_bits_are_those_of_torchs_fused_adamw(step, weight_decay):
    """Bit for bit where torch's loop is vectorised; its remainder of a few elements rounds otherwise, by one ulp."""
    hyper = {**case.HYPER, "weight_decay": weight_decay}
    params, grads, exp_avgs, exp_avg_sqs = case.state(first=step == 1)
    expected = [_clone(params), _clone(exp_avgs), _clone(exp_avg_sqs)]
    case.torch_fused(expected[0], grads, expected[1], expected[2], step, hyper)
    adamw_(params, grads, exp_avgs, exp_avg_sqs, **(case.update(step) | hyper))
    for actual, wanted in zip((params, exp_avgs, exp_avg_sqs), expected, strict=True):
        for ours, theirs in zip(actual, wanted, strict=True):
            whole = len(ours) // 64 * 64
            assert torch.equal(ours[:whole], theirs[:whole])
            distance = ours.view(torch.int32).long() - theirs.view(torch.int32).long()
            assert not len(ours) or int(distance.abs().max()) <= 1


@pytest.mark.parametrize("interpreted", [True, False])
def test_clip_factor_copies_and_bf16_gradients(monkeypatch, interpreted):
    monkeypatch.setattr(dispatch, "interpret_cpu_tensors", interpreted)
    params, grads, exp_avgs, exp_avg_sqs = case.state((507, 64))
    narrow = [grad.bfloat16() for grad in grads]
    copies = [torch.empty(n, dtype=torch.bfloat16) for n in (507, 64)]
    factor = torch.tensor(0.3)
    expected = [_clone(params), _clone(exp_avgs), _clone(exp_avg_sqs)]
    adamw_(expected[0], [grad.float() * factor for grad in narrow], expected[1], expected[2], **case.update(3))
    adamw_(params, narrow, exp_avgs, exp_avg_sqs, **(case.update(3) | {"grad_factor": factor}), copies=copies)
    for actual, wanted in zip((params, exp_avgs, exp_avg_sqs), expected, strict=True):
        assert all(map(torch.equal, actual, wanted))
    assert all(torch.equal(copy, param.bfloat16()) for copy, param in zip(copies, params, strict=True))


@pytest.mark.parametrize("interpreted", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_moves_nothing(monkeypatch, interpreted, bad):
    monkeypatch.setattr(dispatch, "interpret_cpu_tensors", interpreted)
    state = case.state((507, 64))
    params, grads, exp_avgs, exp_avg_sqs = state
    grads[0][300] = bad
    copies = [torch.full((n,), 7.0, dtype=torch.bfloat16) for n in (507, 64)]
    before = [_clone(params), _clone(exp_avgs), _clone(exp_avg_sqs)]
    norm, factor, skip = clip(sum_of_squares(grads), 1.0)
    assert not norm.isfinite()
    assert int(skip) == 1
    adamw_(*state, **(case.update(3) | {"grad_factor": factor, "skip": skip}), copies=copies)
    for actual, wanted in zip((params, exp_avgs, exp_avg_sqs), before, strict=True):
        assert all(map(torch.equal, actual, wanted))
    assert all(bool((copy == 7.0).all()) for copy in copies)
    grads[0][300] = 0.0
    _, factor, skip = clip(sum_of_squares(grads), 1.0)
    adamw_(*state, **(case.update(3) | {"grad_factor": factor, "skip": skip}), copies=copies)
    assert not any(map(torch.equal, params, before[0]))


def test_views_that_are_not_aligned():
    whole, view = torch.empty(100), torch.empty(103)[3:]
    assert _Launch([[whole]]).aligned
    assert not _Launch([[whole, view]]).aligned  # wide loads would be an error on a GPU
    params, grads, exp_avgs, exp_avg_sqs = case.state((PIECE + 300, 100))
    expected = _clone(params)
    adamw_([p[3:] for p in expected], [g[3:] for g in grads], _clone([m[3:] for m in exp_avgs]),
           _clone([v[3:] for v in exp_avg_sqs]), **case.update(2))  # fmt: skip
    aligned = [_clone([t[3:] for t in tensors]) for tensors in (params, grads, exp_avgs, exp_avg_sqs)]
    adamw_(*aligned, **case.update(2))
    for whole, part, old in zip(expected, aligned[0], params, strict=True):
        assert torch.equal(whole[3:], part)
        assert torch.equal(whole[:3], old[:3])


def test_sum_of_squares_is_exact_to_fp32_and_repeats():
    _, grads, _, _ = case.state()
    mixed = [*grads, grads[3].bfloat16()]
    actual = sum_of_squares(mixed)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, reference.sum_of_squares(mixed), rtol=1e-6, atol=0.0)
    assert torch.equal(actual, sum_of_squares(mixed))
    large = torch.full((40 * PIECE,), 0.1)  # one fp32 sum over all of it would be off by far more
    torch.testing.assert_close(sum_of_squares([large]), reference.sum_of_squares([large]), rtol=1e-6, atol=0.0)


def test_clip_is_torchs():
    _, grads, _, _ = case.state()
    for max_norm in (1e-3, 1e3, None):
        norm, factor, skip = clip(sum_of_squares(grads), max_norm)
        params = [torch.zeros_like(grad).requires_grad_() for grad in grads]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        torchs = torch.nn.utils.clip_grad_norm_(params, float("inf") if max_norm is None else max_norm)
        torch.testing.assert_close(norm, torchs, rtol=1e-6, atol=0.0)
        torch.testing.assert_close(params[2].grad, grads[2] * factor, rtol=1e-6, atol=0.0)
        assert int(skip) == 0


def test_wrong_arguments_are_named():
    params, grads, exp_avgs, exp_avg_sqs = case.state((5, 6))
    adamw_([], [], [], [], **case.update(1))
    for match, lists in (
        ("grads: ", (params, grads[:1], exp_avgs, exp_avg_sqs)),
        ("exp_avgs: .*dtype", (params, grads, [m.bfloat16() for m in exp_avgs], exp_avg_sqs)),
        ("grads: .*dtype", (params, [grads[0], grads[1].half()], exp_avgs, exp_avg_sqs)),
        ("params: .*contiguous", ([torch.ones(5, 2)[:, 0], params[1]], grads, exp_avgs, exp_avg_sqs)),
    ):
        with pytest.raises(ValueError, match=match):
            adamw_(*lists, **case.update(1))
    with pytest.raises(ValueError, match="tensors: "):
        sum_of_squares([])


@pytest.mark.parametrize("interpreted", [True, False])
def test_the_check_of_a_device_passes_and_finds_a_wrong_update(monkeypatch, interpreted):
    monkeypatch.setattr(dispatch, "interpret_cpu_tensors", interpreted)
    assert self_test_adamw(torch.device("cpu")) <= ALLOWED[torch.float32]
    right = self_test.adamw_
    monkeypatch.setattr(self_test, "adamw_", lambda *lists, lr, **options: right(*lists, lr=1.001 * lr, **options))
    assert self_test_adamw(torch.device("cpu")) > ALLOWED[torch.float32]
