"""Inputs and gradients for the tests of gated activations, in the interpreter and on a GPU."""

from __future__ import annotations

import torch
from dist_cpt_kernels import gated, reference

from tests.kernels.error_rule import assert_right


def inputs(shape, dtype=torch.float32, size=1.0, device="cpu"):
    """(gate, up, upstream gradient)."""
    generator = torch.Generator().manual_seed(sum(shape))
    return [(scale * torch.randn(shape, generator=generator)).to(device, dtype) for scale in (3 * size, size, 1.0)]


def gradients(op, gate, up, grad, activation):
    """The output of `op` and the gradients of `gate` and `up`."""
    leaves = gate.detach().requires_grad_(), up.detach().requires_grad_()
    out = op(*leaves, activation)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def assert_gated_right(gate, up, grad, activation):
    """The error rule for `gated`."""
    truth = gradients(reference.gated, gate.double(), up.double(), grad.double(), activation)
    torchs = gradients(reference.gated, gate, up, grad, activation)
    assert_right(gradients(gated, gate, up, grad, activation), torchs, truth)
