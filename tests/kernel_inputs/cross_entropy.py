"""Inputs and gradients for the tests of the cross-entropy of logits, in the interpreter and on a GPU."""

from __future__ import annotations

import torch
from dist_cpt_kernels import cross_entropy, reference

from tests.kernels.error_rule import assert_right

TERMS = [
    {},
    {"z_loss": 1e-3},
    {"label_smoothing": 0.1},
    {"softcap": 30.0},
    {"softcap": 5.0, "z_loss": 1e-2, "label_smoothing": 0.1},
]


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


def gradients(loss, logits, labels, weights, **options):
    """The losses and the gradient of the logits under upstream `weights` [T]."""
    logits = logits.detach().requires_grad_()
    losses = loss(logits, labels, **options)
    (grad,) = torch.autograd.grad(losses, logits, weights.to(losses.dtype))
    return losses.detach(), grad


def assert_cross_entropy_right(logits, labels, **options):
    """The error rule for `cross_entropy`."""
    weights = torch.rand(len(labels), generator=torch.Generator().manual_seed(1)).to(logits.device)
    truth = gradients(reference.cross_entropy, logits.double(), labels, weights, **options)
    torchs = gradients(reference.cross_entropy, logits, labels, weights, **options)
    found = gradients(cross_entropy, logits, labels, weights, **options)
    assert_right(found, torchs, truth)
