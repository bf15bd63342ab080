"""A plan's bytes per rank against those of the real engines: parameters, gradients and optimizer within 2 %."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_cpt.plan.memory import Placement, gradient_bytes, state_bytes
from dist_cpt.plan.shapes import shapes_of
from dist_cpt.plan.step_model import moved_bytes
from dist_cpt.plan.tensors import training_of
from tests.contract.engines import ENGINES, grid
from tests.contract.model import BLOCKS_PER_STEP, recipe

# Large enough that what every rank has beside its shards, and the padding of these, are below the tolerance.
SIZES = {"hidden_size": 192, "intermediate_size": 320, "vocab_size": 640, "num_attention_heads": 6}
VARIANTS = ("lora", "lora-only", "lora-tied", "full", "8bit", "nf4", "int8", "fp8")
TOLERANCE = 0.02
FAST = [("single", 1, "nf4"), ("fsdp-full", 2, "fp8"), ("fsdp-full", 2, "lora"), ("zero-3", 2, "lora")]


@pytest.mark.parametrize(("engine", "ranks", "variant"), grid(*FAST, variants=VARIANTS))
def test_a_plan_predicts_the_bytes_of_a_rank(engine: str, ranks: int, variant: str, pool: Any, base: Any) -> None:
    folder = base(variant, **SIZES)
    settings = ENGINES[engine]
    found = pool(ranks).run(
        "tests.contract.plan_bytes:measured", base=folder, engine=settings, variant=variant, weights="bf16"
    )
    config = recipe(folder, settings, variant, "bf16")
    training = training_of(config, shapes_of(json.loads(Path(folder, "config.json").read_text())))
    shard_ranks = settings.get("dp_shard", ranks)
    placement = Placement(engine, ranks, shard_ranks, ranks)  # type: ignore[arg-type]
    predicted = dict(vars(state_bytes(training, placement)))
    if settings["kind"] != "zero":
        predicted["gradients"] = gradient_bytes(training, placement, BLOCKS_PER_STEP // ranks)
    largest = {part: max(rank[part] for rank in found) for part in found[0]}
    for part, size in largest.items():
        assert predicted[part] == pytest.approx(size, rel=TOLERANCE), (part, predicted, found)


@pytest.mark.parametrize(
    ("engine", "variant"),
    [
        ("fsdp-full", "lora"),
        *(
            pytest.param(*cell, marks=pytest.mark.matrix)
            for cell in (("fsdp-trainable", "lora"), ("fsdp-full", "full"))
        ),
    ],
)
@pytest.mark.parametrize("reduce", ["micro_batch", "step"])
def test_a_plan_predicts_what_a_step_moves(engine: str, variant: str, reduce: Any, pool: Any, base: Any) -> None:
    """As counted at the collectives, and the gradients that are whole until the last micro-batch."""
    folder, ranks, settings = base(variant, **SIZES), 2, ENGINES[engine] | {"reduce": reduce}
    (found, *_) = pool(ranks).run(
        "tests.contract.plan_bytes:moved", base=folder, engine=settings, variant=variant, weights="bf16"
    )
    config = recipe(folder, settings, variant, "bf16")
    training = training_of(config, shapes_of(json.loads(Path(folder, "config.json").read_text())))
    placement = Placement(engine, ranks, ranks, ranks, reduce)  # type: ignore[arg-type]
    accumulation = BLOCKS_PER_STEP // ranks
    gathered, reduced = moved_bytes(training, placement)
    predicted = {
        "gathered": accumulation * sum(gathered),
        "reduced": (accumulation if reduce == "micro_batch" else 1) * sum(reduced),
        "gradients": gradient_bytes(training, placement, accumulation),
    }
    assert predicted == found
