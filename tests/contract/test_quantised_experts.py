"""Experts in 4 and 8 bits: each frozen bit is that of one rank, and every rank has its share of the codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_cpt.plan.memory import Placement, state_bytes
from dist_cpt.plan.shapes import shapes_of
from dist_cpt.plan.tensors import training_of
from tests.contract.engines import ENGINES
from tests.contract.model import recipe
from tests.tiny_mixtures import write_moe

TOLERANCE = 0.02  # as in test_plan_bytes
QUICK = {("fsdp-full", 2, "nf4"), ("zero-3", 2, "int8")}
CELLS = [
    pytest.param(*cell, marks=() if cell in QUICK else pytest.mark.matrix)
    for cell in (
        (engine, ranks, weights)
        for engine, ranks in (("single", 1), ("fsdp-full", 2), ("fsdp-full", 4), ("zero-3", 2), ("zero-3", 4))
        for weights in ("nf4", "int8", "fp8")
    )
]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Qwen3-MoE most of whose weights are experts, which four ranks cannot share evenly."""
    wide = {"num_experts": 6, "moe_intermediate_size": 512, "hidden_size": 256, "vocab_size": 256}
    return str(write_moe(tmp_path_factory.mktemp("mixture") / "base", "qwen3_moe", **wide))


@pytest.mark.parametrize(("engine", "ranks", "weights"), CELLS)
def test_every_bit_is_that_of_one_rank_and_the_plan_knows_the_bytes(
    engine: str, ranks: int, weights: str, pool: Any, mixture: str
) -> None:
    case, options = "tests.contract.cases:whole_weights", {"base": mixture, "variant": weights}
    [(whole, num_bytes)] = pool(1).run(case, engine=ENGINES["single"], num_bytes={}, **options)
    assert sum(".experts." in name and name.endswith("_proj") for name in whole) == 2 * 2
    for by_slices, _ in pool(ranks).run(case, engine=ENGINES[engine], num_bytes=num_bytes, **options):
        assert by_slices == whole

    found = pool(ranks).run("tests.contract.plan_bytes:measured", engine=ENGINES[engine], weights="bf16", **options)
    config = recipe(mixture, ENGINES[engine], weights, "bf16")
    training = training_of(config, shapes_of(json.loads(Path(mixture, "config.json").read_text())))
    predicted = vars(state_bytes(training, Placement(engine, ranks, ranks, ranks)))  # type: ignore[arg-type]
    for part in ("frozen", "trainable", "optimizer"):
        assert predicted[part] == pytest.approx(max(rank[part] for rank in found), rel=TOLERANCE), part
