"""AdamW over many tensors whose moments are stored in 8 bit, in one launch: read, updated and stored again.

One program takes whole blocks of QUANTISATION_BLOCK elements, so that the new scales are its own. Codes are the exact
nearest entries, by binary search over the borders between them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dist_cpt_kernels import reference
from dist_cpt_kernels.adamw import PIECE, _address, _Launch, _piece
from dist_cpt_kernels.dispatch import available, jit, tl
from dist_cpt_kernels.rounding import rounded

ROWS = 4  # blocks per iteration
NUM_WARPS = 8


def adamw_8bit_(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    exp_avg_sqs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    tables: torch.Tensor,
    *,
    corrections: tuple[torch.Tensor, torch.Tensor],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_factor: torch.Tensor,
    skip: torch.Tensor,
    copies: Sequence[torch.Tensor] | None = None,
) -> None:
    """`adamw_` with moments given as (uint8 codes [n], fp32 scales, one per block); updated in place.

    `tables` fp32 [4, 256] are the ascending entries of exp_avg and of exp_avg_sq, then the 255 borders between the
    codes of each, followed by infinity.
    Source: Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861).
    """
    if not params:
        return
    step_size, denominator = (lr / corrections[0]).float(), corrections[1]
    decay = 1 - lr * weight_decay
    if not available(params[0]):
        moments = [
            [
                reference.dequantize_8bit(codes, scales, tables[kind]).view_as(param)
                for (codes, scales), param in zip(packed, params, strict=True)
            ]
            for kind, packed in enumerate((exp_avgs, exp_avg_sqs))
        ]
        reference.adamw_(
            params, grads, *moments, copies=copies or (), step_size=step_size, denominator=denominator, decay=decay,
            betas=betas, eps=eps, grad_factor=grad_factor, skip=skip,
        )  # fmt: skip
        for kind, packed in enumerate((exp_avgs, exp_avg_sqs)):
            for (codes, scales), values in zip(packed, moments[kind], strict=True):
                reference.quantize_8bit_(values.view(-1), codes, scales, tables[2 + kind, :-1].contiguous())
        return
    packed = [[part[i] for part in kind] for kind in (exp_avgs, exp_avg_sqs) for i in (0, 1)]
    launch = _Launch([list(params), list(grads), *packed, list(copies or ())])
    if launch.num_pieces:
        adamw_8bit_kernel[(launch.num_pieces,)](
            launch.addresses,
            launch.pieces,
            len(params),
            grads[0],
            copies[0] if copies else None,
            tables,
            grad_factor,
            skip,
            step_size,
            denominator,
            decay,
            1 - betas[0],
            betas[1],
            1 - betas[1],
            eps,
            reference.SMALLEST_SCALE,
            ALIGNED=launch.aligned,
            PIECE=PIECE,
            ROWS=ROWS,
            BLOCK=reference.QUANTISATION_BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )


@jit
def adamw_8bit_kernel(
    addresses_ptr, pieces_ptr, num_tensors, grad_like, copy_like, tables_ptr, grad_factor_ptr, skip_ptr, step_size_ptr,
    denominator_ptr, decay, weight1, beta2, weight2, eps, smallest,
    ALIGNED: tl.constexpr, PIECE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program updates one piece of one tensor, ROWS blocks at a time."""
    if tl.load(skip_ptr) != 0:
        return
    factor, step_size, denominator = tl.load(grad_factor_ptr), tl.load(step_size_ptr), tl.load(denominator_ptr)
    tensor, start, count = _piece(pieces_ptr)
    param_ptr = _address(addresses_ptr + tensor, start, tl.pointer_type(tl.float32), ALIGNED)
    grad_ptr = _address(addresses_ptr + num_tensors + tensor, start, grad_like.dtype, ALIGNED)
    m_codes_ptr = _address(addresses_ptr + 2 * num_tensors + tensor, start, tl.pointer_type(tl.uint8), ALIGNED)
    m_scales_ptr = _address(
        addresses_ptr + 3 * num_tensors + tensor, start // BLOCK, tl.pointer_type(tl.float32), ALIGNED
    )
    v_codes_ptr = _address(addresses_ptr + 4 * num_tensors + tensor, start, tl.pointer_type(tl.uint8), ALIGNED)
    v_scales_ptr = _address(
        addresses_ptr + 5 * num_tensors + tensor, start // BLOCK, tl.pointer_type(tl.float32), ALIGNED
    )
    copy_ptr = None
    if copy_like is not None:
        copy_ptr = _address(addresses_ptr + 6 * num_tensors + tensor, start, copy_like.dtype, ALIGNED)
    whole = tl.where(count == PIECE, count, 0)  # without masks, loads are vectorised
    for first in range(0, whole, ROWS * BLOCK):
        rows = first // BLOCK + tl.arange(0, ROWS)
        _update_blocks(
            param_ptr, grad_ptr, m_codes_ptr, m_scales_ptr, v_codes_ptr, v_scales_ptr, copy_ptr, tables_ptr, rows,
            None, factor, step_size, denominator, decay, weight1, beta2, weight2, eps, smallest, BLOCK,
        )  # fmt: skip
    for first in range(whole, count, ROWS * BLOCK):
        rows = first // BLOCK + tl.arange(0, ROWS)
        _update_blocks(
            param_ptr, grad_ptr, m_codes_ptr, m_scales_ptr, v_codes_ptr, v_scales_ptr, copy_ptr, tables_ptr, rows,
            count, factor, step_size, denominator, decay, weight1, beta2, weight2, eps, smallest, BLOCK,
        )  # fmt: skip


