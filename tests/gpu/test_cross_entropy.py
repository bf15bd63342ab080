"""The fused losses on a GPU: right by the rule, the same bits twice, no host sync, and labels that lie outside."""

from __future__ import annotations

import pytest
import torch
from dist_cpt_kernels import cross_entropy, dispatch, linear_cross_entropy, reference

from tests.kernels.error_rule import assert_right

pytestmark = pytest.mark.gpu
ALL_TERMS = {"softcap": 30.0, "z_loss": 1e-3, "label_smoothing": 0.1}


def _logits(num_tokens, vocab, dtype, confident):
    generator = torch.Generator("cuda").manual_seed(vocab)
    logits = 3 * torch.randn(num_tokens, vocab, generator=generator, device="cuda")
    labels = torch.randint(0, vocab, (num_tokens,), generator=generator, device="cuda")
    if confident:
        logits[torch.arange(num_tokens), labels] = torch.linspace(15.0, 30.0, num_tokens, device="cuda")
    labels[::7] = -100
    return logits.to(dtype), labels


def _loss_grads(loss, logits, labels, **options):
    logits = logits.detach().requires_grad_()
    losses = loss(logits, labels, **options)
    weights = torch.linspace(0.5, 1.5, len(labels), device="cuda").to(losses.dtype)
    return losses.detach(), *torch.autograd.grad(losses, logits, weights)


def _linear_grads(loss, hidden, weight, labels, **options):
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    scaled, total = loss(hidden, weight, labels, **options)
    return total, *torch.autograd.grad(scaled, (hidden, weight))


@pytest.mark.parametrize("terms", [{}, ALL_TERMS])
@pytest.mark.parametrize("confident", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_tokens", "vocab"), [(1, 123), (123, 507), (64, 128_256), (17, 256_000)])
def test_cross_entropy(num_tokens, vocab, dtype, confident, terms):
    assert not dispatch.INTERPRETED, "run with TRITON_INTERPRET=0"
    logits, labels = _logits(num_tokens, vocab, dtype, confident)
    truth = _loss_grads(reference.cross_entropy, logits.double(), labels, scale=0.3, **terms)
    torchs = _loss_grads(reference.cross_entropy, logits, labels, scale=0.3, **terms)
    found = _loss_grads(cross_entropy, logits, labels, scale=0.3, **terms)
    assert_right(found, torchs, truth)
    assert all(map(torch.equal, found, _loss_grads(cross_entropy, logits, labels, scale=0.3, **terms)))
    owned = _loss_grads(
        lambda x, y, **options: cross_entropy(x * 1, y, overwrite_logits=True, **options),
        logits, labels, scale=0.3, **terms,
    )  # fmt: skip
    assert all(map(torch.equal, found, owned))


@pytest.mark.parametrize("terms", [{}, ALL_TERMS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 507, 5000])
def test_linear_cross_entropy(num_tokens, dtype, terms, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False)
    generator = torch.Generator("cuda").manual_seed(num_tokens)
    hidden = torch.randn(num_tokens, 256, generator=generator, device="cuda").to(dtype)
    weight = (0.1 * torch.randn(1003, 256, generator=generator, device="cuda")).to(dtype)
    labels = torch.randint(0, 1003, (num_tokens,), generator=generator, device="cuda")
    labels[1::5] = -100
    truth = _linear_grads(reference.linear_cross_entropy, hidden.double(), weight.double(), labels, **terms)
    torchs = _linear_grads(reference.linear_cross_entropy, hidden, weight, labels, **terms)
    found = _linear_grads(linear_cross_entropy, hidden, weight, labels, **terms)
    assert_right(found, torchs, truth)
    assert all(map(torch.equal, found, _linear_grads(linear_cross_entropy, hidden, weight, labels, **terms)))


def test_no_host_sync():
    hidden = torch.randn(5000, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(1003, 256, device="cuda", requires_grad=True)
    labels = torch.randint(0, 1003, (5000,), device="cuda")
    scale = torch.tensor(0.5, device="cuda")
    for _ in range(2):  # the first call compiles
        torch.cuda.set_sync_debug_mode("error" if _ else "default")
        try:
            linear_cross_entropy(hidden, weight, labels, scale=scale)[0].backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_offsets_beyond_two_to_the_31():
    vocab = 128_256
    logits = torch.zeros(16_800, vocab, dtype=torch.bfloat16, device="cuda")
    labels = torch.full((16_800,), 7, device="cuda")
    logits[-1, 7] = 9.0
    small = logits[-2:].clone()
    expected = _loss_grads(cross_entropy, small, labels[-2:])[0]
    assert torch.equal(cross_entropy(logits, labels)[-2:], expected)


def test_a_label_outside_is_nan_and_not_a_wild_read():
    logits, labels = _logits(8, 507, torch.bfloat16, False)
    labels[3], labels[4] = 507, -5
    losses, grad = _loss_grads(cross_entropy, logits, labels)
    assert losses[3:5].isnan().all()
    assert grad[3:5].isnan().all()
    assert losses[[1, 2, 5, 6]].isfinite().all()
