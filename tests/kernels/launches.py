"""The launches of the product's own operations at real sizes, recorded instead of run: what there is to compile.

Operations run on CPU tensors while each kernel's `run` is replaced. Only types, alignment, constants and options are
taken, so memory is allocated but hardly touched, and results are meaningless.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import dist_cpt_kernels as kernels
import torch
import triton
from dist_cpt_kernels import dispatch
from dist_cpt_kernels.gated import ACTIVATIONS
from dist_cpt_kernels.rms_norm import MAX_DIM, MAX_SHARED_DIM
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

BF16, FP32 = torch.bfloat16, torch.float32
NAMES = {BF16: "bf16", FP32: "fp32"}
T = 32  # tokens: a multiple of 16, as most sizes are
# heads, key heads, rotating pairs, head dim: grouped, odd groups, wide heads, a part of a head, one key head
HEADS = {
    "llama_8b": (32, 8, 64, 128),
    "llama_70b": (64, 8, 64, 128),
    "qwen2_7b": (28, 4, 64, 128),
    "gemma2_9b": (16, 8, 128, 256),
    "phi_2": (32, 32, 16, 80),
    "one_key_head": (8, 1, 128, 256),
}


@dataclass(frozen=True)
class Launch:
    """One kernel as it was launched, in the terms of Triton's compiler."""

    name: str  # of the case and the kernel, numbered from the second on
    kernel: Any
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]


def recorded() -> list[Launch]:
    """The launches of all cases, each specialisation once, named after the first case that launches it."""
    assert not dispatch.INTERPRETED, "set TRITON_INTERPRET=0: interpreted kernels cannot be compiled"
    dispatch.interpret_cpu_tensors = True
    backend = make_backend(GPUTarget("cuda", 90, 32))
    launches: dict[str, Launch] = {}
    case = ""

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, options = binder(*args, **kwargs)
        _, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, options)
        given = {key: kwargs[key] for key in ("num_warps", "enable_fp_fusion") if key in kwargs}
        key = repr((kernel.__name__, signature, constants, attributes, given))
        if key not in launches:
            name = f"{case} {kernel.__name__}"
            earlier = sum(launch.name.startswith(name) for launch in launches.values())
            name += f" {earlier + 1}" if earlier else ""
            launches[key] = Launch(name, kernel, signature, constants, attributes, given)

    for module in pkgutil.iter_modules(kernels.__path__):
        for value in vars(importlib.import_module(f"dist_cpt_kernels.{module.name}")).values():
            if isinstance(value, triton.JITFunction):
                value.run = partial(record, value)
    for case, run in cases():  # noqa: B007 - `record` reads the name
        run()
    return list(launches.values())


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    for dtype, name in NAMES.items():
        yield from _losses(dtype, name)
        yield from _norms(dtype, name)
        yield from _gated(dtype, name)
        yield f"nf4_{name}", partial(_nf4, dtype, nested=True)
        yield f"nf4_{name}_plain_scales", partial(_nf4, dtype, nested=False)
        yield f"fp8_{name}", partial(_fp8, dtype)
        for shape in HEADS:
            yield f"rope_{shape}_{name}", partial(_rope, dtype, *HEADS[shape])
        for master in dict.fromkeys((dtype, FP32)):
            yield f"embedding_{name}_{NAMES[master]}", partial(_embedding, dtype, master)
        yield f"adamw_{name}", partial(_adamw, dtype)
        yield f"adamw_8bit_{name}", partial(_adamw_8bit, dtype)
    yield "gated_silu_bf16_long", partial(_gated_gradients, BF16, "silu", 2**31 + 2**14)


def _backward(outs: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
    outs = (outs,) if isinstance(outs, torch.Tensor) else outs
    torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])


def _empty(*shape: int, dtype: torch.dtype, trains: bool = True) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype).requires_grad_(trains)


