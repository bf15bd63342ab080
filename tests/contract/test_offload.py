"""What waits in host memory: the same training state, bit for bit, and what each engine's own mechanism is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.contract.compare import assert_same
from tests.contract.engines import ENGINES

QUICK = {("single", 1, "lora", "optimizer"), ("fsdp-full", 2, "nf4", "both"), ("zero-3", 2, "lora", "base")}
CELLS = [
    ("single", 1, "lora", "optimizer"),
    ("single", 1, "full", "optimizer"),
    ("single", 1, "8bit", "optimizer"),
    ("fsdp-full", 1, "lora", "both"),
    *(("fsdp-full", 2, variant, "both") for variant in ("lora", "lora-tied", "nf4", "int8", "fp8")),
    ("fsdp-full", 2, "lora", "base"),
    ("fsdp-full", 2, "lora", "optimizer"),
    ("fsdp-full", 2, "full", "optimizer"),
    ("fsdp-full", 2, "8bit", "optimizer"),
    ("fsdp-hybrid", 4, "lora", "both"),
    ("fsdp-trainable", 2, "lora", "optimizer"),
    ("fsdp-trainable", 2, "nf4", "optimizer"),
    ("zero-3", 2, "lora", "base"),
    ("zero-3", 2, "nf4", "base"),
    ("zero-3", 4, "lora", "base"),
]


def marked(cells: list[tuple[Any, ...]], quick: set[tuple[Any, ...]]) -> list[Any]:
    """All but the `quick` ones run with `make test-all` only."""
    return [pytest.param(*cell, marks=() if cell in quick else pytest.mark.matrix) for cell in cells]


@pytest.mark.parametrize(("engine", "ranks", "variant", "offload"), marked(CELLS, QUICK))
def test_no_bit_depends_on_where_it_waits(
    engine: str, ranks: int, variant: str, offload: str, pool: Any, base: Any
) -> None:
    """Four steps; and two with the state in host memory, then two from there with it and without."""

    def train(state: Any, first: int, last: int, **more: str) -> Any:
        return pool(ranks).run(
            "tests.contract.cases:train_from",
            base=base(variant),
            engine=ENGINES[engine] | more,
            variant=variant,
            state=state,
            first=first,
            last=last,
        )[0]

    _, numbers, unbroken = train(None, 1, 4)
    _, early, middle = train(None, 1, 2, offload=offload)
    for more in ({"offload": offload}, {}):
        read_back, late, end = train(middle, 3, 4, **more)
        assert_same(read_back, middle)
        assert early + late == numbers
        assert_same(end, unbroken)


def test_deepspeed_on_the_host_differs_by_the_rounding_of_its_norm(pool: Any, base: Any) -> None:
    """It takes the norm of each tensor first: the factor of clipping, and with it each first moment, moves so far."""
    plain, offloaded = (
        pool(2).run(
            "tests.contract.cases:train_from",
            base=base("lora"),
            engine=ENGINES["zero-3"] | {"offload": offload},
            variant="lora",
            state=None,
            first=1,
            last=1,
        )[0]
        for offload in ("none", "both")
    )
    assert_same(offloaded[0], plain[0])
    (loss, norm), (same_loss, other_norm) = plain[1], offloaded[1]
    assert same_loss == loss
    unit = 2.0**-24
    assert abs(other_norm - norm) <= 64 * unit * norm  # 64 tensors at most, of which each norm is rounded once
    allowed = abs(other_norm - norm) / norm + 4 * unit  # and the factor, the clipped gradient, the moment
    for key in (key for key in plain[2] if key.startswith("exp_avg.")):
        want, found = plain[2][key], offloaded[2][key]
        assert bool(((found - want).abs() <= allowed * want.abs()).all()), key
    assert any(torch.count_nonzero(plain[2][key]) for key in plain[2] if key.startswith("exp_avg."))


CONTRACT = [("single", 1, "optimizer"), ("fsdp-full", 2, "both"), ("zero-3", 2, "both")]


@pytest.mark.parametrize(("engine", "ranks", "offload"), marked(CONTRACT, {CONTRACT[2]}))
def test_a_bad_step_leaves_no_trace(engine: str, ranks: int, offload: str, pool: Any, base: Any) -> None:
    """One with a NaN on one rank, and one whose loss is over its limit."""
    options = {"base": base("lora"), "engine": ENGINES[engine] | {"offload": offload}, "variant": "lora"}
    (stats, (before, after, with_bad, without)) = pool(ranks).run(
        "tests.contract.cases:poisoned", weights="bf16", **options
    )[0]
    assert stats.skipped
    dropped = pool(ranks).run("tests.contract.cases:over_the_limit", weights="bf16", **options)[0]
    for state, left, one, other in ((before, after, with_bad, without), dropped):
        assert_same(left, state)
        assert one[0] == other[0]
        assert_same(one[1], other[1])


@pytest.mark.matrix
@pytest.mark.parametrize(("engine", "ranks", "offload"), CONTRACT)
def test_a_resume_is_bit_exact(engine: str, ranks: int, offload: str, pool: Any, base: Any) -> None:
    unbroken, resumed, rewound = pool(ranks).run(
        "tests.contract.cases:resume_twice",
        base=base("lora"),
        engine=ENGINES[engine] | {"offload": offload},
        variant="lora",
        half=3,
    )[0]
    for other in (resumed, rewound):
        assert other[0] == unbroken[0]
        assert_same(other[1], unbroken[1])


@pytest.mark.parametrize("offload", ["none", "base", "optimizer", "both"])
@pytest.mark.parametrize("engine", ["fsdp-full", "zero-3"])
def test_the_libraries_are_told_what_waits(engine: str, offload: str, pool: Any, base: Any) -> None:
    """On a CPU no tensor shows where it waits: the libraries' own attributes do."""
    for found in pool(2).run(
        "tests.contract.cases:on_host", base=base("lora"), engine=ENGINES[engine] | {"offload": offload}
    ):
        assert found == {"base": offload in ("base", "both"), "optimizer": offload in ("optimizer", "both")}


@pytest.mark.parametrize("weights", ["bf16", "fp32"])
def test_a_single_rank_has_masters_apart_from_what_computes(weights: str, pool: Any, base: Any) -> None:
    plain, offloaded = (
        pool(1).run(
            "tests.contract.plan_bytes:measured",
            base=base("lora"),
            engine=ENGINES["single"] | {"offload": offload},
            variant="lora",
            weights=weights,
        )[0]
        for offload in ("none", "optimizer")
    )
    masters = plain["trainable"] if weights == "fp32" else 0  # else they are apart anyway
    assert offloaded == plain | {"optimizer": plain["optimizer"] + masters}
