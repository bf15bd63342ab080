"""Rows of a table by token id, and the gradient of the table: sorted, summed in fp32, the same bits every time.

T tokens, V vocab, D model, S tokens of one tile.

The ids are sorted (stable), so equal ids lie in one run. A first kernel sums each run within a tile of S sorted
tokens; a run that crosses tiles leaves one partial sum in each, and a second kernel adds those in order. One
frequent token is thus spread over many programs, and no sum depends on which program came first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from dist_cpt_kernels import reference
from dist_cpt_kernels.dispatch import available, jit, tl
from dist_cpt_kernels.rounding import rounded

TILE_TOKENS = 32
BLOCK = 512  # columns of one program
NUM_WARPS = 2


class RowGradient(NamedTuple):
    """The rows of a table's gradient that are not zero; entries from `num_rows` on are padding."""

    ids: torch.Tensor  # int64 [T], ascending, -1 as padding
    rows: torch.Tensor  # fp32 [T, D], 0 as padding
    num_rows: torch.Tensor  # int64 [], on the device: reading it is a host sync


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

    Summed in fp32 in the order of the tokens, rounded once. Any strides; made contiguous.
    """
    grad, ids = grad.reshape(-1, grad.shape[-1]), ids.flatten()
    if not _can_fuse(grad):
        return reference.embedding_gradient(grad, ids, num_embeddings, dtype=dtype, padding_idx=padding_idx)
    places, order = torch.sort(ids, stable=True)
    if padding_idx is not None:
        places = torch.where(places == padding_idx, -1, places)
    out = torch.zeros((num_embeddings, grad.shape[1]), dtype=dtype, device=grad.device)
    _sum_runs(grad, order, places, out)
    return out


def embedding_gradient_rows(grad: torch.Tensor, ids: torch.Tensor, *, padding_idx: int | None = None) -> RowGradient:
    """As `embedding_gradient`, but only the rows that occur: T of them at most, never [V, D]. No host sync."""
    grad, ids = grad.reshape(-1, grad.shape[-1]), ids.flatten()
    sorted_ids, order = torch.sort(ids, stable=True)
    starts = torch.ones_like(sorted_ids)
    starts[1:] = sorted_ids[1:] != sorted_ids[:-1]
    if padding_idx is not None:
        starts[sorted_ids == padding_idx] = 0
    places = starts.cumsum(0) - 1
    if padding_idx is not None:
        places = torch.where(sorted_ids == padding_idx, -1, places)
    spare = places.where(places >= 0, len(ids))  # one more entry takes the padding id, and is cut off
    row_ids = ids.new_full((len(ids) + 1,), -1).scatter_(0, spare, sorted_ids)[:-1]
    rows = torch.zeros(grad.shape, dtype=torch.float32, device=grad.device)
    if _can_fuse(grad):
        _sum_runs(grad, order, places, rows)
    else:
        kept = (places >= 0).unsqueeze(1)
        rows.index_add_(0, places.clamp_min(0), torch.where(kept, grad[order].float(), 0.0))
    return RowGradient(row_ids, rows, starts.sum())


def _can_fuse(grad: torch.Tensor) -> bool:
    return available(grad) and grad.dtype in (torch.bfloat16, torch.float16, torch.float32)


def _sum_runs(grad: torch.Tensor, order: torch.Tensor, places: torch.Tensor, out: torch.Tensor) -> None:
    """out[p] = sum of grad[order[i]] over the run of `places` equal to p; a negative place is left out."""
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
    """Sum the runs of one tile: a whole run to `out`, one that came in to parts[0], one that goes on to parts[1]."""
    tile = tl.program_id(0).to(tl.int64)
    num_tiles = tl.num_programs(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < dim
    first = tile * TILE_TOKENS
    end = tl.minimum(first + TILE_TOKENS, num_tokens)
    place = tl.load(places_ptr + first)
    before = tl.load(places_ptr + first - 1, mask=first > 0, other=-2)
    came_in, began_here = before == place, before != place
    total = tl.zeros([BLOCK], tl.float32)
    for token in range(first, end):
        source = tl.load(order_ptr + token)
        total += tl.load(grad_ptr + source * dim + column, mask=inside, other=0.0).to(tl.float32)
        following = tl.load(places_ptr + token + 1, mask=token + 1 < num_tokens, other=-2)
        goes_on, ends = following == place, following != place
        last = token + 1 == end
        # masks, not branches: Triton 3.6 fails to compile these stores behind an `if` in a loop
        came = column < tl.where(came_in & (last | ends), dim, 0)
        tl.store(parts_ptr + tile * dim + column, total, mask=came)
        leaves = column < tl.where(began_here & goes_on & last, dim, 0)
        tl.store(parts_ptr + (num_tiles + tile) * dim + column, total, mask=leaves)
        whole = column < tl.where(began_here & ends & (place >= 0), dim, 0)
        tl.store(out_ptr + place * dim + column, rounded(total, out_ptr.dtype.element_ty), mask=whole)
        total = tl.where(goes_on, total, 0.0)
        came_in, began_here = came_in & goes_on, began_here | ends
        place = following


@jit
def join_runs_kernel(places_ptr, out_ptr, parts_ptr, num_tokens, dim, TILE_TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """Where a run begins in this tile and goes on in the next: add its parts in order."""
    tile = tl.program_id(0).to(tl.int64)
    num_tiles = tl.num_programs(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < dim
    first = tile * TILE_TOKENS
    token = first + TILE_TOKENS
    place = tl.load(places_ptr + token - 1, mask=token < num_tokens, other=-1)
    goes_on = tl.load(places_ptr + token, mask=token < num_tokens, other=-2) == place
    began_here = tl.load(places_ptr + first - 1, mask=first > 0, other=-2) != place
    goes_on = goes_on & began_here & (place >= 0)
    begins = column < tl.where(goes_on, dim, 0)
    end = tile + 1
    while goes_on:  # scalars alone: Triton 3.6 fails to compile a `while` that carries a block
        end += 1
        # the next tile's first token alone says whether the run came into it
        token = end * TILE_TOKENS
        goes_on = tl.load(places_ptr + token, mask=token < num_tokens, other=-2) == place
    total = tl.load(parts_ptr + (num_tiles + tile) * dim + column, mask=begins, other=0.0)
    for part in range(tile + 1, end):
        total += tl.load(parts_ptr + part * dim + column, mask=inside, other=0.0)
    tl.store(out_ptr + place * dim + column, rounded(total, out_ptr.dtype.element_ty), mask=begins)
