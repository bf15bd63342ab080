"""Embedding lookup, and the gradient of the table: sorted, summed in fp32, deterministic.

T tokens, V vocab, D model.

The ids are sorted (stably), so that equal ids form one run. A first kernel sums each run within a tile of sorted
tokens; a run that crosses tiles leaves a partial sum in each, and a second kernel adds these in order. A frequent
token is thus spread over many programs, and no sum depends on the order in which programs run.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from dist_cpt_kernels import reference
from dist_cpt_kernels.dispatch import can_fuse, jit, tl
from dist_cpt_kernels.rounding import rounded

TILE_TOKENS = 32
BLOCK = 512  # columns per program
NUM_WARPS = 2


def embedding(ids: torch.Tensor, weight: torch.Tensor, *, padding_idx: int | None = None) -> torch.Tensor:
    """weight[ids], [..., D] for `ids` int64 [...] and `weight` [V, D]; `padding_idx` gets no gradient.

    The gradient is summed in fp32 and rounded once to the weight's dtype. An id outside [0, V) is an error of
    torch's own gather.
    """
    return _Embedding.apply(ids, weight, padding_idx)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: torch.Tensor, weight: torch.Tensor, padding_idx: int | None) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.num_embeddings, ctx.dtype, ctx.padding_idx = weight.shape[0], weight.dtype, padding_idx
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[None, torch.Tensor, None]:
        (ids,) = ctx.saved_tensors
        grad = embedding_gradient(
            grad_outputs[0], ids, ctx.num_embeddings, dtype=ctx.dtype, padding_idx=ctx.padding_idx
        )
        return None, grad, None


def embedding_gradient(
    grad: torch.Tensor,
    ids: torch.Tensor,
    num_embeddings: int,
    *,
    dtype: torch.dtype = torch.float32,
    padding_idx: int | None = None,
) -> torch.Tensor:
    """The dense gradient [V, D] in `dtype` from `grad` [..., D] of the gathered rows and `ids` int64 [...].

    Summed in fp32 in the order of the tokens, rounded once.
    """
    grad, ids = grad.reshape(-1, grad.shape[-1]), ids.flatten()
    if not can_fuse(grad):
        return reference.embedding_gradient(grad, ids, num_embeddings, dtype=dtype, padding_idx=padding_idx)
    places, order = torch.sort(ids, stable=True)
    if padding_idx is not None:
        places = torch.where(places == padding_idx, -1, places)
    out = torch.zeros((num_embeddings, grad.shape[1]), dtype=dtype, device=grad.device)
    _sum_runs(grad, order, places, out)
    return out


def _sum_runs(grad: torch.Tensor, order: torch.Tensor, places: torch.Tensor, out: torch.Tensor) -> None:
    """out[p] = sum of grad[order[i]] over the run of `places` equal to p; negative places are skipped."""
    num_tokens, dim = grad.shape
    if not grad.numel():
        return
    grad = grad.contiguous()
    num_tiles = -(-num_tokens // TILE_TOKENS)
    parts = torch.empty((2, num_tiles, dim), dtype=torch.float32, device=grad.device)
    grid = (num_tiles, -(-dim // BLOCK))
    sum_runs_kernel[grid](
        grad, order, places, out, parts, num_tokens, dim, TILE_TOKENS=TILE_TOKENS, BLOCK=BLOCK, num_warps=NUM_WARPS
    )
    join_runs_kernel[grid](
        places, out, parts, num_tokens, dim, TILE_TOKENS=TILE_TOKENS, BLOCK=BLOCK, num_warps=NUM_WARPS
    )


@jit
def sum_runs_kernel(
    grad_ptr, order_ptr, places_ptr, out_ptr, parts_ptr, num_tokens, dim, TILE_TOKENS: tl.constexpr, BLOCK: tl.constexpr
):
    """Sum the runs of one tile: whole ones to `out`, one of the previous tile to parts[0], an open one to parts[1]."""
    tile = tl.program_id(0).to(tl.int64)
    num_tiles = tl.num_programs(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < dim
    first = tile * TILE_TOKENS
    end = tl.minimum(first + TILE_TOKENS, num_tokens)
    place = tl.load(places_ptr + first)
    before = tl.load(places_ptr + first - 1, mask=first > 0, other=-2)
    carried_in, starts_here = before == place, before != place
    total = tl.zeros([BLOCK], tl.float32)
    for token in range(first, end):
        source = tl.load(order_ptr + token)
        total += tl.load(grad_ptr + source * dim + column, mask=inside, other=0.0).to(tl.float32)
        following = tl.load(places_ptr + token + 1, mask=token + 1 < num_tokens, other=-2)
        continues, ends = following == place, following != place
        last = token + 1 == end
        # masks, not branches: Triton 3.6 cannot compile these stores behind an `if` in a loop
        carried = column < tl.where(carried_in & (last | ends), dim, 0)
        tl.store(parts_ptr + tile * dim + column, total, mask=carried)
        carried_out = column < tl.where(starts_here & continues & last, dim, 0)
        tl.store(parts_ptr + (num_tiles + tile) * dim + column, total, mask=carried_out)
        whole = column < tl.where(starts_here & ends & (place >= 0), dim, 0)
        tl.store(out_ptr + place * dim + column, rounded(total, out_ptr.dtype.element_ty), mask=whole)
        total = tl.where(continues, total, 0.0)
        carried_in, starts_here = carried_in & continues, starts_here | ends
        place = following


@jit
def join_runs_kernel(places_ptr, out_ptr, parts_ptr, num_tokens, dim, TILE_TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """Add the partial sums, in order, of a run that starts in this tile and continues in the next."""
    tile = tl.program_id(0).to(tl.int64)
    num_tiles = tl.num_programs(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < dim
    first = tile * TILE_TOKENS
    token = first + TILE_TOKENS
    place = tl.load(places_ptr + token - 1, mask=token < num_tokens, other=-1)
    continues = tl.load(places_ptr + token, mask=token < num_tokens, other=-2) == place
    starts_here = tl.load(places_ptr + first - 1, mask=first > 0, other=-2) != place
    continues = continues & starts_here & (place >= 0)
    begins = column < tl.where(continues, dim, 0)
    end = tile + 1
    while continues:  # scalars only: Triton 3.6 cannot compile a `while` that carries a block
        end += 1
        # the run continues into the next tile if that tile's first token belongs to it
        token = end * TILE_TOKENS
        continues = tl.load(places_ptr + token, mask=token < num_tokens, other=-2) == place
    total = tl.load(parts_ptr + (num_tiles + tile) * dim + column, mask=begins, other=0.0)
    for part in range(tile + 1, end):
        total += tl.load(parts_ptr + part * dim + column, mask=inside, other=0.0)
    tl.store(out_ptr + place * dim + column, rounded(total, out_ptr.dtype.element_ty), mask=begins)
