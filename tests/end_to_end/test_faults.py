"""Kill a run at any point, damage what it saved, run two of it: what is left always resumes, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dist_cpt.checkpoint.folders import published, superseded
from dist_cpt.checkpoint.outline import read_manifest
from dist_cpt.checkpoint.restore import newest_valid
from dist_cpt.checkpoint.store import SAVE_POINTS
from dist_cpt.checkpoint.verify import verify_checkpoint, verify_run
from dist_cpt.errors import CheckpointError
from dist_cpt.train.record import record_problems
from tests import tiny
from tests.run_ranks import RunningRanks, run_ranks
from tests.whole_run import rows, train

NUM_STEPS, EVERY = 12, 2
ENGINES = {
    "fsdp-full": "engine={kind: fsdp, shard: full}",
    "zero-3": "engine={kind: zero, stage: 3}",
    "zero-1": "engine={kind: zero, stage: 1}",
}
ON_ALL_RANKS = ("staged", "tensor", "written", "sidecars", "reread", "agreed")
PUBLISHED = ("renamed", "published", "pruned")  # a kill there comes after the checkpoint has its name
KEYS = ("step", "loss", "grad_norm", "lr", "position", "num_tokens", "tokens", "tokens_by_source")


@dataclass(frozen=True)
class Job:
    """One run that is started again and again, and the unbroken one that it must not differ from."""

    recipe: Path
    run: Path
    engine: str
    ranks: int
    log: Path
    unbroken: Job | None = None
    overrides: tuple[str, ...] = field(default=())

    def start(self, fault: str = "", **environment: str) -> RunningRanks:
        return RunningRanks(
            self.recipe,
            self.ranks,
            ENGINES[self.engine],
            *self.overrides,
            log=self.log,
            DIST_CPT_FAULT=fault,
            **environment,
        )

    def attempt(self, fault: str = "") -> list[int]:
        with self.start(fault) as running:
            return running.finish()

    def started(self) -> dict[str, Any]:
        """The event with which the newest attempt began."""
        return [row for row in rows(self.run / "events.jsonl") if row["kind"] in ("start", "resume")][-1]

    def code(self) -> int:
        return json.loads((self.run / "exit.json").read_text())["code"]

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


@pytest.fixture(scope="session")
def unbroken(made, tmp_path_factory) -> Callable[[str, int], Job]:
    """The run that nothing disturbs, once for an engine and a number of ranks; it keeps every checkpoint."""
    done: dict[tuple[str, int], Job] = {}

    def of(engine: str, ranks: int) -> Job:
        if (engine, ranks) not in done:
            folder = tmp_path_factory.mktemp(f"{engine}-{ranks}")
            job = _job(made, folder, engine, ranks, keep=1000, asynchronous=False)
            assert job.attempt() == [0] * ranks, job.said()
            done[engine, ranks] = job
        return done[engine, ranks]

    return of


@pytest.fixture
def new_job(made, unbroken, tmp_path) -> Callable[..., Job]:
    """`new_job(engine, ranks, **checkpoint)`: a run that has not been started."""

    def make(engine: str, ranks: int, **checkpoint: object) -> Job:
        return _job(made, tmp_path, engine, ranks, unbroken=unbroken(engine, ranks), **checkpoint)

    return make


def _job(made, folder: Path, engine: str, ranks: int, unbroken: Job | None = None, **checkpoint: object) -> Job:
    values = tiny.recipe(
        *made,
        folder,
        train={"tokens": NUM_STEPS * 8 * tiny.SEQ_LEN},
        checkpoint={"every_steps": EVERY, "retry_minutes": 0} | checkpoint,
    )
    values["data"] = {key: values["data"][key] for key in ("seq_len", "sources")}
    values["data"]["cache_dir"] = str(made[0].parent / "token-stores")
    recipe = tiny.write_recipe(folder / "recipe.yaml", values)
    return Job(recipe, folder / "tiny", engine, ranks, folder / "log", unbroken)


def require_state_of_unbroken(job: Job, step: int, why: str) -> None:
    """The newest checkpoint that holds is of this step and bit for bit the unbroken run's; nothing was damaged."""
    assert job.unbroken is not None
    path, skipped = newest_valid(job.run)
    assert skipped == [], why
    assert path is not None, why
    assert path.name == f"step-{step:08d}", why
    same_step = read_manifest(job.unbroken.run / "checkpoints" / path.name)
    assert read_manifest(path).state_sha256 == same_step.state_sha256, why


def require_as_unbroken(job: Job) -> None:
    """The finished run has every step and block once, the same numbers in every row, and the same last state."""
    assert job.unbroken is not None
    require_state_of_unbroken(job, NUM_STEPS, "at the end")
    here, there = (rows(folder / "metrics.jsonl") for folder in (job.run, job.unbroken.run))
    assert [row["step"] for row in here] == list(range(1, NUM_STEPS + 1))
    assert [row["position"] for row in here] == [[8 * i, 8 * i + 8] for i in range(NUM_STEPS)]
    for one, other in zip(here, there, strict=True):
        assert {key: one[key] for key in KEYS} == {key: other[key] for key in KEYS}
    assert set(map(tuple, verify_run(job.run).values())) == {()}
    assert record_problems(job.run) == []
    assert job.code() == 0
    started = job.started()
    if started["kind"] == "resume":
        certificate = json.loads((job.run / "certificate.json").read_text())
        assert (certificate["verdict"], certificate["attempt"]) == ("pass", started["attempt"])
    mine = [path.name for path in job.run.rglob(f"*.attempt-{started['attempt']}-*.tmp")]
    assert mine == [], "the attempt that finished left a staging folder"


