"""Compile every kernel for every architecture without a GPU: `python -m tests.kernels.compile_all`, JSON on stdout.

All of its variants, or with arguments those whose names contain one of them; `representative` is one of each kernel.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from typing import Any

import triton
from dist_cpt_kernels.dispatch import INTERPRETED
from dist_cpt_kernels.signatures import Signature, signatures
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90, 100)
# One of each kernel, of its variants one that needs many registers.
REPRESENTATIVE = frozenset({
    "cross_entropy_fused_all_terms_bf16",
    "scale_fp32_bf16",
    "nf4_bf16_u8",
    "embedding_runs_bf16_fp32",
    "embedding_join_fp32",
    "adamw_bf16_copy",
    "sum_squares_bf16",
    "add_up",
    "rms_norm_added_bf16_4096",
    "rms_norm_back_added_bf16_4096",
    "rms_norm_shares_bf16",
    "rms_norm_parts_fp32",
    "rope_llama_8b_bf16",
    "gated_forward_silu_bf16",
    "gated_backward_value_silu_bf16",
})  # fmt: skip


def compile_one(signature: Signature, architecture: int) -> dict[str, Any]:
    """Registers, spilled bytes, shared memory and the width of global loads and stores in bits."""
    names = signature.kernel.arg_names
    unknown = [name for name in (*signature.arguments, *signature.constants) if name not in names]
    if unknown:
        raise ValueError(f"{signature.name}: no argument named {unknown}")
    types, constants, attributes = {}, {}, {}
    for place, name in enumerate(names):
        kind, _, multiple = signature.arguments.get(name, "constexpr").partition(":")
        types[name] = kind
        if kind == "constexpr":
            constants[(place,)] = signature.constants.get(name)
        if multiple:
            attributes[(place,)] = [["tt.divisibility", int(multiple)]]
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(
            ASTSource(signature.kernel, types, constants, attributes),
            target=GPUTarget("cuda", architecture, 32),
            options={
                "num_warps": signature.num_warps,
                "num_stages": signature.num_stages,
                "enable_fp_fusion": signature.fp_fusion,
            },
        )
    ptx = compiled.asm["ptx"]
    return {
        "name": signature.name,
        "architecture": architecture,
        "registers": _number(r"Used (\d+) registers", log.getvalue()),
        "spilled_bytes": _number(r"(\d+) bytes spill stores", log.getvalue()),
        "shared_bytes": compiled.metadata.shared,
        "num_warps": signature.num_warps,
        "load_bits": _widest("ld", ptx),
        "store_bits": _widest("st", ptx),
        "min_vector_bits": signature.min_vector_bits,
        "fused_multiply_adds": len(re.findall(r"\bfma\.rn\.f32", ptx)),
        "uncertain_products": len(re.findall(r"\b(?:mul|add|sub)\.f32", ptx)),
    }


def _number(pattern: str, log: str) -> int:
    found = re.findall(pattern, log)
    if len(found) != 1:
        raise RuntimeError(f"ptxas said nothing like {pattern!r}:\n{log}")
    return int(found[0])


def _widest(kind: str, ptx: str) -> int:
    accesses = re.findall(rf"\b{kind}\.global(?:\.[a-zA-Z0-9_:]+)*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx)
    return max((int(count or 1) * int(bits) for count, bits in accesses), default=0)


def main() -> None:
    if INTERPRETED:
        raise SystemExit("set TRITON_INTERPRET=0: what is interpreted is not compiled")
    knobs.compilation.always_compile = True  # a cached binary comes without the log
    knobs.nvidia.dump_ptxas_log = True
    wanted = sys.argv[1:]
    if wanted == ["representative"]:
        chosen = [one for one in signatures() if one.name in REPRESENTATIVE]
    else:
        chosen = [one for one in signatures() if not wanted or any(part in one.name for part in wanted)]
    print(json.dumps([compile_one(one, architecture) for one in chosen for architecture in ARCHITECTURES]))


if __name__ == "__main__":
    main()
