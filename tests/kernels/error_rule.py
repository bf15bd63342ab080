"""A kernel is right if its error against fp64 is at most twice that of torch in the same dtype."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import torch

FEW = 64  # elements whose error is a sample too small to compare with


def assert_right(actual: Sequence[torch.Tensor], torchs: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> None:
    """Largest and relative L2 error of each `actual`, with one fp32 rounding of the largest value allowed on top.

    torch may hit the nearest fp32 number by chance, so one rounding is always allowed; and in a result of a few
    elements it may come far closer than it usually does, so there its median over all results counts if it is larger.
    """
    torch_errors = [errors(theirs, exact) for theirs, exact in zip(torchs, truth, strict=True)]
    typical = median(relative for _, relative in torch_errors)
    for i, (ours, theirs, exact) in enumerate(zip(actual, torchs, truth, strict=True)):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape == exact.shape
        rounding = 2.0**-24
        for kind, error, allowed in zip(("largest", "relative"), errors(ours, exact), torch_errors[i], strict=True):
            size = float(exact.abs().max()) if kind == "largest" and exact.numel() else 1.0
            allowed = max(allowed, typical * size) if exact.numel() < FEW else allowed
            assert error <= 2 * allowed + rounding * size, f"result {i}: {kind} error {error:.2e}, torch {allowed:.2e}"


def errors(actual: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """(largest absolute error, relative L2 error)."""
    if not actual.numel():
        return 0.0, 0.0
    difference = actual.double() - truth.double()
    return float(difference.abs().max()), float(difference.norm() / truth.double().norm().clamp_min(1e-30))
