"""Each fused operation against torch eager, torch.compile and the fused kernels of others, in one run.

On a GPU: the shapes of Llama 3.1 8B and Gemma 2 9B at 8192 tokens, random data, several sets of inputs in turn so that
none is cached; the median of event timings, forward and forward with backward; the minimum memory traffic of an
operation (or the FLOPs of its products) relative to the copy bandwidth (the matmul rate) measured in the same run; and
the peak memory over the inputs. Competitors that can be imported are measured, the others are named.

On a CPU (--device cpu --small): the chunked loss against logits and cross-entropy, each side in a process of its own so
that peak memory is separate, in alternating rounds.

    python benchmarks/kernels.py [--ops rms_norm rope] [--seconds 600] [--write]
    python benchmarks/kernels.py --device cpu --small [--write]
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
# With its own folder on the path, this file would shadow Hugging Face's package of the same name.
sys.path[:] = [
    str(ROOT),
    str(ROOT / "kernels"),
    *(p for p in sys.path if Path(p or ".").resolve() != ROOT / "benchmarks"),
]

import dist_cpt_kernels as fused  # noqa: E402
from dist_cpt_kernels import reference  # noqa: E402
from dist_cpt_kernels.projection import NestedScales, Projection  # noqa: E402

NO_DEVICE = 64  # the exit code of configuration errors
WARM_UP, REPEATS = 5, 25
CACHE_BYTES = 256 * 2**20  # all sets of inputs together: several times a GPU's last-level cache
MAX_SETS = 8
SLEEP_CYCLES = (
    3_000_000  # over a millisecond, in which the host issues the whole call, so that host time is not measured
)
LORA_RANK = 64
OURS, EAGER, COMPILED = "dist_cpt_kernels", "torch_eager", "torch_compile"
PEERS = ("liger-kernel", "unsloth", "cut-cross-entropy", "quack-kernels", "bitsandbytes")


@dataclass(frozen=True)
class Shape:
    """T tokens, D model, F ffn, H heads, K key heads, N head dim, V vocab."""

    T: int
    D: int
    F: int
    H: int
    K: int
    N: int
    V: int
    gemma: bool


SHAPES = {
    "llama_3.1_8b": Shape(8192, 4096, 14336, 32, 8, 128, 128_256, gemma=False),
    "gemma_2_9b": Shape(8192, 3584, 14336, 16, 8, 256, 256_000, gemma=True),
}
SMALL_SHAPES = {
    "llama_small": Shape(2048, 512, 1408, 8, 2, 64, 32_000, gemma=False),
    "gemma_small": Shape(1024, 256, 704, 4, 2, 64, 128_256, gemma=True),
}


@dataclass
class Work:
    """One operation at one shape: its inputs, its implementations, and its minimum traffic or FLOPs."""

    op: str
    make: Callable[[], list[torch.Tensor]]  # leaves that need a gradient require it
    sides: dict[str, Callable[..., Any]]
    forward_bytes: int = 0
    both_bytes: int = 0  # forward and backward
    both_flops: int = 0
    overwritten: tuple[str, ...] = ()  # sides that overwrite their inputs
    differentiable: bool = True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    parser.add_argument("--ops", nargs="+", choices=OPS, metavar="OP", help=f"of {', '.join(OPS)}")
    parser.add_argument(
        "--seconds", type=float, default=3600.0, help="measurements not started by then are listed, not run"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--rounds", type=int, default=5, help="on a CPU")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU")
    parser.add_argument("--out", type=Path, help="write the result here as well")
    parser.add_argument("--write", action="store_true", help="to benchmarks/results/")
    parser.add_argument("--one", nargs=4, metavar=("BUILDER", "OP", "SHAPE", "SIDE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("kernels.py: no CUDA device; --device cpu --small measures the CPU path", file=sys.stderr)
        return NO_DEVICE
    if arguments.one:
        print(json.dumps(one_on_cpu(*arguments.one, arguments)))
        return 0
    result = on_gpu(arguments) if arguments.device == "cuda" else on_cpu(arguments)
    print(json.dumps(result, indent=2))
    name = re.sub(r"\W+", "_", torch.cuda.get_device_name().lower()) if arguments.device == "cuda" else "cpu"
    target = Path(__file__).parent / "results" / f"{date.today().isoformat()}_{name}_kernels.json"
    write(result, arguments.out)
    write(result, target if arguments.write else None)
    return 0


def write(result: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(json.dumps(result, indent=2) + "\n")


# -- the operations --------------------------------------------------------------------------------------------


def rms_norm(shape: Shape, device: str) -> list[Work]:
    casting, offset = ("gemma", 1.0) if shape.gemma else ("llama", 0.0)
    row_bytes = 2 * shape.T * shape.D
    ours = partial(fused.rms_norm, eps=1e-6, casting=casting)
    eager = partial(reference.rms_norm, eps=1e-6, casting=casting)
    sides = {OURS: ours, EAGER: eager, COMPILED: compiled(eager)}
    if not shape.gemma:
        sides["torch_rms_norm"] = lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-6)
        add(sides, "quack", "quack", lambda m: lambda x, w: m.rmsnorm(x, w, eps=1e-6))
    add(sides, "liger", "liger_kernel.ops.rms_norm", lambda m: lambda x, w: m.LigerRMSNormFunction.apply(
        x, w, 1e-6, offset, casting, False))  # fmt: skip
    add(sides, "unsloth", "unsloth.kernels.rms_layernorm", lambda m: lambda x, w: m.Fast_RMS_Layernorm.apply(
        x, w, 1e-6, shape.gemma))  # fmt: skip
    eager_added = partial(reference.add_rms_norm, eps=1e-6, casting=casting)
    added = {
        OURS: partial(fused.add_rms_norm, eps=1e-6, casting=casting),
        EAGER: eager_added,
        COMPILED: compiled(eager_added),
    }
    add(added, "liger", "liger_kernel.ops.fused_add_rms_norm", lambda m: lambda x, r, w:
        m.LigerFusedAddRMSNormFunction.apply(x, r, w, 1e-6, offset, casting, False))  # fmt: skip
    if not shape.gemma:
        add(added, "quack", "quack", lambda m: lambda x, r, w: m.rmsnorm(x, w, residual=r, eps=1e-6, prenorm=True))

    def make(rows: int) -> list[torch.Tensor]:
        xs = [rand(device, shape.T, shape.D) for _ in range(rows)]
        return [*xs, rand(device, shape.D)]

    return [
        Work("rms_norm", partial(make, 1), sides, 2 * row_bytes, 5 * row_bytes),
        Work("add_rms_norm", partial(make, 2), added, 4 * row_bytes, 8 * row_bytes),
    ]


def rope(shape: Shape, device: str) -> list[Work]:
    inv_freq = 10000.0 ** -(torch.arange(shape.N // 2, device=device) / (shape.N // 2))
    cos, sin = fused.rope_tables(inv_freq, shape.T)
    positions = (torch.arange(shape.T, device=device) % (shape.T // 4))[None]  # four packed documents
    wide_cos, wide_sin = (torch.cat((t, t), 1)[positions].to(torch.bfloat16) for t in (cos, sin))

    def tokens_first(op: Any, q: torch.Tensor, k: torch.Tensor) -> Any:
        return [x.transpose(1, 2) for x in op(q.transpose(1, 2), k.transpose(1, 2), cos, sin, positions)]

    eager = partial(tokens_first, reference.rope)
    sides: dict[str, Callable[..., Any]] = {
        OURS: partial(tokens_first, fused.rope),
        EAGER: eager,
        COMPILED: compiled(eager),
    }
    add(sides, "liger", "liger_kernel.ops.rope", lambda m: lambda q, k: m.LigerRopeFunction.apply(
        q, k, wide_cos, wide_sin))  # fmt: skip
    add(sides, "unsloth", "unsloth.kernels.rope_embedding", lambda m: lambda q, k: m.fast_rope_embedding(
        q, k, wide_cos[0], wide_sin[0]))  # fmt: skip

    def make() -> list[torch.Tensor]:
        # [B, H, L, N] as views of the projections' [B, L, H, N]
        return [leaf(rand(device, 1, shape.T, h, shape.N).detach().transpose(1, 2)) for h in (shape.H, shape.K)]

    one_way = 4 * shape.T * (shape.H + shape.K) * shape.N + 4 * shape.T * shape.N
    return [Work("rope", make, sides, one_way, 2 * one_way, overwritten=("liger", "unsloth"))]


def gated(shape: Shape, device: str) -> list[Work]:
    activation = "gelu_tanh" if shape.gemma else "silu"
    eager = partial(reference.gated, activation=activation)
    sides: dict[str, Callable[..., Any]] = {
        OURS: partial(fused.gated, activation=activation),
        EAGER: eager,
        COMPILED: compiled(eager),
    }
    place, name = ("geglu", "LigerGELUMulFunction") if shape.gemma else ("swiglu", "LigerSiLUMulFunction")
    add(sides, "liger", f"liger_kernel.ops.{place}", lambda m: lambda a, b: getattr(m, name).apply(a, b))
    size = 2 * shape.T * shape.F
    make = partial(lambda: [rand(device, shape.T, shape.F) for _ in range(2)])
    return [Work("gated", make, sides, 3 * size, 8 * size, overwritten=("liger",))]


def linear_cross_entropy(shape: Shape, device: str) -> list[Work]:
    softcap = 30.0 if shape.gemma else None
    labels = labels_of(shape, device)
    scale = 1.0 / shape.T

    def eager(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return reference.linear_cross_entropy(hidden, weight, labels, scale=scale, softcap=softcap)[0]

    sides: dict[str, Callable[..., Any]] = {
        OURS: lambda h, w: fused.linear_cross_entropy(h, w, labels, scale=scale, softcap=softcap)[0],
        EAGER: eager,
        COMPILED: compiled(eager),
        "products_alone": ProductsAlone.apply,
    }
    add(sides, "liger", "liger_kernel.transformers.functional", lambda m: lambda h, w:
        m.liger_fused_linear_cross_entropy(h, w, labels, softcap=softcap))  # fmt: skip
    add(sides, "cut_cross_entropy", "cut_cross_entropy", lambda m: lambda h, w: m.linear_cross_entropy(
        h, w, labels, softcap=softcap))  # fmt: skip
    if softcap is None:
        add(sides, "quack", "quack.linear_cross_entropy", lambda m: lambda h, w: m.chunked_linear_cross_entropy(
            h, w, labels, chunk_size=4096))  # fmt: skip

    def make(trained: bool) -> list[torch.Tensor]:
        weight = (shape.D**-0.5 * torch.randn(shape.V, shape.D, device=device)).to(torch.bfloat16)
        return [rand(device, shape.T, shape.D), weight.requires_grad_(trained)]

    product = 2 * shape.T * shape.D * shape.V
    return [
        Work("linear_cross_entropy", partial(make, True), sides, both_flops=3 * product),
        Work("linear_cross_entropy_frozen_head", partial(make, False), sides, both_flops=2 * product),
    ]


class ProductsAlone(torch.autograd.Function):
    """The matrix products of a chunked loss and nothing else: a lower bound of its time."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, chunk: int = 2048) -> torch.Tensor:
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.empty_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = hidden[rows] @ weight.T
            torch.mm(logits, weight, out=grad_hidden[rows])
            if grad_weight is None:
                continue
            if not hidden.is_cuda:
                grad_weight += logits.T @ hidden[rows]
            elif start == 0:
                torch.mm(logits.T, hidden[rows], out_dtype=torch.float32, out=grad_weight)
            else:
                torch.addmm(grad_weight, logits.T, hidden[rows], out_dtype=torch.float32, out=grad_weight)
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return grad_hidden.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (*ctx.saved_tensors, None)[: len(ctx.needs_input_grad)]


