"""Inputs, outputs and gradients for the tests of packed attention, on a CPU and on a GPU."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from dist_cpt.model.attention import packed_attention, packing_arguments

SCALE = 0.4


def inputs(dtype, size=1.0, *, heads=4, kv_heads=2, width=16, length=123, batch=2, device="cpu"):
    """(query, key, value, gradient of the output), each [B, heads, L, N] as a view of [B, L, heads, N]."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, width), (kv_heads, width), (kv_heads, width), (heads, width))
    made = [torch.randn(batch, length, *shape, generator=generator).to(device).transpose(1, 2) for shape in shapes]
    return [(size * x).to(dtype) for x in made[:2]] + [x.to(dtype) for x in made[2:]]


def run(choice, documents, query, key, value, d_out, **options):
    """Output and gradients; no gradients where the implementation has none on a CPU."""
    cu_seqlens = torch.tensor([0, *documents], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    positions = torch.zeros(query.shape[0], query.shape[2], device=query.device)
    packing = packing_arguments(choice, positions, cu_seqlens.to(query.device), max(documents))["packing"]
    backward = choice != "flex" or query.is_cuda
    leaves = [x.detach().requires_grad_(backward) for x in (query, key, value)]
    out, _ = packed_attention(torch.nn.Identity(), *leaves, None, packing=packing, scaling=SCALE, **options)
    if not backward:
        return [out]
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out.transpose(1, 2))]


def plain(documents, query, key, value, d_out, sliding_window=None, softcap=None):
    """Each document alone under a dense mask: torch's own attention; with a softcap or in fp64, all scores."""
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    groups = query.shape[1] // key.shape[1]
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (leaves[0], *(x.repeat_interleave(groups, 1) for x in leaves[1:]))]
    outs = []
    for q, k, v in zip(*(x.split(documents) for x in flat), strict=True):
        mask = torch.ones(len(q), len(q), dtype=torch.bool, device=q.device).tril()
        mask = mask if sliding_window is None else mask.triu(1 - sliding_window)
        if softcap is None and q.dtype != torch.float64:
            heads = (x.transpose(0, 1)[None] for x in (q, k, v))
            outs.append(F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=SCALE)[0].transpose(0, 1))
            continue
        scores = torch.einsum("qhn,khn->hqk", q, k) * SCALE
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.masked_fill(~mask, -math.inf).softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
        outs.append(torch.einsum("hqk,khn->qhn", weights.to(q.dtype), v))
    out = torch.cat(outs).unflatten(0, (query.shape[0], query.shape[2]))
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out.transpose(1, 2))]
