"""A base that is read by slices: bit for bit the one that is read whole, on every number of ranks, in less memory."""

from __future__ import annotations

from typing import Any

import pytest

from tests.contract.engines import ENGINES

SLICED = ("fsdp-full", "zero-3")
QUICK = {("fsdp-full", 2, "lora-tied"), ("zero-3", 2, "nf4"), ("zero-3", 2, "full"), ("fsdp-full", 2, "fp8")}


@pytest.mark.parametrize(
    ("engine", "ranks", "variant"),
    [
        pytest.param(*cell, marks=() if cell in QUICK else pytest.mark.matrix)
        for cell in (
            (engine, ranks, variant)
            for engine in SLICED
            for ranks in (1, 2, 4)
            for variant in ("lora", "lora-tied", "full", "nf4", "int8", "fp8")
        )
    ],
)
def test_every_bit_is_that_of_the_whole_base(engine: str, ranks: int, variant: str, pool: Any, base: Any) -> None:
    options = {"base": base(variant), "variant": variant}
    case = "tests.contract.cases:whole_weights"
    [(whole, num_bytes)] = pool(1).run(case, engine=ENGINES["single"], num_bytes={}, **options)
    assert len(whole) > 20
    for by_slices, _ in pool(ranks).run(case, engine=ENGINES[engine], num_bytes=num_bytes, **options):
        assert by_slices == whole


LAYERS, HIDDEN, FFN = 12, 512, 1536
LAYER = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN  # elements
LARGE = {"hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
         "num_key_value_heads": 4}  # fmt: skip
MIB = 2**20
# The adapter and its moments, what the sharding library keeps of its own, and what malloc does not give back.
AROUND = 30 * MIB


@pytest.mark.matrix
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("engine", SLICED)
def test_a_rank_needs_its_shards_and_two_layers(engine: str, ranks: int, pool: Any, base: Any) -> None:
    """Of a base in fp32 on the disk, in bf16 in memory; read whole it takes all of it on every rank."""
    model = LAYERS * LAYER * 2
    for peak in pool(ranks).run(
        "tests.contract.cases:peak_of_building", base=base("lora", **LARGE), engine=ENGINES[engine], variant="lora"
    ):
        assert peak <= model / ranks + 2 * LAYER * 4 + AROUND


# 24 layers of 49 MiB: 1.15 GiB in fp32, more than a process may have.
TOO_LARGE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 8,
             "num_key_value_heads": 8}  # fmt: skip
WHOLE = 24 * (4 * 1024 * 1024 + 3 * 1024 * 2816) * 4


@pytest.mark.matrix
@pytest.mark.parametrize("engine", SLICED)
def test_a_base_too_large_for_one_rank_trains_on_two(engine: str, pool: Any, base: Any) -> None:
    """Under an enforced limit of 85 % of its size for each process; one rank alone fails on the same limit."""
    options = {
        "base": base("lora", **TOO_LARGE),
        "engine": ENGINES[engine],
        "variant": "lora",
        "room": WHOLE * 85 // 100,
    }
    case = "tests.contract.cases:step_under_a_limit"
    assert pool(2).run(case, **options) == ["trained", "trained"]
    [alone] = pool(1).run(case, **options)
    assert "alloc" in alone or "memory" in alone.lower(), alone
