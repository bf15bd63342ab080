"""Rounding of fp32 to the stored dtype: to nearest, ties to even.

GPUs do this in hardware. Triton's interpreter truncates bf16 instead (3.5 to 3.9), so under it the rounding is done
on the bits, and a kernel gives the same numbers in both.
"""

from __future__ import annotations

from dist_cpt_kernels.dispatch import INTERPRETED, jit, tl

_ON_BITS = INTERPRETED if tl is None else tl.constexpr(INTERPRETED)


@jit
def rounded(x, dtype: tl.constexpr):
    """fp32 `x` in the element type `dtype`, rounded to nearest even."""
    if _ON_BITS and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)
