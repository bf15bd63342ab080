"""What runs on every rank: the bytes that an engine holds, for comparison with what a plan predicts."""

from __future__ import annotations

from typing import Any

from torch import nn

from dist_cpt.engines.engine import InspectableEngine
from dist_cpt.engines.slices import storage_bytes
from tests.contract.cases import accumulate, running
from tests.contract.reference import learning_rates


def measured(base: str, engine: dict[str, Any], variant: str, weights: str) -> dict[str, int]:
    """Bytes between steps by part, and of the gradients after a step's micro-batches; the latter not under ZeRO."""
    with running(base, engine, variant, weights) as (built, groups):
        found = built.sharded_bytes()
        accumulate(built, step=1)
        if engine["kind"] != "zero":
            found["gradients"] = gradient_bytes(built)
        built.step(learning_rates(groups, 1))
    return found


def gradient_bytes(engine: InspectableEngine) -> int:
    """Of the storages that single or fsdp keeps from one micro-batch to the next."""
    kept: Any = getattr(engine, "_grads", None)
    if kept is None:
        parameters: dict[str, nn.Parameter] = getattr(engine, "_parameters")  # noqa: B009 - only checks read it
        kept = {name: p.grad.to_local() for name, p in parameters.items() if p.grad is not None}  # type: ignore[attr-defined]
    return storage_bytes(gradients=kept.values())["gradients"]
