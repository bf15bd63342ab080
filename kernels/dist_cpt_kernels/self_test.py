"""Compare the kernels with their specification on this device: a second of work before a run of days.

T tokens, D model, F ffn, H heads, K kv heads, N head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch

from dist_cpt_kernels import reference
from dist_cpt_kernels.adamw import adamw_, bias_corrections
from dist_cpt_kernels.embedding import embedding
from dist_cpt_kernels.fp8 import fp8_linear, quantize_rows
from dist_cpt_kernels.gated import ACTIVATIONS, gated
from dist_cpt_kernels.linear_cross_entropy import linear_cross_entropy
from dist_cpt_kernels.rms_norm import add_rms_norm, rms_norm
from dist_cpt_kernels.rope import rope, rope_tables

TOKENS = 67
VOCAB = 1031
# Relative to a vector's length: one rounding to the dtype at the end, and a few on the way.
ALLOWED = {torch.float32: 2.0**-18, torch.bfloat16: 2.0**-6}

Function = Callable[..., torch.Tensor | Sequence[torch.Tensor]]


@cache
def self_test(
    device: torch.device, dtype: torch.dtype, *, dim: int, ffn: int, heads: int, kv_heads: int, head_dim: int
) -> dict[str, float]:
    """The largest relative error over the outputs and gradients of each operation in `dtype` (fp32 or bf16).

    Compared with the specification in fp64 on the same normally distributed inputs; expected below `ALLOWED[dtype]`.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    cos, sin = rope_tables(10000.0 ** -(torch.arange(head_dim // 2) / (head_dim // 2)), TOKENS)
    cos, sin = cos.to(device), sin.to(device)
    positions = torch.arange(TOKENS, device=device)[None]
    ids, labels = (torch.randint(0, VOCAB, (TOKENS,), generator=generator).to(device) for _ in range(2))
    x, residual, weight = normal(TOKENS, dim), normal(TOKENS, dim), normal(dim)
    query, key = normal(1, TOKENS, heads, head_dim), normal(1, TOKENS, kv_heads, head_dim)
    gate, up = normal(TOKENS, ffn), normal(TOKENS, ffn)
    table = normal(VOCAB, dim)
    cases: dict[str, tuple[Function, Function, tuple[torch.Tensor, ...]]] = {
        "rope": (
            lambda q, k: rope(q, k, cos, sin, positions),
            lambda q, k: reference.rope(q, k, cos.double(), sin.double(), positions),
            (query, key),
        ),
        "embedding": (lambda w: embedding(ids, w), lambda w: w[ids], (table,)),
        "linear_cross_entropy": (
            lambda h, w: linear_cross_entropy(h, w, labels)[0],
            lambda h, w: reference.linear_cross_entropy(h, w, labels)[0],
            (x / dim**0.5, table),
        ),
    }
    for casting in ("llama", "gemma"):
        settings: dict[str, Any] = {"eps": 1e-6, "casting": casting}
        for name, kernel, spec, inputs in (
            ("rms_norm", rms_norm, reference.rms_norm, (x, weight)),
            ("add_rms_norm", add_rms_norm, reference.add_rms_norm, (x, residual, weight)),
        ):
            cases[f"{name} {casting}"] = (partial(kernel, **settings), partial(spec, **settings), inputs)
    for activation in ACTIVATIONS:
        settings = {"activation": activation}
        cases[f"gated {activation}"] = (partial(gated, **settings), partial(reference.gated, **settings), (gate, up))
    return {name: _error(*case) for name, case in cases.items()}


def self_test_adamw(device: torch.device) -> float:
    """The relative error of one clipped AdamW update and of its bf16 copies: masters, moments; fp32.

    Compared with the specification in fp64 on the same inputs; expected below `ALLOWED[torch.float32]`.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = (1, 1031, 40000)
    scales = (0.02, 1e-3, 1e-4, 1e-4)  # master, gradient, moments
    lists = [[(torch.randn(size, generator=generator) * scale).to(device) for size in sizes] for scale in scales]
    lists[3] = [values.square() for values in lists[3]]
    exact = [[values.double() for values in values_] for values_ in lists]
    factor, skip = torch.tensor(0.3, device=device), torch.zeros((), device=device)
    options: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8, "grad_factor": factor, "skip": skip}
    copies = [torch.empty_like(values, dtype=torch.bfloat16) for values in lists[0]]
    corrections = bias_corrections(torch.tensor(3.0, device=device), options["betas"])
    adamw_(*lists, corrections=corrections, lr=1e-3, weight_decay=0.1, copies=copies, **options)
    step_size, denominator = 1e-3 / corrections[0], corrections[1].double()
    reference.adamw_(*exact, step_size=step_size, denominator=denominator, decay=1 - 1e-4, **options)
    pairs = [(ours, spec) for i in (0, 2, 3) for ours, spec in zip(lists[i], exact[i], strict=True)]
    rounded_right = all(bool(torch.equal(a, b.bfloat16())) for a, b in zip(copies, lists[0], strict=True))
    return max(_relative(ours, spec) for ours, spec in pairs) if rounded_right else math.inf


def self_test_fp8(device: torch.device) -> float:
    """The relative error of a product with an e4m3 weight and of its input gradient, in bf16.

    Compared with the specification on a CPU; infinite if one of its codes or scales differs; expected below
    `ALLOWED[torch.bfloat16]`.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = (TOKENS, 256), (320, 256), (TOKENS, 320)
    x, weight, grad = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    weight[0, 0], x[1] = 1e4, 0.0
    spec, rows = reference.quantize_rows(weight), quantize_rows(weight.to(device))
    if not all(torch.equal(a, b.cpu()) for a, b in zip(spec, rows, strict=True)):
        return math.inf
    results = []
    for linear, place, stored in ((fp8_linear, device, rows), (reference.fp8_linear, torch.device("cpu"), spec)):
        leaf = x.detach().to(place).requires_grad_()
        out = linear(leaf, *stored)
        results.append((out.detach().cpu(), torch.autograd.grad(out, leaf, grad.to(place))[0].cpu()))
    return max(_relative(ours, expected.double()) for ours, expected in zip(*results, strict=True))


def _error(function: Function, spec: Function, inputs: Sequence[torch.Tensor]) -> float:
    actual = _outputs_and_gradients(function, inputs)
    expected = _outputs_and_gradients(spec, [x.double() for x in inputs])
    errors = [_relative(a, b) for a, b in zip(actual, expected, strict=True)]
    return max(errors, key=lambda error: error if error == error else float("inf"))


def _outputs_and_gradients(function: Function, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(out.shape, generator=generator).to(out.device, inputs[0].dtype) for out in outputs]
    grads = torch.autograd.grad(outputs, leaves, [w.to(out.dtype) for w, out in zip(weights, outputs, strict=True)])
    return [*(out.detach() for out in outputs), *grads]


def _relative(actual: torch.Tensor, spec: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(actual.double() - spec) / torch.linalg.vector_norm(spec))  # host sync