# -- killed at every point of the protocol ------------------------------------------------------------------


def kill_in_turn(job: Job, faults: list[tuple[str, int]]) -> None:
    """Start the run once for each (point, rank), killed there at its next save, then once to its end.

    The first attempt saves once before. After each kill the newest checkpoint must hold and be the unbroken run's
    of that step, and the next attempt must go on from it.
    """
    held = 0
    for number, (point, victim) in enumerate(faults):
        begun_at = held
        held = held or (0 if point.startswith("trial.") else EVERY)
        step = held + EVERY
        planned = f"{point}:rank{victim}"
        if point == "save.aside":
            codes = attempt_that_finds_its_step_taken(job, step, f"{planned}:step{step}")
        else:
            codes = job.attempt(planned if point.startswith(("trial.", "restore")) else f"{planned}:step{step}")
        why = f"attempt {number} of {faults}, exit codes {codes}\n{job.said()}"
        assert codes[victim] == -signal.SIGKILL, why
        assert 0 not in codes, why
        if not point.startswith(("trial.", "restore")):
            require_began_at(job, number, begun_at, why)
        held += EVERY * (point.removeprefix("save.") in PUBLISHED)
        if held:
            require_state_of_unbroken(job, held, why)
        else:
            assert newest_valid(job.run) == (None, []), why
    assert job.attempt() == [0] * job.ranks, job.said()
    require_began_at(job, len(faults), held, "the last attempt")
    require_as_unbroken(job)


def require_began_at(job: Job, attempt: int, step: int, why: str) -> None:
    started = job.started()
    assert (started["attempt"], started["first_step"]) == (attempt, step), why
    assert started["resumed_from"] == (f"step-{step:08d}" if step else None), why


def attempt_that_finds_its_step_taken(job: Job, step: int, planned: str) -> list[int]:
    """While the run is on its way to `step`, a folder of that name appears, as a late older attempt would leave it."""
    with job.start(f"step:rank0:step{step}:freeze,{planned}") as running:
        running.freeze()
        folder = job.run / "checkpoints"
        shutil.copytree(folder / f"step-{step - EVERY:08d}", folder / f"step-{step:08d}")
        running.send(signal.SIGCONT)
        codes = running.finish()
    (aside,) = superseded(job.run)
    assert aside.name.startswith(f"step-{step:08d}.")
    return codes


def test_kills_all_over_a_save_beside_training(new_job) -> None:
    kill_in_turn(new_job("fsdp-full", 2, keep=1), [("save.tensor", 1), ("save.renamed", 0), ("save.agreed", 1)])


def test_kills_all_over_a_save_in_the_way_of_training(new_job) -> None:
    job = new_job("zero-3", 2, keep=1, asynchronous=False)
    kill_in_turn(job, [("save.manifest", 0), ("restore", 1), ("save.published", 0)])


def test_kills_before_the_first_checkpoint_and_where_a_step_is_taken(new_job) -> None:
    kill_in_turn(new_job("zero-1", 2, keep=1), [("trial.reread", 1), ("save.aside", 0), ("step", 1)])


def kills(engine: str, ranks: int, asynchronous: bool) -> list[tuple[str, int]]:
    """This engine's third of all (point, rank); over 2 and 4 ranks, beside and not, it meets every point."""
    everything = [(f"save.{point}", rank) for point in SAVE_POINTS for rank in range(ranks)]
    everything = [(point, rank) for point, rank in everything if rank == 0 or point[5:] in ON_ALL_RANKS]
    everything += [(point, rank) for point in ("step", "restore") for rank in range(ranks)]
    everything += [(f"trial.{point}", rank) for point in ON_ALL_RANKS for rank in range(ranks)]
    places = list(dict.fromkeys(point.partition(".")[2] or point for point, _ in everything))
    turn = list(ENGINES).index(engine) + 2 * asynchronous + ranks // 4
    mine = [(p, r) for p, r in everything if (places.index(p.partition(".")[2] or p) + r + turn) % 3 == 0]
    return sorted(mine, key=lambda fault: (not fault[0].startswith("trial."), not fault[0].startswith("save.")))


@pytest.mark.matrix
@pytest.mark.parametrize("asynchronous", [False, True], ids=["now", "beside"])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_kill_at_every_point_on_every_rank(new_job, engine: str, ranks: int, asynchronous: bool) -> None:
    kill_in_turn(new_job(engine, ranks, keep=1, asynchronous=asynchronous), kills(engine, ranks, asynchronous))


def test_the_matrix_kills_at_every_point_on_every_rank() -> None:
    seen: dict[str, set[str]] = {}
    for ranks in (2, 4):
        for asynchronous in (False, True):
            cells = [(engine, cell) for engine in ENGINES for cell in kills(engine, ranks, asynchronous)]
            assert len({cell for _, cell in cells}) == len(cells) == 5 + 2 * ranks + 12 * ranks
            for engine, (point, _) in cells:
                seen.setdefault(engine, set()).add(point)
    points = {*(f"save.{p}" for p in SAVE_POINTS), *(f"trial.{p}" for p in ON_ALL_RANKS), "step", "restore"}
    assert seen == {engine: points for engine in ENGINES}
