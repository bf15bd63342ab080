"""Inputs and gradients for the tests of RoPE, in the interpreter and on a GPU."""

from __future__ import annotations

import torch
from dist_cpt_kernels import rope_tables

NUM_POSITIONS = 40


def tables(half, device="cpu"):
    return [table.to(device) for table in rope_tables(10000.0 ** -(torch.arange(half) / half), NUM_POSITIONS)]


def inputs(batch, length, num_heads, num_k_heads, head_dim, dtype=torch.float32, device="cpu"):
    """(q, k, position_ids, gradients of both)."""
    generator = torch.Generator().manual_seed(length + num_heads + head_dim)
    shapes = [(batch, length, heads, head_dim) for heads in (num_heads, num_k_heads)]
    q, k, dq, dk = (torch.randn(shape, generator=generator).to(dtype) for shape in (*shapes, *shapes))
    positions = torch.randint(0, NUM_POSITIONS, (batch, length), generator=generator)
    return [x.to(device) for x in (q, k, positions, dq, dk)]


def gradients(op, q, k, tables, positions, dq, dk):
    """Both outputs of `op` and the gradients of `q` and `k`."""
    leaves = q.detach().requires_grad_(), k.detach().requires_grad_()
    outs = op(*leaves, *tables, positions)
    return *(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, (dq, dk))