def lora(shape: Shape, device: str) -> list[Work]:
    """Q, K and V of one input, and the MLP; the base frozen."""
    qkv = [(shape.H * shape.N, shape.D), (shape.K * shape.N, shape.D), (shape.K * shape.N, shape.D)]
    mlp = [(shape.F, shape.D), (shape.F, shape.D), (shape.D, shape.F)]
    activation = "gelu_tanh" if shape.gemma else "silu"

    def make(layers: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
        tensors = [rand(device, shape.T, shape.D)]
        for out, width in layers:
            tensors.append((width**-0.5 * rand(device, out, width)).detach())
            tensors += [leaf((width**-0.5 * rand(device, *size)).detach()) for size in
                        ((LORA_RANK, width), (out, LORA_RANK))]  # fmt: skip
        return tensors

    def projections(tensors: Sequence[torch.Tensor]) -> list[Projection]:
        return [Projection(w, None, a, b, scaling=2.0) for w, a, b in zip(*[iter(tensors)] * 3, strict=True)]

    def linear(op: Any, x: torch.Tensor, *tensors: torch.Tensor) -> Any:
        return op(x, *projections(tensors))

    def whole_mlp(op: Any, x: torch.Tensor, *tensors: torch.Tensor) -> Any:
        return op(x, *projections(tensors), activation=activation)

    def sides(run: Any, name: str) -> dict[str, Callable[..., Any]]:
        eager = partial(run, getattr(reference, name))
        return {OURS: partial(run, getattr(fused, name)), EAGER: eager, COMPILED: compiled(eager)}

    def flops(layers: Sequence[tuple[int, int]]) -> int:
        return sum(2 * shape.T * (2 * out * width + 3 * LORA_RANK * (out + width)) for out, width in layers)

    return [
        Work("lora_qkv", partial(make, qkv), sides(linear, "lora_linear"), both_flops=flops(qkv)),
        Work("lora_mlp", partial(make, mlp), sides(whole_mlp, "lora_mlp"), both_flops=flops(mlp)),
    ]


def nf4(shape: Shape, device: str) -> list[Work]:
    size = (shape.F, shape.D)
    count = shape.F * shape.D
    num_scales = -(-count // 64)
    code_map = torch.linspace(-1.0, 1.0, 256, device=device)
    nested = NestedScales(code_map, torch.rand(-(-num_scales // 256), device=device), torch.ones((), device=device))

    def make() -> list[torch.Tensor]:
        return [torch.randint(0, 256, (n,), dtype=torch.uint8, device=device) for n in (count // 2, num_scales)]

    def run(op: Any, packed: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
        return op(packed, absmax, size, torch.bfloat16, nested=nested)

    eager = partial(run, reference.dequantize_nf4)
    sides: dict[str, Callable[..., Any]] = {OURS: partial(run, fused.dequantize_nf4), EAGER: eager}

    def bitsandbytes(m: Any) -> Callable[..., Any]:
        table = torch.tensor(reference.NF4_LEVELS, device=device)

        def decode(packed: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
            inner = m.QuantState(nested.absmax, code=nested.code_map, blocksize=256, dtype=torch.float32)
            state = m.QuantState(absmax, shape=torch.Size(size), code=table, blocksize=64, quant_type="nf4",
                                 dtype=torch.bfloat16, offset=nested.offset, state2=inner)  # fmt: skip
            return m.dequantize_4bit(packed[:, None], state)

        return decode

    add(sides, "bitsandbytes", "bitsandbytes.functional", bitsandbytes)
    moved = count // 2 + num_scales + 4 * len(nested.absmax) + 2 * count
    return [Work("dequantize_nf4", make, sides, moved, differentiable=False)]


def embedding(shape: Shape, device: str) -> list[Work]:
    # as in natural text, few ids make up most tokens
    ids = (shape.V * torch.rand(shape.T, device=device) ** 4).long().clamp_max(shape.V - 1)

    def eager(weight: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, weight)

    sides: dict[str, Callable[..., Any]] = {
        OURS: lambda weight: fused.embedding(ids, weight),
        EAGER: eager,
        COMPILED: compiled(eager),
    }
    add(sides, "liger", "liger_kernel.ops.experimental.embedding", lambda m: lambda w: m.LigerEmbeddingFunction.apply(
        w, ids))  # fmt: skip
    rows, table = 2 * shape.T * shape.D, 2 * shape.V * shape.D
    make = partial(lambda: [rand(device, shape.V, shape.D)])
    return [Work("embedding", make, sides, 2 * rows, 2 * rows + rows + table)]


def adamw(shape: Shape, device: str) -> list[Work]:
    """An embedding, and the LoRA matrices of one layer: fp32 masters, moments and gradients."""
    sizes = [(shape.V, shape.D), *[(LORA_RANK, shape.D)] * 7, *[(shape.D, LORA_RANK)] * 7]
    count = sum(a * b for a, b in sizes)
    groups = len(sizes)

    def make() -> list[torch.Tensor]:
        tensors = [torch.randn(size, device=device) * (1e-2 if kind else 1) for kind in range(4) for size in sizes]
        return [t.square_() if i >= 3 * groups else t for i, t in enumerate(tensors)]

    one, zero = torch.ones((), device=device), torch.zeros((), device=device)

    def ours(*tensors: torch.Tensor) -> None:
        p, g, m, v = (list(tensors[i * groups : (i + 1) * groups]) for i in range(4))
        fused.adamw_(p, g, m, v, corrections=fused.bias_corrections(one, (0.9, 0.95)), lr=1e-6, betas=(0.9, 0.95),
                     eps=1e-8, weight_decay=0.0, grad_factor=one, skip=zero)  # fmt: skip

    steps = [torch.ones((), device=device) for _ in sizes]

    def torchs(*tensors: torch.Tensor) -> None:
        p, g, m, v = (list(tensors[i * groups : (i + 1) * groups]) for i in range(4))
        torch._fused_adamw_(p, g, m, v, [], steps, amsgrad=False, lr=1e-6, beta1=0.9, beta2=0.95,
                            weight_decay=0.0, eps=1e-8, maximize=False)  # fmt: skip

    norms: dict[str, Callable[..., Any]] = {
        OURS: lambda *t: fused.sum_of_squares(list(t)),
        "torch_foreach": lambda *t: torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(t)))),
    }
    return [
        Work("adamw", make, {OURS: ours, "torch_fused": torchs}, 28 * count, differentiable=False),
        Work("grad_norm", lambda: [torch.randn(size, device=device) for size in sizes], norms, 4 * count,
             differentiable=False),
    ]  # fmt: skip


OPS: dict[str, Callable[[Shape, str], list[Work]]] = {
    "rms_norm": rms_norm,
    "rope": rope,
    "gated": gated,
    "linear_cross_entropy": linear_cross_entropy,
    "lora": lora,
    "nf4": nf4,
    "embedding": embedding,
    "adamw": adamw,
}


def rand(device: str, *size: int) -> torch.Tensor:
    return torch.randn(size, device=device, dtype=torch.bfloat16).requires_grad_()


def leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_()


def labels_of(shape: Shape, device: str) -> torch.Tensor:
    return torch.randint(0, shape.V, (shape.T,), device=device)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under torch.compile, compiled at its first call."""
    return torch.compile(function, dynamic=False)


ABSENT: dict[str, str] = {}


def add(sides: dict[str, Callable[..., Any]], peer: str, module: str, build: Callable[[Any], Any]) -> None:
    """Add a competitor's function to the sides, or record why its module cannot be imported."""
    try:
        sides[peer] = build(importlib.import_module(module))
    except Exception as error:  # anything may fail with an unsupported version of torch
        ABSENT[f"{peer} ({module})"] = one_line(error)


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


# -- on a GPU ------------------------------------------------------------------------------------------------------


def on_gpu(arguments: argparse.Namespace) -> dict[str, Any]:
    deadline = time.monotonic() + arguments.seconds
    bandwidth, rate = copy_bandwidth(), matmul_rate()
    shapes = SMALL_SHAPES if arguments.small else SHAPES
    results: dict[str, Any] = {}
    not_reached: list[str] = []
    report: dict[str, Any] = {
        "what": "each fused operation against torch eager, torch.compile and the kernels of others",
        "date": date.today().isoformat(),
        "complete": False,
        "device": torch.cuda.get_device_name(),
        "versions": versions(),
        "absent": ABSENT,
        "without_torch_compile": arguments.no_compile,
        "not_reached_in_time": not_reached,
        "copy_bandwidth_tb_per_s": round(bandwidth / 1e12, 3),
        "matmul_tflop_per_s": round(rate / 1e12, 1),
        "shapes": {name: vars(shape) for name, shape in shapes.items()},
        "units": "us: microseconds, median of event timings; fraction: of the copy bandwidth or the matmul rate "
        "measured here; peak_mib: over the inputs, in one forward and backward",
        "results": results,
    }
    for shape_name, shape in shapes.items():
        for op in arguments.ops or OPS:
            torch.manual_seed(0)
            for work in OPS[op](shape, arguments.device):
                measured = results.setdefault(shape_name, {}).setdefault(work.op, {})
                for side, run in work.sides.items():
                    if side == COMPILED and arguments.no_compile:
                        continue
                    if time.monotonic() > deadline:
                        not_reached.append(f"{shape_name} {work.op} {side}")
                        continue
                    print(f"{shape_name} {work.op} {side}", file=sys.stderr, flush=True)
                    measured[side] = guarded(partial(measure, work, side, run, bandwidth, rate))
                compare(measured)
                write(report, arguments.out)  # now, since a competitor's compiler may take very long
    report["complete"] = True
    return report


def guarded(measurement: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The measurement, or why it failed."""
    try:
        return measurement()
    except Exception as error:
        return {"failed": one_line(error)}
    finally:
        torch.cuda.empty_cache()
        torch.compiler.reset()


def measure(work: Work, side: str, run: Callable[..., Any], bandwidth: float, rate: float) -> dict[str, Any]:
    first = work.make()
    size = sum(t.numel() * t.element_size() for t in first)
    sets = [first, *(work.make() for _ in range(min(MAX_SETS, max(2, CACHE_BYTES // size)) - 1))]
    kept = [[t.detach().clone() for t in inputs] for inputs in sets] if side in work.overwritten else None
    outs = outputs_of(run(*first))
    # one allocation per set, so that upstream gradients are not cached either
    upstream = [[torch.randn_like(out) if out.ndim else torch.ones_like(out) for out in outs] for _ in sets]
    result: dict[str, Any] = {}
    if EAGER in work.sides and side not in (EAGER, "products_alone") and outs:
        refresh(sets, kept, 0)
        result["difference_from_eager"] = difference(run(*first), work.sides[EAGER](*(kept[0] if kept else first)))
    del outs

    def forward(i: int) -> Any:
        return run(*sets[i])

    def both(i: int) -> Any:
        wanted = [t for t in sets[i] if t.requires_grad]
        return torch.autograd.grad(outputs_of(run(*sets[i])), wanted, upstream[i])

    result["forward_us"] = time_us(forward, sets, kept)
    if work.forward_bytes:
        result["forward_fraction"] = round(work.forward_bytes / bandwidth / result["forward_us"] * 1e6, 3)
    if work.differentiable:
        result["both_us"] = time_us(both, sets, kept)
        bound = work.both_bytes / bandwidth + work.both_flops / rate
        result["both_fraction"] = round(bound / result["both_us"] * 1e6, 3)
    refresh(sets, kept, 0)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    (both if work.differentiable else forward)(0)
    result["peak_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    return result


def outputs_of(outs: Any) -> list[torch.Tensor]:
    return [] if outs is None else [outs] if isinstance(outs, torch.Tensor) else list(outs)


def refresh(sets: Sequence[Sequence[torch.Tensor]], kept: Any, i: int) -> None:
    """Restore the values that an operation overwrote."""
    if kept is not None:
        with torch.no_grad():
            for tensor, values in zip(sets[i], kept[i], strict=True):
                tensor.copy_(values)


def difference(found: Any, expected: Any) -> float:
    ours, theirs = outputs_of(found)[0].detach().float(), outputs_of(expected)[0].detach().float()
    return float(f"{float((ours - theirs).norm() / theirs.norm().clamp_min(1e-30)):.2e}")


def time_us(step: Callable[[int], Any], sets: Sequence[Any], kept: Any) -> float:
    """Median time of one call, over all sets of inputs in turn."""
    pairs = []
    for number in range(WARM_UP + REPEATS):
        i = number % len(sets)
        refresh(sets, kept, i)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SLEEP_CYCLES)
        start.record()
        step(i)
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return round(1e3 * statistics.median(start.elapsed_time(end) for start, end in pairs[WARM_UP:]), 2)


def compare(measured: dict[str, dict[str, Any]]) -> None:
    """How many times faster ours is than each other side."""
    ours = measured.get(OURS, {})
    key = "both_us" if "both_us" in ours else "forward_us"
    for side, theirs in list(measured.items()):
        if side != OURS and key in theirs and key in ours:
            theirs["times_ours"] = round(theirs[key] / ours[key], 3)


def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy of 1 GiB."""
    sets = [torch.empty(2, 2**30, dtype=torch.uint8, device="cuda").random_() for _ in range(2)]
    return 2 * 2**30 / time_us(lambda i: sets[i][0].copy_(sets[i][1]), sets, None) * 1e6


def matmul_rate() -> float:
    """FLOP/s of bf16 products of 8192 x 8192 random matrices."""
    sets = [[torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2)] for _ in range(3)]
    return 2 * 8192**3 / time_us(lambda i: sets[i][0] @ sets[i][1], sets, None) * 1e6


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "triton", *PEERS):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


# -- on a CPU ------------------------------------------------------------------------------------------------------


def on_cpu(arguments: argparse.Namespace) -> dict[str, Any]:
    if not arguments.small:
        raise SystemExit("kernels.py: --device cpu needs --small: the sizes of real models take hours there")
    results: dict[str, Any] = {}
    load_before = os.getloadavg()
    for shape in SMALL_SHAPES:
        for op in arguments.ops or ["linear_cross_entropy"]:
            for work in OPS[op](SMALL_SHAPES[shape], "cpu"):
                names = [side for side in work.sides if side in (OURS, EAGER)]
                runs: dict[str, list[dict[str, Any]]] = {side: [] for side in names}
                for number in range(arguments.rounds):
                    # The order alternates, so that drift of the machine favours no side.
                    for side in sorted(names, reverse=bool(number % 2)):
                        runs[side].append(in_a_process([op, work.op, shape, side], arguments))
                results.setdefault(shape, {})[work.op] = summary(runs)
    return {
        "what": "the path of a CPU: the chunked loss against logits and cross-entropy, forward and backward, bf16",
        "date": date.today().isoformat(),
        "machine": {"cores": len(os.sched_getaffinity(0)), "processor": processor(), "threads": arguments.threads},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "rounds": arguments.rounds,
        "sides": {OURS: "the public function, as the training loop calls it", EAGER: "its plain specification"},
        "units": "seconds: elapsed, of each round the fastest of three calls; cpu_seconds: of this process, less "
        "disturbed by others; peak_mib: resident memory over that of the inputs",
        "not_compared_here": "kernels and those of others run on a GPU only",
        "shapes": {name: vars(shape) for name, shape in SMALL_SHAPES.items()},
        "results": results,
    }


def in_a_process(one: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--device", "cpu", "--small", "--threads", str(arguments.threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
    done = subprocess.run([*command, "--one", *one], env=environment, check=True, capture_output=True)
    return json.loads(done.stdout)


def one_on_cpu(builder: str, op: str, shape: str, side: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One side in this process: three timed calls after the first, and the peak over the inputs."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    work = next(work for work in OPS[builder](SMALL_SHAPES[shape], "cpu") if work.op == op)
    inputs = work.make()
    wanted = [t for t in inputs if t.requires_grad]
    before = status_mib("VmRSS")
    seconds, cpu_seconds, first = [], [], 0.0
    for _ in range(4):
        start, cpu_start = time.perf_counter(), time.process_time()
        outs = outputs_of(work.sides[side](*inputs))
        if work.differentiable:
            torch.autograd.grad(outs, wanted, [torch.ones_like(out) for out in outs])
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
        first = float(outs[0].detach().float().flatten()[0])
    return {
        "seconds": min(seconds[1:]),
        "cpu_seconds": min(cpu_seconds[1:]),
        "peak_mib": status_mib("VmHWM") - before,
        "first_value": first,
    }


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the rounds, ours over theirs, after a check that both computed the same."""
    first = {side: rounds[0]["first_value"] for side, rounds in runs.items()}
    if abs(first[OURS] - first[EAGER]) > 0.02 * max(1.0, abs(first[EAGER])):
        raise SystemExit(f"not the same work: {first}")
    found: dict[str, Any] = {
        side: {
            key: round(statistics.median(one[key] for one in rounds), 4)
            for key in ("seconds", "cpu_seconds", "peak_mib")
        }
        | {"every_round_seconds": [round(one["seconds"], 4) for one in rounds]}
        for side, rounds in runs.items()
    }
    found["ours_over_eager"] = {
        key: round(found[OURS][key] / found[EAGER][key], 3) for key in ("seconds", "cpu_seconds", "peak_mib")
    }
    return found


def status_mib(key: str) -> float:
    """A memory figure of this process in MiB: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    sys.exit(main())
