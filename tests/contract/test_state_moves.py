"""The training state survives every change of engine and world size bit for bit, and is really used."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.contract.compare import State, assert_same
from tests.contract.engines import ENGINES, grid

# ZeRO-3 on 4 -> FSDP2 on 2 -> ZeRO-1 on 1 and back
CHAIN = [("zero-3", 4), ("fsdp-full", 2), ("zero-1", 1), ("fsdp-full", 2), ("zero-3", 4)]
NF4_CHAIN = [("zero-3", 2), ("fsdp-full", 2), ("single", 1), ("zero-3", 2)]
MORE_CHAINS = [
    [("zero-2", 4), ("fsdp-hybrid", 4), ("zero-3", 2), ("fsdp-trainable", 4), ("single", 1), ("zero-2", 2)],
    [("fsdp-trainable", 2), ("zero-1", 4), ("fsdp-hybrid", 2), ("zero-1", 2), ("fsdp-full", 4), ("zero-3", 1)],
]


@pytest.mark.parametrize(
    ("chain", "variant"),
    [
        pytest.param(CHAIN, "lora", id="lora", marks=pytest.mark.matrix),
        *(pytest.param(NF4_CHAIN, kind, id=kind, marks=pytest.mark.matrix) for kind in ("nf4", "int8", "fp8")),
        *(
            pytest.param(chain, variant, id=f"{i}-{variant}", marks=pytest.mark.matrix)
            for i, chain in enumerate([CHAIN, *MORE_CHAINS])
            for variant in ("lora", "lora-tied", "full", "nf4")
            if (i, variant) != (0, "lora")
        ),
    ],
)
def test_masters_and_moments_move(chain: list[tuple[str, int]], variant: str, pool: Any, base: Any) -> None:
    state: State | None = None
    for leg, (engine, ranks) in enumerate(chain):
        before, _, after = pool(ranks).run(
            "tests.contract.cases:train_from",
            base=base(variant),
            engine=ENGINES[engine],
            variant=variant,
            state=state,
            first=2 * leg + 1,
            last=2 * leg + 2,
        )[0]
        if state is not None:
            assert_same(before, state)
        assert all(torch.isfinite(tensor).all() for tensor in after.values())
        assert state is None or not any(torch.equal(after[key], state[key]) for key in state), "nothing moved"
        state = after


@pytest.mark.parametrize(("engine", "ranks", "variant"), grid(("zero-1", 2, "lora")))
def test_the_optimizer_uses_what_was_imported(engine: str, ranks: int, variant: str, pool: Any, base: Any) -> None:
    """One step from the same masters with and without the moments: with the same gradient g, the first moments
    afterwards differ by beta1 x the imported one, which a stale view of the state would hide from a read-back."""
    options = {"base": base(variant), "engine": ENGINES[engine], "variant": variant}
    run = pool(ranks).run
    _, _, trained = run("tests.contract.cases:train_from", **options, state=None, first=1, last=3)[0]
    forgotten = {key: v if key.startswith("master") else torch.zeros_like(v) for key, v in trained.items()}
    _, _, kept = run("tests.contract.cases:train_from", **options, state=trained, first=4, last=4)[0]
    _, _, lost = run("tests.contract.cases:train_from", **options, state=forgotten, first=4, last=4)[0]
    beta1 = 0.9
    for key in (key for key in kept if key.startswith("exp_avg.")):
        difference, want = kept[key] - lost[key], beta1 * trained[key]
        # two roundings of values no larger than the larger moment
        tolerance = 4 * 2.0**-24 * float(torch.maximum(kept[key].abs(), want.abs()).max())
        assert float((difference - want).abs().max()) <= tolerance, key
        master = "master" + key.removeprefix("exp_avg")
        assert not torch.equal(kept[master], lost[master]), f"{master} did not feel the moments"


FAST = (("single", 1, "lora"), ("fsdp-full", 2, "lora"), ("zero-3", 2, "lora"))


@pytest.mark.parametrize(
    ("engine", "ranks", "variant"),
    grid(*FAST, ("fsdp-full", 2, "8bit"), variants=("lora", "nf4", "int8", "fp8", "8bit")),
)
def test_resume_is_bit_exact(engine: str, ranks: int, variant: str, pool: Any, base: Any) -> None:
    """5 + export + import + 5 = 10 steps, into a fresh engine and into one that has trained on meanwhile."""
    unbroken, resumed, rewound = pool(ranks).run(
        "tests.contract.cases:resume_twice", base=base(variant), engine=ENGINES[engine], variant=variant, half=5
    )[0]
    for other in (resumed, rewound):
        assert other[0] == unbroken[0], "losses or norms differ"
        assert_same(other[1], unbroken[1])


@pytest.mark.parametrize(("engine", "ranks", "variant"), grid(*FAST, ("fsdp-hybrid", 4, "lora")))
def test_a_snapshot_keeps_its_step_while_training_continues(
    engine: str, ranks: int, variant: str, pool: Any, base: Any
) -> None:
    for direct, copied in pool(ranks).run(
        "tests.contract.cases:snapshot_while_training", base=base(variant), engine=ENGINES[engine], variant=variant
    )[0]:
        assert_same(copied, direct)


@pytest.mark.parametrize(("engine", "ranks"), [("fsdp-full", 2), ("zero-1", 2), ("zero-3", 2), ("zero-2", 4)])
def test_a_rank_reads_its_own_part_and_no_more(engine: str, ranks: int, pool: Any, base: Any) -> None:
    results = pool(ranks).run(
        "tests.contract.cases:elements_read", base=base("full"), engine=ENGINES[engine], variant="full"
    )
    whole = results[0][1]
    assert sum(asked for asked, _ in results) == whole
    assert max(asked for asked, _ in results) <= 1.1 * whole / ranks  # rows and partitions do not divide evenly


@pytest.mark.parametrize(("engine", "ranks"), [("fsdp-full", 2), ("zero-3", 2)])
def test_a_read_that_fails_on_one_rank_ends_on_all(engine: str, ranks: int, pool: Any, base: Any) -> None:
    messages = pool(ranks).run(
        "tests.contract.cases:failing_import", base=base("lora"), engine=ENGINES[engine], failing_rank=1
    )
    for message in messages:
        assert message.startswith("CheckpointError: ")
        assert "disk went away" in message
