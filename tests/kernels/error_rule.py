"""When a kernel is right: its error is at most twice that of torch in the same dtype, against fp64."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def assert_right(found: Sequence[torch.Tensor], torchs: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> None:
    """Largest and relative L2 error of each `found`, with one fp32 rounding of the largest value allowed on top.

    torch may hit the nearest fp32 number by luck; nobody can do better than that one rounding on purpose.
    """
    for i, (ours, theirs, exact) in enumerate(zip(found, torchs, truth, strict=True)):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape == exact.shape
        rounding = 2.0**-24
        for kind, error, allowed in zip(
            ("largest", "relative"), errors(ours, exact), errors(theirs, exact), strict=True
        ):
            size = float(exact.abs().max()) if kind == "largest" and exact.numel() else 1.0
            assert error <= 2 * allowed + rounding * size, f"result {i}: {kind} error {error:.2e}, torch {allowed:.2e}"


def errors(found: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """(largest absolute error, relative L2 error)."""
    if not found.numel():
        return 0.0, 0.0
    difference = found.double() - truth.double()
    return float(difference.abs().max()), float(difference.norm() / truth.double().norm().clamp_min(1e-30))
