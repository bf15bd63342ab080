"""The specification of each operation in plain torch, without regard to speed or memory.

T tokens, D model, V vocab; B batch, L sequence, H heads, N head dim, P positions, F ffn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from dist_cpt_kernels.projection import Projection, QuantisedRows, RowScales


def rms_norm(x: torch.Tensor, weight_D: torch.Tensor, eps: float, *, casting: str = "llama") -> torch.Tensor:
    """x / sqrt(mean over D of x^2 + eps) in at least fp32, times the weight; [..., D] in the dtype of `x`.

    "llama": rounded to that dtype, then times weight. "gemma": times (1 + weight) in at least fp32, then rounded.
    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, equation 4.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = x.to(wide) * torch.rsqrt(x.to(wide).square().mean(-1, keepdim=True) + eps)
    if casting == "gemma":
        return (normed * (1.0 + weight_D.to(wide))).to(x.dtype)
    return (normed.to(x.dtype) * weight_D).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight_D: torch.Tensor, eps: float, *, casting: str = "llama"
) -> tuple[torch.Tensor, torch.Tensor]:
    """(`rms_norm` of the sum, the sum), [..., D] in the dtype of `x`: the sum is rounded before it is normalised."""
    total = x + residual
    return rms_norm(total, weight_D, eps, casting=casting), total


def rope(
    q: torch.Tensor, k: torch.Tensor, cos_PR: torch.Tensor, sin_PR: torch.Tensor, position_ids_BL: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`q` and `k` [B, L, H, N] rotated by the angles of their positions, in at least fp32, rounded once.

    The first 2 R of N rotate, i with i + R; the rest is unchanged.
    Source: Su et al., RoFormer, section 3.2.2, in the half-split order of GPT-NeoX.
    """
    cos, sin = (table[position_ids_BL].unsqueeze(-2) for table in (cos_PR, sin_PR))
    half = cos.shape[-1]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
        rotated = (first * cos - second * sin, second * cos + first * sin)
        return torch.cat([*(part.to(x.dtype) for part in rotated), rest], dim=-1)

    return rotate(q), rotate(k)


def gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(gate) * up, [..., F], in at least fp32 and rounded once; "silu", "gelu_tanh" or "gelu_exact"."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    if activation == "silu":
        activated = F.silu(gate.to(wide))
    else:
        activated = F.gelu(gate.to(wide), approximate="tanh" if activation == "gelu_tanh" else "none")
    return (activated * up.to(wide)).to(gate.dtype)


IGNORE_INDEX = -100  # the label of a token that adds nothing, as in torch and transformers


def cross_entropy(logits_TV: torch.Tensor, labels_T: torch.Tensor, *, softcap: float | None = None) -> torch.Tensor:
    """-log p of each label [T] in at least fp32, 0 for ignored tokens; z = softcap * tanh(logits / softcap) if set."""
    z_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    if softcap is not None:
        z_TV = softcap * torch.tanh(z_TV / softcap)
    return F.cross_entropy(z_TV, labels_T, ignore_index=IGNORE_INDEX, reduction="none")


def linear_cross_entropy(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_T: torch.Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale * loss_sum, loss_sum detached), loss_sum = sum of `cross_entropy` over the tokens.

    Logits = hidden @ weight.T in the dtype of `hidden`, everything after it in at least fp32. Materialises the full
    logits [T, V].
    """
    loss_sum = cross_entropy(hidden_TD @ weight_VD.to(hidden_TD.dtype).T, labels_T, softcap=softcap).sum()
    return loss_sum * scale, loss_sum.detach()


# Source: Dettmers et al., QLoRA, appendix E; as fp32 numbers.
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def dequantize_nf4(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    nested: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int] | None = None,
) -> torch.Tensor:
    """level[code] * scale in fp32, rounded to `dtype`; a scale per 64 codes, the first code in a byte's high half.

    `nested` (code map, absmax2, offset, scales per absmax2): scale = map[absmax] * absmax2 + offset, each step in fp32.
    """
    num_elements = math.prod(shape)
    if nested is not None:
        code_map, absmax2, offset, nested_block = nested
        absmax = code_map[absmax.int()] * absmax2.repeat_interleave(nested_block)[: absmax.numel()] + offset
    codes = torch.stack((packed.flatten() >> 4, packed.flatten() & 15), dim=1).flatten()[:num_elements]
    levels = torch.tensor(NF4_LEVELS, device=packed.device)[codes.int()]
    return (levels * absmax.repeat_interleave(64)[:num_elements]).to(dtype).view(*shape)


