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
