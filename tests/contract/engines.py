"""The engines of the suite and how a test names them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.contract.model import FULL

ENGINES: dict[str, dict[str, Any]] = {
    "single": {"kind": "single"},
    "fsdp-full": {"kind": "fsdp", "shard": "full"},
    "fsdp-hybrid": {"kind": "fsdp", "shard": "hybrid", "dp_shard": 2},
    "fsdp-trainable": {"kind": "fsdp", "shard": "trainable"},
    "zero-1": {"kind": "zero", "stage": 1},
    "zero-2": {"kind": "zero", "stage": 2},
    "zero-3": {"kind": "zero", "stage": 3},
}
WORLDS = {name: (1,) if name == "single" else (2, 4) if name == "fsdp-hybrid" else (1, 2, 4) for name in ENGINES}


WEIGHTS = ("bf16", "fp32", "nf4")


def grid(*fast: tuple[Any, ...], variants: tuple[str, ...] = ("lora",)) -> list[Any]:
    """Every (engine, ranks, variant) as a parameter; those not in `fast` run with `make test-all` only."""
    cells = [(name, ranks, variant) for name in ENGINES for ranks in WORLDS[name] for variant in variants]
    unknown = set(fast) - set(cells)
    assert not unknown, f"no such cells: {unknown}"
    return [
        pytest.param(*cell, id="-".join(map(str, cell)), marks=() if cell in fast else pytest.mark.matrix)
        for cell in cells
    ]


def by_weights(cells: list[Any]) -> list[Any]:
    """Each cell with every type of weights that it can have; all but bf16 run with `make test-all`."""
    return [
        pytest.param(*cell.values, weights, id=f"{cell.id}-{weights}", marks=marks)
        for cell in cells
        for weights in WEIGHTS
        for marks in [cell.marks if weights == "bf16" else pytest.mark.matrix]
        if weights != "nf4" or cell.values[2] not in FULL  # quantised weights do not train
    ]
