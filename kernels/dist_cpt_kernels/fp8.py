"""Products with a frozen weight in e4m3: both factors are quantised by rows, and the product is scaled afterwards.

T tokens, I in, O out, K the dimension that a product sums over.

A matrix [N, K] is stored as a byte per element and an fp32 scale per row: scale = absmax / 448, value = scale * code.
In y = x W^T both scales are factors of a row or a column of y, as `torch._scaled_mm` takes them. In dx = dy W those of
W lie along the sum, where no matrix product applies them: they multiply dy before it is quantised. So the same codes
serve both directions, and dx is that of the weight of the forward pass. `torch._scaled_mm` wants its second factor with
the sum's dimension contiguous: a transposed copy of the codes exists while dx is computed.

The functions in `reference` define every bit of codes and scales, and of products all but the order of the sum.
Source: Micikevicius et al., FP8 Formats for Deep Learning (arXiv 2209.05433), section 3; torch/ao's rowwise recipe.
"""

from __future__ import annotations

from functools import partial

import torch

from dist_cpt_kernels import reference
from dist_cpt_kernels.dispatch import can_fuse, jit, tl
from dist_cpt_kernels.projection import QuantisedRows

MULTIPLE = 16  # of both dimensions of a weight: what torch._scaled_mm takes
CAPABILITY = (8, 9)  # the first with e4m3 products
TILE = 2048  # elements of a row at a time: 16 per thread
NUM_WARPS = 4


def why_not(device: torch.device) -> str | None:
    """Why `device` cannot multiply e4m3 matrices; a CPU computes the reference."""
    if device.type != "cuda":
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        return f"has compute capability {'.'.join(map(str, capability))}, e4m3 products need 8.9"
    return None


def quantize_rows(x_TK: torch.Tensor, factor_K: torch.Tensor | None = None) -> QuantisedRows:
    """`x`, its columns multiplied by the fp32 `factor`, as e4m3 codes and an fp32 scale per row; not differentiable."""
    if not can_fuse(x_TK):
        return reference.quantize_rows(x_TK, factor_K)
    x_TK = x_TK.contiguous()
    rows, columns = x_TK.shape
    codes_TK = torch.empty((rows, columns), dtype=torch.uint8, device=x_TK.device)
    scales_T = torch.empty(rows, dtype=torch.float32, device=x_TK.device)
    if rows:
        quantize_rows_kernel[(rows,)](
            x_TK, factor_K, codes_TK, scales_T, columns, LARGEST=reference.E4M3_MAX,
            SMALLEST_SCALE=reference.SMALLEST_ROW_SCALE, TILE=min(TILE, 1 << (columns - 1).bit_length()),
            num_warps=NUM_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return QuantisedRows(codes_TK, scales_T)


def scaled_product(a: QuantisedRows, b: QuantisedRows, out_TO: torch.Tensor) -> torch.Tensor:
    """`out` [T, O] = a b^T of `a` [T, K] and `b` [O, K]."""
    if not (out_TO.is_cuda and len(out_TO)) or out_TO.dtype != torch.bfloat16:  # the only dtype with a scale per row
        return reference.scaled_product(a, b, out_TO)
    return product_by_torch(a, b, out_TO)


def product_by_torch(a: QuantisedRows, b: QuantisedRows, out_TO: torch.Tensor) -> torch.Tensor:
    """`scaled_product` in bf16, also on a CPU."""
    return torch._scaled_mm(
        a.codes.view(torch.float8_e4m3fn),
        b.codes.view(torch.float8_e4m3fn).T,
        scale_a=a.scales[:, None],
        scale_b=b.scales[None, :],
        out_dtype=out_TO.dtype,
        use_fast_accum=False,  # summed in fp32, as by the reference; the fast sum keeps 14 bits
        out=out_TO,
    )


def fp8_input_gradient(grad_TO: torch.Tensor, weight: QuantisedRows) -> torch.Tensor:
    """dy W [T, I] in the dtype of `grad`."""
    ones_I = torch.ones(weight.codes.shape[1], device=grad_TO.device)
    turned = QuantisedRows(weight.codes.T.contiguous(), ones_I)
    return scaled_product(quantize_rows(grad_TO, weight.scales), turned, grad_TO.new_empty(len(grad_TO), len(ones_I)))


fp8_linear = partial(reference.fp8_linear, operations=(quantize_rows, scaled_product, fp8_input_gradient))


@jit
def quantize_rows_kernel(
    x_ptr, factor_ptr, codes_ptr, scales_ptr, num_columns,
    LARGEST: tl.constexpr, SMALLEST_SCALE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program quantises a row, which it reads twice."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((TILE,), dtype=tl.float32)
    for start in range(0, num_columns, TILE):
        largest = tl.maximum(largest, tl.abs(_scaled(x_ptr, factor_ptr, row, start, num_columns, TILE, float("inf"))))
    scale = tl.maximum(tl.div_rn(tl.max(largest, axis=0), LARGEST), SMALLEST_SCALE)
    tl.store(scales_ptr + row, scale)
    for start in range(0, num_columns, TILE):
        values = tl.div_rn(_scaled(x_ptr, factor_ptr, row, start, num_columns, TILE, float("nan")), scale)
        column = start + tl.arange(0, TILE)
        codes = tl.where(values == values, _encoded(values, LARGEST), 0x7F)
        tl.store(codes_ptr + row * num_columns + column, codes.to(tl.uint8), mask=column < num_columns)


@jit
def _scaled(x_ptr, factor_ptr, row, start, num_columns, TILE: tl.constexpr, nan: tl.constexpr):
    """fp32 [TILE] of x * factor, with `nan` in place of NaN and 0 after the last column."""
    column = start + tl.arange(0, TILE)
    values = tl.load(x_ptr + row * num_columns + column, mask=column < num_columns, other=0.0).to(tl.float32)
    if factor_ptr is not None:
        values *= tl.load(factor_ptr + column, mask=column < num_columns, other=0.0)
    return tl.where(values == values, values, nan)


@jit
def _encoded(values, LARGEST: tl.constexpr):
    """The e4m3 code of each fp32 value, rounded to nearest even: sign, 4 bits of exponent, 3 of mantissa.

    On the bits, as the interpreter has no e4m3 and devices before 8.9 none either.
    """
    magnitude = tl.minimum(tl.abs(values), LARGEST)
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)  # 127 - 7: the difference of the exponents
    # below 2^-6 the step is 2^-9, that of fp32 at 2^14
    subnormal = (magnitude + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0.015625, subnormal, normal)
    return code | ((values.to(tl.int32, bitcast=True) >> 24) & 0x80)