E4M3_MAX = 448.0
SMALLEST_ROW_SCALE = 2.0**-126  # fp32's smallest normal number; a row of zeros has this scale


def quantize_rows(x_TK: torch.Tensor, factor_K: torch.Tensor | None = None) -> QuantisedRows:
    """scale = max(absmax / 448, 2^-126) of each row of x * factor, code = e4m3(x * factor / scale), to nearest even.

    Each step in fp32. A row with a NaN or an infinity has an infinite scale, and its products are NaN.
    """
    x_TK = x_TK.float() if factor_K is None else x_TK.float() * factor_K
    largest_T = x_TK.abs().nan_to_num(nan=math.inf, posinf=math.inf).amax(1)
    scales_T = (largest_T / E4M3_MAX).clamp_min(SMALLEST_ROW_SCALE)
    codes_TK = (x_TK / scales_T[:, None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return QuantisedRows(codes_TK.view(torch.uint8), scales_T)


def scaled_product(a: QuantisedRows, b: QuantisedRows, out_TO: torch.Tensor) -> torch.Tensor:
    """`out` = a b^T: the codes' product, exact terms summed in fp32, times a's scale, then b's; rounded."""
    a_TK, b_OK = (x.codes.view(torch.float8_e4m3fn).float() for x in (a, b))
    return out_TO.copy_((a_TK @ b_OK.T) * a.scales[:, None] * b.scales)


def fp8_input_gradient(grad_TO: torch.Tensor, weight: QuantisedRows) -> torch.Tensor:
    """dy W [T, I]: W's scales multiply dy, which is quantised then; the product is with W's codes."""
    ones_I = torch.ones(weight.codes.shape[1], device=grad_TO.device)
    turned = QuantisedRows(weight.codes.T.contiguous(), ones_I)
    return scaled_product(quantize_rows(grad_TO, weight.scales), turned, grad_TO.new_empty(len(grad_TO), len(ones_I)))


class _Fp8Product(torch.autograd.Function):
    """Saves the weight itself: a sharding engine refills it."""

    @staticmethod
    def forward(ctx: Any, x_TI: torch.Tensor, codes_OI: torch.Tensor, scales_O: torch.Tensor, how: Any) -> torch.Tensor:
        quantize, product, ctx.input_gradient = how
        ctx.save_for_backward(codes_OI, scales_O)
        weight = QuantisedRows(codes_OI, scales_O)
        return product(quantize(x_TI), weight, x_TI.new_empty(len(x_TI), len(codes_OI)))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return ctx.input_gradient(grads[0], QuantisedRows(*ctx.saved_tensors)), None, None, None


def fp8_linear(
    x: torch.Tensor,
    codes_OI: torch.Tensor,
    scales_O: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    operations: tuple[Any, Any, Any] = (quantize_rows, scaled_product, fp8_input_gradient),
) -> torch.Tensor:
    """x W^T + b [..., O] of a frozen weight in e4m3 by `operations`; only x has a gradient."""
    y_TO = _Fp8Product.apply(x.reshape(-1, x.shape[-1]), codes_OI, scales_O, operations)
    y = y_TO.view(*x.shape[:-1], len(scales_O))
    return y if bias is None else y + bias.to(y.dtype)


def lora_linear(x: torch.Tensor, *projections: Projection, training: bool = True) -> tuple[torch.Tensor, ...]:
    """x W^T + b + scaling (dropout(x) A^T) B^T [..., O] for each projection; each product and sum is rounded.

    Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, section 4.1.
    """
    outs: list[torch.Tensor] = []
    for p in projections:
        if isinstance(p.scales, RowScales):
            out = fp8_linear(x, p.weight, p.scales.scales, p.bias)
        else:
            weight = p.weight
            if p.scales is not None:
                weight = dequantize_nf4(weight, p.scales.absmax, p.scales.shape, torch.bfloat16, nested=p.scales.nested)
            out = F.linear(x, weight.to(x.dtype), p.bias)
        if p.lora_A is not None and p.lora_B is not None:
            out = out + F.linear(F.linear(F.dropout(x, p.dropout, training), p.lora_A), p.lora_B) * p.scaling
        outs.append(out)
    return tuple(outs)


def lora_mlp(
    x: torch.Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    activation: str = "silu",
    training: bool = True,
) -> torch.Tensor:
    """down(activation(gate(x)) * up(x)) [..., D]; "silu", "gelu_tanh" or "gelu_exact"."""
    gate_out, up_out = lora_linear(x, gate, up, training=training)
    if activation == "silu":
        activated = F.silu(gate_out)
    else:
        activated = F.gelu(gate_out, approximate="tanh" if activation == "gelu_tanh" else "none")
    return lora_linear(activated * up_out, down, training=training)[0]


def embedding_gradient(
    grad_TD: torch.Tensor,
    ids_T: torch.Tensor,
    num_embeddings: int,
    *,
    dtype: torch.dtype = torch.float32,
    padding_idx: int | None = None,
) -> torch.Tensor:
    """[V, D] in `dtype`: row v is the sum, in at least fp32, of the rows of `grad` with id v."""
    grad_TD = grad_TD.to(torch.promote_types(grad_TD.dtype, torch.float32))
    table_VD = grad_TD.new_zeros((num_embeddings, grad_TD.shape[1])).index_add_(0, ids_T, grad_TD)
    if padding_idx is not None:
        table_VD[padding_idx] = 0.0
    return table_VD.to(dtype)


def adamw_(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    *,
    copies: Sequence[torch.Tensor] = (),
    step_size: torch.Tensor,
    denominator: torch.Tensor,
    decay: float,
    betas: tuple[float, float],
    eps: float,
    grad_factor: torch.Tensor,
    skip: torch.Tensor,
) -> None:
    """m += (1 - b1)(g - m); v = b2 v + (1 - b2) g^2; p = decay p - step_size m / (sqrt(v) / denominator + eps).

    In place, in the dtype of `params`; nothing changes if `skip` is not zero. `copies` receive the new params.
    """
    for i, (param, grad, exp_avg, exp_avg_sq) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        grad = grad.to(param.dtype) * grad_factor
        new_m = exp_avg + (grad - exp_avg) * (1 - betas[0])
        new_v = exp_avg_sq * betas[1] + grad * grad * (1 - betas[1])
        new_p = param * decay - step_size * new_m / (new_v.sqrt() / denominator + eps)
        for old, new in ((exp_avg, new_m), (exp_avg_sq, new_v), (param, new_p)):
            old.copy_(torch.where(skip != 0, old, new))
        if copies:
            copies[i].copy_(torch.where(skip != 0, copies[i].to(param.dtype), param))


def sum_of_squares(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """fp64 []: the sum of the squares of all elements of `tensors`."""
    return torch.stack([tensor.double().square().sum() for tensor in tensors]).sum()


QUANTISATION_BLOCK = 256  # elements that share a scale
# A block with a smaller scale is stored as zeros: its elements would be subnormal and not survive a round trip.
SMALLEST_SCALE = 2.0**-100


def dequantize_8bit(codes: torch.Tensor, scales: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
    """entries[codes] * scale, fp32 [n], of uint8 `codes` [n] and fp32 `scales`, one per QUANTISATION_BLOCK of them."""
    return entries[codes.int()].mul_(scales.repeat_interleave(QUANTISATION_BLOCK)[: codes.numel()])


def quantize_8bit_(values: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, borders: torch.Tensor) -> None:
    """Store fp32 `values` [n]: each block's largest magnitude, and the number of `borders` below value / scale."""
    number = values.numel()
    full = number // QUANTISATION_BLOCK * QUANTISATION_BLOCK
    magnitude = values.abs()
    scales[: full // QUANTISATION_BLOCK] = magnitude[:full].view(-1, QUANTISATION_BLOCK).amax(1)
    if full < number:
        scales[full // QUANTISATION_BLOCK] = magnitude[full:].amax()
    scales[scales < SMALLEST_SCALE] = 0.0
    spread = scales.repeat_interleave(QUANTISATION_BLOCK)[:number]
    normal = torch.where(spread > 0, values / spread, torch.zeros((), device=values.device))
    codes.copy_(torch.bucketize(normal, borders, out_int32=True))