@jit
def _update_blocks(
    param_ptr, grad_ptr, m_codes_ptr, m_scales_ptr, v_codes_ptr, v_scales_ptr, copy_ptr, tables_ptr, rows, count,
    factor, step_size, denominator, decay, weight1, beta2, weight2, eps, smallest, BLOCK: tl.constexpr,
):  # fmt: skip
    """The arithmetic of `adamw_kernel` on whole blocks, or on those elements that are below `count`."""
    index = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask, some = None, None
    if count is not None:
        mask, some = index < count, rows * BLOCK < count
    g = tl.load(grad_ptr + index, mask=mask).to(tl.float32) * factor
    m = _decoded(m_codes_ptr + index, m_scales_ptr + rows, tables_ptr, mask, some)
    v = _decoded(v_codes_ptr + index, v_scales_ptr + rows, tables_ptr + 256, mask, some)
    p = tl.load(param_ptr + index, mask=mask)
    m = tl.fma(g - m, weight1 + tl.zeros_like(m), m)
    v = tl.fma(g * weight2, g, v * beta2)
    p = p * decay - tl.div_rn(m * step_size, tl.div_rn(tl.sqrt_rn(v), denominator) + eps)
    tl.store(param_ptr + index, p, mask=mask)
    if copy_ptr is not None:
        tl.store(copy_ptr + index, rounded(p, copy_ptr.dtype.element_ty), mask=mask)
    _store_encoded(m, m_codes_ptr + index, m_scales_ptr + rows, tables_ptr + 512, mask, some, smallest)
    _store_encoded(v, v_codes_ptr + index, v_scales_ptr + rows, tables_ptr + 768, mask, some, smallest)


@jit
def _decoded(codes_ptr, scales_ptr, entries_ptr, mask, some):
    codes = tl.load(codes_ptr, mask=mask).to(tl.int32)  # any byte is an entry, also one that was not read
    return tl.load(entries_ptr + codes) * tl.load(scales_ptr, mask=some)[:, None]


@jit
def _store_encoded(values, codes_ptr, scales_ptr, borders_ptr, mask, some, smallest):
    if mask is not None:
        values = tl.where(mask, values, 0.0)
    scales = tl.max(tl.abs(values), 1)
    scales = tl.where(scales < smallest, 0.0, scales)
    spread = scales[:, None] + tl.zeros_like(values)
    normal = tl.where(spread > 0, tl.div_rn(values, tl.where(spread > 0, spread, 1.0)), 0.0)
    below = tl.zeros_like(values).to(tl.int32)  # how many borders are
    half = 128
    while half > 0:
        below += tl.where(tl.load(borders_ptr + below + half - 1) < normal, half, 0)
        half //= 2
    tl.store(codes_ptr, below.to(tl.uint8), mask=mask)
    tl.store(scales_ptr, scales, mask=some)
