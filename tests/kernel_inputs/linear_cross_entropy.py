"""Inputs and gradients for the tests of the chunked loss: on a CPU, in the interpreter and on a GPU."""

from __future__ import annotations

import torch

D, V = 32, 123


def random(num_tokens, dtype=torch.float32, *, vocab=V, dim=D, device="cpu"):
    """(hidden, weight, labels): a quarter of the rows ignored, the last one confident of its class."""
    generator = torch.Generator().manual_seed(num_tokens)
    hidden = torch.randn(num_tokens, dim, generator=generator)
    weight = torch.randn(vocab, dim, generator=generator) * 0.3
    labels = torch.randint(0, vocab, (num_tokens,), generator=generator)
    labels[::4] = -100
    labels[-1] = 5
    hidden[-1] = 25.0 * weight[5] / weight[5].norm() ** 2
    return hidden.to(device, dtype), weight.to(device, dtype), labels.to(device)


def confident(num_tokens, dtype=torch.float32):
    """Rows whose true class has a probability of about 0.999, where a rounded p - 1 has no correct digit."""
    hidden, weight, _ = random(num_tokens)
    labels = torch.arange(num_tokens) % V
    norm = weight[labels].norm(dim=1, keepdim=True)
    hidden = 0.05 * hidden + weight[labels] / norm * torch.linspace(11.0, 14.0, num_tokens)[:, None] / norm
    return hidden.to(dtype), weight.to(dtype), labels


def sure(dtype, device="cpu"):
    """64 rows with p of the true class from 0.9 to 0.9999."""
    hidden, labels = torch.zeros(64, D), torch.arange(64) % D
    hidden[torch.arange(64), labels] = torch.linspace(7.0, 14.0, 64)
    return hidden.to(device, dtype), torch.eye(V, D).to(device, dtype), labels.to(device)


def gradients(loss_function, hidden, weight, labels, **options):
    """The loss sum and the gradients of `hidden` and `weight`."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    scaled, loss = loss_function(hidden, weight, labels, **options)
    return loss, *torch.autograd.grad(scaled, (hidden, weight))


def in_fp64(tensors):
    return [x.double() if x.is_floating_point() else x for x in tensors]
