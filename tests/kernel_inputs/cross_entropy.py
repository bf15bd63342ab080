"""Inputs and gradients for the tests of the cross-entropy of logits, in the interpreter and on a GPU."""

from __future__ import annotations

import torch
from dist_cpt_kernels import reference
from dist_cpt_kernels.cross_entropy import cross_entropy_in_place

from tests.kernels.error_rule import assert_right

SOFTCAPS = [None, 30.0, 5.0]


def random(num_tokens, vocab, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(num_tokens + vocab)
    logits = 3 * torch.randn(num_tokens, vocab, generator=generator)
    labels = torch.randint(0, vocab, (num_tokens,), generator=generator)
    labels[1::3] = -100
    return logits.to(device, dtype), labels.to(device)


def confident(num_tokens, vocab, dtype=torch.float32, device="cpu"):
    """p of the true class from 0.9 to 1 - 1e-10."""
    logits, _ = random(num_tokens, vocab)
    labels = torch.arange(num_tokens) % vocab
    logits[torch.arange(num_tokens), labels] = torch.linspace(15.0, 35.0, num_tokens)
    return logits.to(device, dtype), labels.to(device)


def huge(num_tokens, vocab, dtype=torch.float32):
    logits, labels = random(num_tokens, vocab)
    return (1e4 * logits).to(dtype), labels


def specified(logits, labels, scale=1.0, softcap=None):
    """The losses [T], and scale * the gradient of their sum."""
    logits = logits.detach().requires_grad_()
    losses = reference.cross_entropy(logits, labels, softcap=softcap)
    return losses.detach(), torch.autograd.grad(losses, logits, torch.full_like(losses, scale))[0]


def fused(logits, labels, scale=1.0, softcap=None):
    """The same of the kernel; the losses are the same bits without a gradient, and the logits then unchanged."""
    grad, losses, alone = logits.clone(), *(torch.empty(len(labels), device=logits.device) for _ in range(2))
    cross_entropy_in_place(grad, labels, alone, scale, softcap, want_grad=False)
    assert torch.equal(grad.nan_to_num(), logits.nan_to_num())
    cross_entropy_in_place(grad, labels, losses, scale, softcap, want_grad=True)
    assert torch.equal(losses.nan_to_num(), alone.nan_to_num())
    return losses, grad


def assert_cross_entropy_right(logits, labels, **options):
    """The error rule for the kernel."""
    truth = specified(logits.double(), labels, **options)
    assert_right(fused(logits, labels, **options), specified(logits, labels, **options), truth)
