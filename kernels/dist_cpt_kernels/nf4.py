"""NF4 dequantisation in one kernel, including the nested scales.

A byte holds two codes, the first in the high half. A block of 64 elements shares one scale, itself a code:
scale = code_map[code] * absmax2 + offset, with one absmax2 per 256 scales. Every product and sum is rounded to
fp32 on its own, never fused, so the result is bit-identical to that of bitsandbytes.
Source: Dettmers et al., QLoRA, sections 2 and 3 (the 16 levels: appendix E).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch

from dist_cpt_kernels import reference
from dist_cpt_kernels.dispatch import DTYPES, available, jit, tl
from dist_cpt_kernels.projection import NestedScales
from dist_cpt_kernels.rounding import rounded

BLOCK = 64  # elements per scale
TILE = 4096  # elements per program: 16 bytes of codes per thread
NUM_WARPS = 4


def dequantize_nf4(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    nested: NestedScales | None = None,
) -> torch.Tensor:
    """Decode `packed` uint8, two codes per byte, to a tensor of `shape` in `dtype` (bf16 or fp32).

    `absmax` has one scale per 64 elements: fp32, or uint8 codes with `nested`. Not differentiable, as a quantised
    weight has no gradient.

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    _check(packed, absmax, shape, dtype, nested)
    if not available(packed):
        return reference.dequantize_nf4(packed, absmax, shape, dtype, nested=nested)
    out = torch.empty(tuple(shape), dtype=dtype, device=packed.device)
    num_elements = out.numel()
    if num_elements:
        dequantize_nf4_kernel[(-(-num_elements // TILE),)](
            packed, absmax, None if nested is None else nested.code_map, None if nested is None else nested.absmax,
            None if nested is None else nested.offset, _levels(packed.device), out, num_elements, packed.numel(),
            BLOCK=BLOCK, NESTED_BLOCK=256 if nested is None else nested.block, TILE=TILE, num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out


@cache
def _levels(device: torch.device) -> torch.Tensor:
    return torch.tensor(reference.NF4_LEVELS, dtype=torch.float32, device=device)


def _check(
    packed: torch.Tensor, absmax: torch.Tensor, shape: Sequence[int], dtype: torch.dtype, nested: NestedScales | None
) -> None:
    num_elements = math.prod(shape)
    num_bytes, num_scales = -(-num_elements // 2), -(-num_elements // BLOCK)
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected bf16 or fp32, got {dtype}")
    if packed.dtype != torch.uint8 or not packed.is_contiguous() or packed.numel() != num_bytes:
        raise ValueError(f"packed: expected {num_bytes} contiguous uint8, got {packed.dtype} {[*packed.shape]}")
    scale_dtype = torch.float32 if nested is None else torch.uint8
    if absmax.dtype != scale_dtype or absmax.numel() != num_scales or not absmax.is_contiguous():
        raise ValueError(f"absmax: expected {num_scales} {scale_dtype}, got {absmax.numel()} {absmax.dtype}")
    if nested is not None:
        expected, actual = (256, -(-num_scales // nested.block)), (nested.code_map.numel(), nested.absmax.numel())
        if expected != actual:
            raise ValueError(f"nested: expected a map of {expected[0]} and {expected[1]} scales, got {actual}")


@jit
def dequantize_nf4_kernel(
    packed_ptr, absmax_ptr, code_map_ptr, absmax2_ptr, offset_ptr, levels_ptr, out_ptr, num_elements, num_bytes,
    BLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program decodes TILE elements; each row of its tile is one block with its scale."""
    ROWS: tl.constexpr = TILE // BLOCK
    BYTES: tl.constexpr = BLOCK // 2
    tile = tl.program_id(0).to(tl.int64)
    scale_index = tile * ROWS + tl.arange(0, ROWS)
    scale_mask = scale_index * BLOCK < num_elements
    scale = tl.load(absmax_ptr + scale_index, mask=scale_mask, other=0)
    if code_map_ptr is not None:
        absmax2 = tl.load(absmax2_ptr + scale_index // NESTED_BLOCK, mask=scale_mask, other=0.0)
        scale = tl.load(code_map_ptr + scale.to(tl.int32)) * absmax2 + tl.load(offset_ptr)

    byte_index = tile * (TILE // 2) + tl.arange(0, ROWS)[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
    codes = tl.load(packed_ptr + byte_index, mask=byte_index < num_bytes, other=0).to(tl.int32)
    first = rounded(tl.load(levels_ptr + (codes >> 4)) * scale[:, None], out_ptr.dtype.element_ty)
    second = rounded(tl.load(levels_ptr + (codes & 15)) * scale[:, None], out_ptr.dtype.element_ty)
    values = tl.reshape(tl.join(first, second), (ROWS, BLOCK))
    index = tile * TILE + tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out_ptr + index, values, mask=index < num_elements)
