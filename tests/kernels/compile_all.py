"""Compile every recorded launch for every architecture without a GPU; results as JSON on stdout.

`python -m tests.kernels.compile_all` compiles all launches, with arguments those whose names contain one of them, and
with `representative` one of each kernel.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.kernels.launches import Launch, recorded

ARCHITECTURES = (80, 90, 100)
# One launch of each kernel, one that needs many registers.
REPRESENTATIVE = (
    "linear_cross_entropy_bf16_bf16_softcap cross_entropy_kernel",
    "linear_cross_entropy_bf16_bf16 scale_kernel",
    "nf4_bf16 dequantize_nf4_kernel",
    "fp8_bf16 quantize_rows_kernel",
    "embedding_bf16_fp32 sum_runs_kernel",
    "embedding_bf16_fp32 join_runs_kernel",
    "adamw_bf16 adamw_kernel",
    "adamw_bf16 sum_squares_kernel",
    "adamw_8bit_bf16 adamw_8bit_kernel",
    "adamw_bf16 add_up_kernel",
    "add_rms_norm_bf16_4096 rms_norm_kernel",
    "add_rms_norm_bf16_4096 rms_norm_backward_kernel",
    "rms_norm_bf16_16384 weight_shares_kernel",
    "rms_norm_bf16_128 add_parts_kernel",
    "rope_llama_8b_bf16 rope_kernel",
    "gated_silu_bf16 gated_kernel",
    "gated_silu_bf16_by_hand gated_gradients_kernel",
)
NARROW = "add_up_kernel"  # one program over a few partial sums: the width of its loads does not matter


def compile_one(launch: Launch, architecture: int) -> dict[str, Any]:
    """Registers, spilled bytes, shared memory and the width of global loads and stores in bits."""
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(
            ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes),
            target=GPUTarget("cuda", architecture, 32),
            options=launch.options,
        )
    ptx = compiled.asm["ptx"]
    return {
        "name": launch.name,
        "kernel": launch.kernel.__name__,
        "architecture": architecture,
        "registers": _number(r"Used (\d+) registers", log.getvalue()),
        "spilled_bytes": _number(r"(\d+) bytes spill stores", log.getvalue()),
        "shared_bytes": compiled.metadata.shared,
        "num_warps": compiled.metadata.num_warps,
        "load_bits": _widest("ld", ptx),
        "store_bits": _widest("st", ptx),
        "min_load_bits": 0 if launch.kernel.__name__ == NARROW else 128,
        "exact": not launch.options.get("enable_fp_fusion", True),
        "fused_multiply_adds": len(re.findall(r"\bfma\.rn\.f32", ptx)),
        "uncertain_products": len(re.findall(r"\b(?:mul|add|sub)\.f32", ptx)),
    }


def _number(pattern: str, log: str) -> int:
    numbers = re.findall(pattern, log)
    if len(numbers) != 1:
        raise RuntimeError(f"no single match of {pattern!r} in the log of ptxas:\n{log}")
    return int(numbers[0])


def _widest(kind: str, ptx: str) -> int:
    accesses = re.findall(rf"\b{kind}\.global(?:\.[a-zA-Z0-9_:]+)*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx)
    return max((int(count or 1) * int(bits) for count, bits in accesses), default=0)


def main() -> None:
    knobs.compilation.always_compile = True  # a cached binary has no log
    knobs.nvidia.dump_ptxas_log = True
    launches, wanted = recorded(), sys.argv[1:]
    if wanted == ["representative"]:
        selected = [one for one in launches if one.name in REPRESENTATIVE]
    else:
        selected = [one for one in launches if not wanted or any(part in one.name for part in wanted)]
    compiled = [compile_one(one, architecture) for one in selected for architecture in ARCHITECTURES]
    print(json.dumps({"recorded": {one.name: one.kernel.__name__ for one in launches}, "compiled": compiled}))


if __name__ == "__main__":
    main()
