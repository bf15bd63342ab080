"""Optimizer state for the tests of multi-tensor AdamW, in the interpreter and on a GPU."""

from __future__ import annotations

import torch
from dist_cpt_kernels.adamw import PIECE, bias_corrections

SIZES = (1, 123, PIECE, PIECE + 507, 0)
HYPER = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def state(sizes=SIZES, first=False, device="cpu"):
    """(params, grads, exp_avgs, exp_avg_sqs) with the magnitudes of training; zero moments for the `first` step."""
    generator = torch.Generator().manual_seed(len(sizes))
    params = [torch.randn(n, generator=generator) * 0.02 for n in sizes]
    grads = [torch.randn(n, generator=generator) * 1e-3 for n in sizes]
    exp_avgs = [torch.randn(n, generator=generator) * (0.0 if first else 1e-4) for n in sizes]
    exp_avg_sqs = [torch.rand(n, generator=generator) * (0.0 if first else 1e-6) for n in sizes]
    return [[tensor.to(device) for tensor in tensors] for tensors in (params, grads, exp_avgs, exp_avg_sqs)]


def update(step, device="cpu"):
    """The options of update number `step`, which is neither clipped nor skipped."""
    number, factor, skip = (torch.full((), float(value), device=device) for value in (step, 1, 0))
    return {"corrections": bias_corrections(number, HYPER["betas"]), "grad_factor": factor, "skip": skip, **HYPER}


def torch_fused(params, grads, exp_avgs, exp_avg_sqs, step, hyper):
    """torch's fused AdamW, in place."""
    torch._fused_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        [torch.full((), float(step), device=params[0].device) for _ in params],
        lr=hyper["lr"],
        beta1=hyper["betas"][0],
        beta2=hyper["betas"][1],
        weight_decay=hyper["weight_decay"],
        eps=hyper["eps"],
        amsgrad=False,
        maximize=False,
    )
