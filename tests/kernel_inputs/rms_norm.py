"""Inputs and gradients for the tests of RMSNorm, in the interpreter and on a GPU."""

from __future__ import annotations

import torch
from dist_cpt_kernels import add_rms_norm, reference, rms_norm

from tests.kernels.error_rule import assert_right

CASTINGS = ("llama", "gemma")
EPS = 1e-6


def inputs(num_rows, dim, dtype, weight_dtype=None, size=1.0, device="cpu"):
    """(x, residual, weight, gradient of the normalised rows, gradient of the sum)."""
    generator = torch.Generator().manual_seed(num_rows + dim)
    x, residual, grad, grad_total = (torch.randn(num_rows, dim, generator=generator) for _ in range(4))
    weight = 1 + 0.3 * torch.randn(dim, generator=generator)
    tensors = [size * x, size * residual, weight, grad, grad_total]
    return [t.to(device, weight_dtype if t is weight and weight_dtype else dtype) for t in tensors]


def alone(op, x, residual, weight, grad, grad_total, **options):
    """Output of `rms_norm` and its gradients."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    out = op(x, weight, EPS, **options)
    return out.detach(), *torch.autograd.grad(out, (x, weight), grad)


def added(op, x, residual, weight, grad, grad_total, **options):
    """Outputs of `add_rms_norm` and its gradients."""
    leaves = [t.detach().requires_grad_() for t in (x, residual, weight)]
    outs = op(*leaves, EPS, **options)
    return *(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, (grad, grad_total))


def assert_both_right(given, casting):
    """The error rule for both ops."""
    doubles = [t.double() for t in given]
    for run, ours, spec in ((alone, rms_norm, reference.rms_norm), (added, add_rms_norm, reference.add_rms_norm)):
        truth = run(spec, *doubles, casting=casting)
        torchs = run(spec, *given, casting=casting)
        assert_right(run(ours, *given, casting=casting), torchs, truth)
