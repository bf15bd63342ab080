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
from dist_cpt_kernels.linear_cross_entropy import SCALE_BLOCK, scale_kernel


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
    return [*_cross_entropy(), *_nf4(), *_embedding(), *_adamw()]


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
