"""The fused losses on a GPU: right by the rule, the same bits twice, no host sync, and labels that lie outside."""

from __future__ import annotations

import pytest
import torch
from dist_cpt_kernels import dispatch, linear_cross_entropy, reference
from dist_cpt_kernels.cross_entropy import cross_entropy_in_place

from tests.kernel_inputs import cross_entropy as case
from tests.kernel_inputs import linear_cross_entropy as linear_case
from tests.kernels.error_rule import assert_right

pytestmark = pytest.mark.gpu
TERMS = {"softcap": 30.0}


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("make", [case.random, case.confident])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_tokens", "vocab"), [(1, 123), (123, 507), (64, 128_256), (17, 256_000)])
def test_cross_entropy(num_tokens, vocab, dtype, make, softcap):
    assert not dispatch.INTERPRETED, "run with TRITON_INTERPRET=0"
    logits, labels = make(num_tokens, vocab, dtype, "cuda")
    options = {"scale": 0.3, "softcap": softcap}
    case.assert_cross_entropy_right(logits, labels, **options)
    first, second = (case.fused(logits, labels, **options) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("terms", [{}, TERMS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 507, 5000])
def test_linear_cross_entropy(num_tokens, dtype, terms, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False)
    inputs = linear_case.random(num_tokens, dtype, vocab=1003, dim=256, device="cuda")
    truth = linear_case.gradients(reference.linear_cross_entropy, *linear_case.in_fp64(inputs), **terms)
    torchs = linear_case.gradients(reference.linear_cross_entropy, *inputs, **terms)
    first, second = (linear_case.gradients(linear_cross_entropy, *inputs, **terms) for _ in range(2))
    assert_right(first, torchs, truth)
    assert all(map(torch.equal, first, second))


def test_no_host_sync():
    hidden = torch.randn(5000, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(1003, 256, device="cuda", requires_grad=True)
    labels = torch.randint(0, 1003, (5000,), device="cuda")
    for _ in range(2):  # the first call compiles
        torch.cuda.set_sync_debug_mode("error" if _ else "default")
        try:
            linear_cross_entropy(hidden, weight, labels, scale=0.5)[0].backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_offsets_beyond_two_to_the_31():
    vocab = 128_256
    logits = torch.zeros(16_800, vocab, dtype=torch.bfloat16, device="cuda")
    labels = torch.full((16_800,), 7, device="cuda")
    logits[-1, 7] = 9.0
    expected = case.fused(logits[-2:], labels[-2:])
    losses = torch.empty(len(labels), device="cuda")
    cross_entropy_in_place(logits, labels, losses, 1.0, None, want_grad=True)
    assert torch.equal(losses[-2:], expected[0])
    assert torch.equal(logits[-2:], expected[1])


def test_a_label_outside_is_nan_and_not_a_wild_read():
    logits, labels = case.random(8, 507, torch.bfloat16, "cuda")
    labels[3], labels[4] = 507, -5
    losses, grad = case.fused(logits, labels)
    assert losses[3:5].isnan().all()
    assert grad[3:5].isnan().all()
    assert losses[[0, 1, 2, 5, 6]].isfinite().all()
