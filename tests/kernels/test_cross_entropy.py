"""The kernel of one chunk against fp64: random and confident logits, softcaps, extremes, a large vocabulary."""

from __future__ import annotations

import pytest
import torch
from dist_cpt_kernels.cross_entropy import BLOCK, cross_entropy_in_place, cross_entropy_kernel

from tests.kernel_inputs import cross_entropy as case


@pytest.mark.parametrize("softcap", case.SOFTCAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [case.random, case.confident, case.huge])
def test_error_is_at_most_twice_that_of_torch(make, dtype, softcap):
    for num_tokens, vocab in ((1, 1), (13, 123), (17, 507)):
        case.assert_cross_entropy_right(*make(num_tokens, vocab, dtype), scale=0.37, softcap=softcap)


@pytest.mark.parametrize("vocab", [BLOCK - 1, BLOCK, 2 * BLOCK + 5])
def test_rows_of_more_than_one_block(vocab):
    for make in (case.random, case.confident):
        case.assert_cross_entropy_right(*make(3, vocab), softcap=5.0)


def test_a_vocabulary_of_256k():
    case.assert_cross_entropy_right(*case.random(2, 256_000, torch.bfloat16))


def test_true_class_keeps_its_digits():
    """p - 1 is about -1e-10 here: in fp32, p itself is 1 and nothing is left of the difference."""
    logits, labels = case.confident(64, 123)
    losses, grad = case.fused(logits, labels)
    others = (logits - logits.gather(1, labels[:, None])).double().scatter(1, labels[:, None], -torch.inf).exp().sum(1)
    exact = (-others / (1 + others))[:, None]
    relative = (grad.gather(1, labels[:, None]).double() - exact).abs() / exact.abs()
    assert float(exact.abs().min()) < 1e-9
    assert float(relative.max()) < 1e-6
    torch.testing.assert_close(losses.double(), others.log1p(), rtol=1e-6, atol=0.0)


def test_a_saturated_softcap_keeps_its_slope():
    """1 - tanh(8)^2 is 4.5e-7: of the difference, fp32 has two digits left."""
    logits = torch.tensor([[8.0, -8.0, 6.0, -7.0]])
    actual = case.fused(logits, torch.tensor([1]), softcap=1.0)[1]
    exact = case.specified(logits.double(), torch.tensor([1]), softcap=1.0)[1]
    torch.testing.assert_close(actual.double(), exact, rtol=2e-6, atol=0.0)


def test_offsets_beyond_two_to_the_31(number_programs_from):
    """The last three rows of more than 2^31 logits, of which only these rows touch memory."""
    vocab = 123
    num_tokens = 2**31 // vocab + 3
    small, small_labels = case.random(3, vocab, torch.bfloat16)
    logits, labels = (torch.empty(num_tokens, *x.shape[1:], dtype=x.dtype) for x in (small, small_labels))
    logits[-3:], labels[-3:] = small, small_labels
    losses, expected = torch.empty(num_tokens), torch.empty(3)
    cross_entropy_in_place(small, small_labels, expected, 0.3, None, True)
    number_programs_from(num_tokens - 3)
    cross_entropy_kernel[(3,)](
        logits, labels, losses, vocab, -100, 0.3, 1.0, 1.0, WANT_GRAD=True, SOFTCAP=False, BLOCK=BLOCK
    )  # fmt: skip
    assert torch.equal(losses[-3:], expected)
    assert torch.equal(logits[-3:], small)


def test_ignored_rows_are_not_read_and_get_zeros():
    logits, labels = case.random(4, 123)
    logits[labels == -100] = float("nan")
    losses, grad = case.fused(logits, labels)
    assert not losses[labels == -100].any()
    assert not grad[labels == -100].any()
    assert losses[labels != -100].isfinite().all()


def test_all_ignored_and_empty():
    logits, labels = case.random(4, 123)
    losses, grad = case.fused(logits, torch.full_like(labels, -100))
    assert not losses.any()
    assert not grad.any()
    losses, grad = case.fused(logits[:0], labels[:0])
    assert losses.shape == (0,)
    assert grad.shape == (0, 123)


def test_a_masked_vocabulary():
    """-inf in places, also in a whole first block."""
    logits, labels = case.random(3, BLOCK + 123)
    logits[:, : BLOCK + 3] = float("-inf")
    labels = torch.tensor([BLOCK + 5, 4, BLOCK + 9])
    losses, grad = case.fused(logits, labels)
    exact = case.specified(logits.double(), labels)
    torch.testing.assert_close(losses.double(), exact[0])
    torch.testing.assert_close(grad.double(), exact[1], rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad):
    for column in (0, 60, 122):
        logits, _ = case.random(3, 123)
        labels = torch.tensor([3, 60, 60])
        logits[1, column] = bad
        losses, grad = case.fused(logits, labels)
        assert not losses[1].isfinite()
        assert not grad[1].isfinite().all()
        assert losses[[0, 2]].isfinite().all()
        assert grad[[0, 2]].isfinite().all()
