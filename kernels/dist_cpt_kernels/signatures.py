"""Every kernel with the types and constants of real use, so that all can be compiled where there is no GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dist_cpt_kernels import adamw, nf4
from dist_cpt_kernels.cross_entropy import BLOCK as ROW_BLOCK
from dist_cpt_kernels.cross_entropy import NUM_WARPS as ROW_WARPS
from dist_cpt_kernels.cross_entropy import cross_entropy_kernel
from dist_cpt_kernels.embedding import BLOCK as COLUMN_BLOCK
from dist_cpt_kernels.embedding import NUM_WARPS as COLUMN_WARPS
from dist_cpt_kernels.embedding import TILE_TOKENS, join_runs_kernel, sum_runs_kernel
from dist_cpt_kernels.gated import ACTIVATIONS, gated_gradients_kernel, gated_kernel
from dist_cpt_kernels.gated import BLOCK as GATED_BLOCK
from dist_cpt_kernels.gated import NUM_WARPS as GATED_WARPS
from dist_cpt_kernels.linear_cross_entropy import SCALE_BLOCK, scale_kernel
from dist_cpt_kernels.rms_norm import (
    MAX_DIM,
    MAX_SHARED_DIM,
    PART_COLUMNS,
    PARTS,
    SHARE_COLUMNS,
    SHARE_ROWS,
    add_parts_kernel,
    rms_norm_backward_kernel,
    rms_norm_kernel,
    tile,
    weight_shares_kernel,
)
from dist_cpt_kernels.rope import blocks, rope_kernel


@dataclass(frozen=True)
class Signature:
    """One kernel as it is launched.

    `arguments` by name: a type as Triton writes it ("*bf16", "i32", "fp32"), ":16" behind it where the launcher
    sees a multiple of 16, as it does for most pointers and sizes. A name that is missing there is a constant:
    in `constants`, or None.
    """

    name: str
    kernel: Any
    arguments: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    fp_fusion: bool = True
    min_vector_bits: int = 0  # the widest global load must be at least this wide


def signatures() -> list[Signature]:
    return [*_cross_entropy(), *_nf4(), *_embedding(), *_adamw(), *_rms_norm(), *_rope(), *_gated()]


def _cross_entropy() -> list[Signature]:
    numbers = {
        "labels_ptr": "*i64:16",
        "scale_ptr": "*fp32:16",
        "num_tokens": "i32:16",
        "vocab": "i32:16",
        "ignore_index": "i32",
        "label_smoothing": "fp32",
        "share": "fp32",
        "true_share": "fp32",
        "z_loss": "fp32",
        "softcap": "fp32",
        "inverse_softcap": "fp32",
    }
    flags = {"labels_stride": 1, "READ_SUMS": False, "SCALE_LOSS": False, "SMOOTH": False, "SOFTCAP": False}
    flags["BLOCK"] = ROW_BLOCK

    def make(name: str, dtype: str, extra: Mapping[str, str], **changed: Any) -> Signature:
        logits = {"logits_ptr": f"*{dtype}:16", "logits_stride": "i32:16"}
        return Signature(
            f"cross_entropy_{name}_{dtype}",
            cross_entropy_kernel,
            {**numbers, **logits, **extra},
            {**flags, **changed},
            num_warps=ROW_WARPS,
            min_vector_bits=128,
        )

    def grad(dtype: str) -> dict[str, str]:
        return {"losses_ptr": "*fp32:16", "grad_ptr": f"*{dtype}:16", "grad_stride": "i32:16"}

    sums = {"sums_ptr": "*fp32:16"}
    upstream = {"upstream_ptr": "*fp32:16", "upstream_stride": "i32"}
    backward = {**grad("bf16"), **sums, **upstream}
    del backward["losses_ptr"]
    return [
        make("fused", "bf16", grad("bf16"), upstream_stride=0),
        make("fused", "fp32", grad("fp32"), upstream_stride=0),
        make("fused_softcap", "bf16", grad("bf16"), upstream_stride=0, SOFTCAP=True),
        make("fused_all_terms", "bf16", grad("bf16"), upstream_stride=0, SOFTCAP=True, SMOOTH=True),
        make("forward", "bf16", {"losses_ptr": "*fp32:16", **sums}, upstream_stride=0, grad_stride=0, SCALE_LOSS=True),
        make("backward", "bf16", backward, READ_SUMS=True, SCALE_LOSS=True),
        *(
            Signature(
                f"scale_{source}_{target}",
                scale_kernel,
                {
                    "x_ptr": f"*{source}:16",
                    "factor_ptr": "*fp32:16",
                    "out_ptr": f"*{target}:16",
                    "num_elements": "i32:16",
                },
                {"IN_PLACE": source == target, "BLOCK": SCALE_BLOCK},
                min_vector_bits=128,
            )
            for source, target in (("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16"))
        ),
    ]


def _nf4() -> list[Signature]:
    nested = {"code_map_ptr": "*fp32:16", "absmax2_ptr": "*fp32:16", "offset_ptr": "*fp32:16"}

    def make(dtype: str, scales: str, extra: Mapping[str, str]) -> Signature:
        return Signature(
            f"nf4_{dtype}_{scales}",
            nf4.dequantize_nf4_kernel,
            {
                "packed_ptr": "*u8:16",
                "absmax_ptr": f"*{scales}:16",
                "levels_ptr": "*fp32:16",
                "out_ptr": f"*{dtype}:16",
                "num_elements": "i32:16",
                "num_bytes": "i32:16",
                **extra,
            },
            {"BLOCK": 64, "NESTED_BLOCK": 256, "TILE": nf4.TILE},
            num_warps=nf4.NUM_WARPS,
            fp_fusion=False,
            min_vector_bits=128,
        )

    return [*(make(dtype, "u8", nested) for dtype in ("bf16", "fp16", "fp32")), make("bf16", "fp32", {})]


def _embedding() -> list[Signature]:
    constants = {"TILE_TOKENS": TILE_TOKENS, "BLOCK": COLUMN_BLOCK}
    shared = {"places_ptr": "*i64:16", "parts_ptr": "*fp32:16", "num_tokens": "i32:16", "dim": "i32:16"}
    return [
        *(
            Signature(
                f"embedding_runs_{grad}_{out}",
                sum_runs_kernel,
                {**shared, "grad_ptr": f"*{grad}:16", "order_ptr": "*i64:16", "out_ptr": f"*{out}:16"},
                constants,
                num_warps=COLUMN_WARPS,
                min_vector_bits=128,
            )
            for grad, out in (("bf16", "fp32"), ("bf16", "bf16"), ("fp32", "fp32"))
        ),
        *(
            Signature(
                f"embedding_join_{out}",
                join_runs_kernel,
                {**shared, "out_ptr": f"*{out}:16"},
                constants,
                num_warps=COLUMN_WARPS,
                min_vector_bits=128,
            )
            for out in ("fp32", "bf16")
        ),
    ]


def _adamw() -> list[Signature]:
    constants = {"ALIGNED": True, "PIECE": adamw.PIECE, "BLOCK": adamw.BLOCK}
    table = {"addresses_ptr": "*i64:16", "pieces_ptr": "*i64:16"}
    scalars = ("step_size", "denominator", "decay", "weight1", "beta2", "weight2", "eps")

    def make(grad: str, extra: Mapping[str, str]) -> Signature:
        return Signature(
            f"adamw_{grad}{'_copy' if 'copy_like' in extra else ''}",
            adamw.adamw_kernel,
            {
                **table,
                "num_tensors": "i32",
                "grad_like": f"*{grad}:16",
                **dict.fromkeys(scalars, "fp32"),
                "grad_factor_ptr": "*fp32:16",
                "skip_ptr": "*i32:16",
                **extra,
            },
            constants,
            num_warps=adamw.NUM_WARPS,
            fp_fusion=False,
            min_vector_bits=128,
        )

    on_device = {"step_size_ptr": "*fp32:16", "denominator_ptr": "*fp32:16"}
    return [
        make("fp32", {}),
        make("fp32", {**on_device, "copy_like": "*bf16:16"}),
        make("bf16", {**on_device, "copy_like": "*bf16:16"}),
        *(
            Signature(
                f"sum_squares_{dtype}",
                adamw.sum_squares_kernel,
                {**table, "like": f"*{dtype}:16", "partial_ptr": "*fp32:16"},
                {**constants, "BLOCK": adamw.NORM_BLOCK},
                num_warps=adamw.NUM_WARPS,
                min_vector_bits=128,
            )
            for dtype in ("fp32", "bf16")
        ),
        Signature(
            "add_up",
            adamw.add_up_kernel,
            {"partial_ptr": "*fp32:16", "out_ptr": "*fp64:16", "num_partial": "i32"},
            {"BLOCK": adamw.BLOCK},
            num_warps=adamw.NUM_WARPS,
        ),
    ]


def _rms_norm() -> list[Signature]:
    """Hidden sizes of 4096, 5376, 8192 and 16384, and heads of 128."""

    def make(name: str, dtype: str, dim: int, pointers: Mapping[str, str], strides: tuple[str, ...], **changed: Any):
        rows, block, warps = tile(dim)
        kernel = rms_norm_backward_kernel if "back" in name else rms_norm_kernel
        return Signature(
            f"rms_norm_{name}_{dtype}_{dim}",
            kernel,
            {
                "x_ptr": f"*{dtype}:16",
                "weight_ptr": f"*{dtype}:16",
                "rstd_ptr": "*fp32:16",
                **{name: kind.format(dtype) for name, kind in pointers.items()},
                **dict.fromkeys(("x_stride", *strides), "i32:16"),
                "num_rows": "i32:16",
                "dim": "i32:16",
                **({} if "back" in name else {"eps": "fp32"}),
            },
            {"GEMMA": False, "ROWS": rows, "BLOCK": block, **changed},
            num_warps=warps,
            min_vector_bits=128,
        )

    tensor, out = "*{}:16", {"out_ptr": "*{}:16"}
    added = {**out, "residual_ptr": tensor, "total_ptr": tensor}
    frozen = {"grad_ptr": tensor, "dx_ptr": tensor}
    trained = {**frozen, "parts_ptr": "*fp32:16"}
    total = {"grad_total_ptr": tensor}
    narrow = (("bf16", 128), ("bf16", 4096), ("bf16", 5376), ("bf16", MAX_SHARED_DIM), ("fp32", 4096))
    longest = ("bf16", MAX_DIM)
    strides, both = ("grad_stride",), ("grad_stride", "grad_total_stride")
    return [
        *(make("alone", *size, out, (), residual_stride=0) for size in (*narrow, longest)),
        *(make("added", *size, added, ("residual_stride",)) for size in (*narrow[1:], longest)),
        make("added_gemma", "bf16", 4096, added, ("residual_stride",), GEMMA=True),
        *(make("back", *size, trained, strides, grad_total_stride=0) for size in narrow),
        *(make("back_frozen", *size, frozen, strides, grad_total_stride=0) for size in (*narrow[:2], longest)),
        *(make("back_added", *size, {**trained, **total}, both) for size in narrow[1:]),
        *(make("back_added_frozen", *size, {**frozen, **total}, both) for size in (*narrow[1:], longest)),
        make("back_added_gemma", "bf16", 4096, {**trained, **total}, both, GEMMA=True),
        *(
            Signature(
                f"rms_norm_shares_{dtype}",
                weight_shares_kernel,
                {
                    **dict.fromkeys(("grad_ptr", "x_ptr"), f"*{dtype}:16"),
                    **dict.fromkeys(("rstd_ptr", "parts_ptr"), "*fp32:16"),
                    **dict.fromkeys(("grad_stride", "x_stride", "num_rows", "dim"), "i32:16"),
                },
                {"ROWS": SHARE_ROWS, "BLOCK": SHARE_COLUMNS},
                min_vector_bits=128,
            )
            for dtype in ("fp32", "bf16")
        ),
        *(
            Signature(
                f"rms_norm_parts_{dtype}",
                add_parts_kernel,
                {"parts_ptr": "*fp32:16", "out_ptr": f"*{dtype}:16", "num_parts": "i32", "dim": "i32:16"},
                {"PARTS": PARTS, "BLOCK": PART_COLUMNS},
                min_vector_bits=128,
            )
            for dtype in ("fp32", "bf16")
        ),
    ]


def _rope() -> list[Signature]:
    """Llama 3 8B and 70B, Qwen2 7B (28 heads), Gemma 2 (heads of 256), Phi-2 (32 of 80), one head for keys."""
    shapes = {
        "llama_8b": (32, 8, 64, 128),
        "llama_70b": (64, 8, 64, 128),
        "qwen2_7b": (28, 4, 64, 128),
        "gemma2_9b": (16, 8, 128, 256),
        "phi_2": (32, 32, 16, 80),
        "one_key_head": (8, 1, 128, 256),
    }

    def make(name: str, dtype: str = "bf16", inverse: bool = False) -> Signature:
        num_heads, num_k_heads, half, head_dim = shapes[name]
        chosen = blocks(num_heads, num_k_heads, half, head_dim)
        warps = chosen.pop("num_warps")
        tensors = [f"{x}{out}" for x in ("q", "k") for out in ("", "_out")]
        return Signature(
            f"rope_{name}_{dtype}{'_back' if inverse else ''}",
            rope_kernel,
            {
                **{f"{tensor}_ptr": f"*{dtype}:16" for tensor in tensors},
                **{f"{tensor}_stride_{axis}": "i32:16" for tensor in tensors for axis in "blh"},
                **{f"{table}_ptr": "*fp32:16" for table in ("cos", "sin")},
                **{f"{table}_stride": "i32:16" for table in ("cos", "sin")},
                "positions_ptr": "*i64:16",
                "positions_stride_b": "i32:16",
                "num_positions": "i32:16",
                "length": "i32:16",
                "num_q_heads": "i32:16" if num_heads % 16 == 0 else "i32",
                "num_k_heads": "i32:16" if num_k_heads % 16 == 0 else "i32",
                "half": "i32:16",
                "head_dim": "i32:16",
            },
            {
                **{f"{tensor}_stride_n": 1 for tensor in tensors},
                "positions_stride_l": 1,
                "INVERSE": inverse,
                **chosen,
            },
            num_warps=warps,
            min_vector_bits=128,
        )

    return [*(make(name) for name in shapes), make("llama_8b", inverse=True), make("llama_8b", "fp32")]


def _gated() -> list[Signature]:
    def make(name: str, kernel: Any, names: tuple[str, ...], dtype: str, activation: str, width: str) -> Signature:
        absent = {"value_stride": 0} if kernel is gated_gradients_kernel and "value" not in names else {}
        return Signature(
            f"gated_{name}_{activation}_{dtype}{'' if width == 'i32:16' else '_long'}",
            kernel,
            {
                **{f"{tensor}_ptr": f"*{dtype}:16" for tensor in names},
                **{f"{tensor}_stride": width for tensor in names},
                "width": width,
            },
            {"ACTIVATION": activation, "BLOCK": GATED_BLOCK, **absent},
            num_warps=GATED_WARPS,
            min_vector_bits=128,
        )

    forward = ("gate", "up", "out")
    backward = ("grad", "gate", "up", "dgate", "dup")
    made = []
    for dtype, activation, width in (
        *(("bf16", activation, "i32:16") for activation in ACTIVATIONS),
        ("bf16", "silu", "i64:16"),
        ("fp32", "silu", "i32:16"),
    ):
        made.append(make("forward", gated_kernel, forward, dtype, activation, width))
        made.append(make("backward", gated_gradients_kernel, backward, dtype, activation, width))
    value = (*backward, "value")
    return [*made, make("backward_value", gated_gradients_kernel, value, "bf16", "silu", "i32:16")]