def _losses(dtype: torch.dtype, name: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    labels = torch.arange(T)

    def linear(master: torch.dtype, softcap: float | None, trains: bool) -> None:
        hidden, weight = _empty(T, 64, dtype=dtype, trains=trains), _empty(1024, 64, dtype=master, trains=trains)
        loss = kernels.linear_cross_entropy(hidden, weight, labels, softcap=softcap)[0]
        if trains:
            _backward(loss)

    for softcap, suffix in ((None, ""), (30.0, "_softcap")):
        for master in dict.fromkeys((dtype, FP32)):
            yield f"linear_cross_entropy_{name}_{NAMES[master]}{suffix}", partial(linear, master, softcap, True)
        yield f"linear_cross_entropy_{name}{suffix}_evaluated", partial(linear, dtype, softcap, False)


def _norms(dtype: torch.dtype, name: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    def alone(dim: int, trains: bool, casting: Any) -> None:
        x, weight = _empty(T, dim, dtype=dtype), _empty(dim, dtype=dtype, trains=trains)
        _backward(kernels.rms_norm(x, weight, casting=casting))

    def added(dim: int, trains: bool, casting: Any) -> None:
        x, residual = _empty(T, dim, dtype=dtype), _empty(T, dim, dtype=dtype)
        _backward(kernels.add_rms_norm(x, residual, _empty(dim, dtype=dtype, trains=trains), casting=casting))

    # one head, hidden sizes of 4096 and 5376, and the longest rows of both backward kernels
    for dim in (128, 4096, 5376, MAX_SHARED_DIM, MAX_DIM):
        for trains in (True, False):
            suffix = f"{name}_{dim}{'' if trains else '_frozen'}"
            if suffix != "fp32_128_frozen":  # ptxas of Triton 3.9 spills 4 bytes for sm_90: see docs/kernels.md
                yield f"rms_norm_{suffix}", partial(alone, dim, trains, "llama")
            yield f"add_rms_norm_{suffix}", partial(added, dim, trains, "llama")
    yield f"rms_norm_gemma_{name}", partial(alone, 4096, True, "gemma")
    yield f"add_rms_norm_gemma_{name}", partial(added, 4096, True, "gemma")


def _gated(dtype: torch.dtype, name: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    def halves(activation: Any) -> None:
        gate, up = _empty(T, 2 * 1024, dtype=dtype).chunk(2, dim=-1)
        _backward(kernels.gated(gate, up, activation))

    def contiguous(activation: Any) -> None:
        _backward(kernels.gated(_empty(T, 1024, dtype=dtype), _empty(T, 1024, dtype=dtype), activation))

    for activation in ACTIVATIONS:
        yield f"gated_{activation}_{name}", partial(contiguous, activation)
        yield f"gated_{activation}_{name}_halves", partial(halves, activation)
        yield f"gated_{activation}_{name}_by_hand", partial(_gated_gradients, dtype, activation, T * 1024)


def _gated_gradients(dtype: torch.dtype, activation: Any, size: int) -> None:
    x = torch.empty(size, dtype=dtype)
    kernels.gated(x, x, activation)
    kernels.gated_gradients(x, x, x, activation, want_value=True, overwrite=True)
    kernels.gated_gradients(x, x, x, activation)


def _nf4(dtype: torch.dtype, nested: bool) -> None:
    size = 64 * 256 * 16
    scales = kernels.NestedScales(torch.zeros(256), torch.zeros(16), torch.zeros(())) if nested else None
    absmax = torch.zeros(size // 64, dtype=torch.uint8 if nested else FP32)
    kernels.dequantize_nf4(torch.zeros(size // 2, dtype=torch.uint8), absmax, (size,), dtype, nested=scales)


def _fp8(dtype: torch.dtype) -> None:
    x = torch.zeros(T, 4096, dtype=dtype)
    for factor in (None, torch.zeros(4096)):
        kernels.quantize_rows(x, factor)


def _rope(dtype: torch.dtype, heads: int, kv_heads: int, half: int, head_dim: int) -> None:
    q, k = (_empty(1, T, count, head_dim, dtype=dtype) for count in (heads, kv_heads))
    cos, sin = kernels.rope_tables(torch.ones(half), T)
    _backward(kernels.rope(q, k, cos, sin, torch.arange(T)[None]))


def _embedding(dtype: torch.dtype, table: torch.dtype) -> None:
    kernels.embedding_gradient(torch.zeros(T, 4096, dtype=dtype), torch.arange(T), T, dtype=table)


def _adamw_8bit(grad: torch.dtype) -> None:
    params, grads, copies = [torch.zeros(4096)], [torch.zeros(4096, dtype=grad)], [torch.zeros(4096, dtype=BF16)]
    moments = [[(torch.zeros(4096, dtype=torch.uint8), torch.zeros(16))] for _ in range(2)]
    _, factor, skip = kernels.clip(kernels.sum_of_squares(grads), 1.0)
    options: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    options |= {
        "corrections": kernels.bias_corrections(torch.ones(()), (0.9, 0.95)),
        "grad_factor": factor,
        "skip": skip,
    }
    for copied in (None, copies):
        kernels.adamw_8bit_(params, grads, *moments, torch.zeros(4, 256), copies=copied, **options)


def _adamw(grad: torch.dtype) -> None:
    params, exp_avgs, exp_avg_sqs = ([torch.zeros(4096)] for _ in range(3))
    grads, copies = [torch.zeros(4096, dtype=grad)], [torch.zeros(4096, dtype=BF16)]
    _, factor, skip = kernels.clip(kernels.sum_of_squares(grads), 1.0)
    corrections = kernels.bias_corrections(torch.ones(()), (0.9, 0.95))
    options: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    options |= {"corrections": corrections, "grad_factor": factor, "skip": skip}
    for copied in (None, copies):
        kernels.adamw_(params, grads, exp_avgs, exp_avg_sqs, copies=copied, **options)
