"""Attempts that freeze at any point, are overtaken, and wake up while others train: the run ends as the unbroken one.

What is done is a function of the seed. Every attempt freezes at a random point of the program; then later ones start
in its place, and it is woken beside them, or killed. It must end with 76, and the folder must stay as it was.
"""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dist_cpt.checkpoint.load import newest_valid
from dist_cpt.checkpoint.save import SAVE_POINTS
from dist_cpt.checkpoint.verify import verify_checkpoint, verify_run
from dist_cpt.run_folder.audit import record_problems
from dist_cpt.run_folder.checkpoints import published, read_manifest, step_of, superseded
from dist_cpt.run_folder.claim import CHANGES
from dist_cpt.run_folder.json_files import read_object
from dist_cpt.run_folder.names import (
    CERTIFICATE,
    CONTINUED,
    CONTRACT,
    EVALUATIONS,
    EXIT,
    INITIAL_ADAPTER,
    LINEAGE,
    MANIFEST,
    METRICS,
    PLAN,
    RECIPE,
    REPLACED,
    ROLLBACKS,
    RUN,
    SAMPLE,
    STATE,
    SUPERSEDED,
)
from tests import tiny
from tests.run_ranks import JOB, RunningRanks, with_plan_on_failure
from tests.whole_run import rows

EVERY, KEEP = 2, 2
FREEZE_SECONDS = 300.0
# Reached by runs of other recipes, or where a stranger takes a step's name; elsewhere in this folder and tests/unit.
ELSEWHERE = {"save.aside", *(f"change.{name}" for name in (CONTINUED, LINEAGE, ROLLBACKS, INITIAL_ADAPTER))}
# Before the first step.
EARLY = {"restore", "change.aside", "change.reinstate", *(f"change.{n}" for n in (CERTIFICATE, CONTRACT))}
EARLY |= {f"change.{change}" for change in CHANGES if change.endswith(".jsonl") and not change.startswith("append.")}
AT_THE_END = {f"change.{SAMPLE}", f"change.{PLAN}"}
POINTS = sorted({"step", "restore", *(f"save.{p}" for p in SAVE_POINTS), *(f"change.{c}" for c in CHANGES)} - ELSEWHERE)


@dataclass(frozen=True)
class Act:
    """One attempt: what happens before it starts, where it freezes, and what becomes of it."""

    point: str
    saves: int = 0  # published before that point counts
    asynchronous: bool = False
    damage: bool = False  # of the newest checkpoint, before it starts
    killed: bool = False  # in the end; else woken
    sleeps_for: int = 1  # attempts that start before that
    beside: bool = False  # woken while the later attempt runs; else while that is frozen, too

    def fault(self, begins_at: int) -> str:
        """The freeze, for an attempt that resumes at this step, and one in case that the point is not reached."""
        if self.point in AT_THE_END:
            return f"{self.point}:freeze"
        save = begins_at - begins_at % EVERY + EVERY * (1 + self.saves)
        in_case = f"step:step{save + EVERY + 2}:freeze"
        if self.point == f"change.{EXIT}":
            return f"step:step{begins_at + 2 + self.saves}:term,{self.point}:freeze,{in_case}"
        at = f":step{save}" if self.point.startswith("save.") else ""
        at = f":step{save + 2}" if self.point == "step" else at  # one step after a save
        return f"{self.point}{at}:freeze,{in_case}"

    @property
    def num_steps(self) -> int:
        """How far it comes, about."""
        return 0 if self.point in EARLY else EVERY * (1 + self.saves) + 2


def plan(seed: int, attempts: int, ranks: int = 1) -> list[Act]:
    """Every point about equally often, in any order; those at the end of the run come last."""
    dice = random.Random(seed)
    known = [point for point in POINTS if ranks == 1 or point != f"change.{EXIT}"]  # the other ranks have left by then
    points = [point for _ in range(-(-attempts // len(known))) for point in dice.sample(known, len(known))]
    del points[attempts:]
    acts = []
    for point in sorted(points, key=lambda point: point in AT_THE_END):
        if "rewound" in point or point == "change.prune":
            acts.append(Act("step", saves=2))  # leaves rows after a checkpoint, and enough checkpoints
        act = Act(
            point=point,
            saves=dice.randrange(2),
            asynchronous=dice.random() < 0.3,
            damage=point == "change.aside" or dice.random() < 0.1,
            killed=dice.random() < 0.25,
            sleeps_for=dice.choice((1, 1, 1, 2)),
            beside=dice.random() < 0.4,
        )
        acts.append(act)
    return acts


@dataclass
class Sleeper:
    """A frozen attempt."""

    number: int
    act: Act
    running: RunningRanks
    left: int  # attempts that are still to start before it is woken or killed


@dataclass
class Storm:
    """A plan carried out on one run folder."""

    recipe: Path
    run: Path
    ranks: int
    log: Path
    sleepers: list[Sleeper] = field(default_factory=list)
    best: int = 0  # step of the newest checkpoint that must still be there

    def carry_out(self, acts: Sequence[Act]) -> None:
        with ExitStack() as alive:
            for number, act in enumerate(acts):
                self._before(act)
                running = alive.enter_context(self._start(act.fault(self.newest()), act.asynchronous))
                self._claimed(number, running)
                due = self._due()
                for sleeper in [sleeper for sleeper in due if sleeper.act.beside]:
                    self._wake(sleeper)
                running.freeze(FREEZE_SECONDS)
                for sleeper in [sleeper for sleeper in due if not sleeper.act.beside]:
                    before = self.content()
                    self._wake(sleeper)
                    after = self.content()
                    if sleeper.act.point == "change.publish":  # between the check and the rename: one more checkpoint
                        after = {name: after.get(name) for name in before}
                    assert after == before, f"attempt {sleeper.number} changed the folder"
                self.sleepers.append(Sleeper(number, act, running, act.sleeps_for))
                self._require_nothing_lost()
            with self._start("", False) as last:
                self._claimed(len(acts), last)
                for sleeper in self.sleepers:
                    self._wake(sleeper)
                assert last.finish(FREEZE_SECONDS) == [0] * self.ranks

    def newest(self) -> int:
        """The step that an attempt would resume at; 0 is a start from nothing."""
        path, _ = newest_valid(self.run)
        return 0 if path is None else step_of(path)

    def content(self) -> dict[str, bytes | None]:
        """What an overtaken attempt must leave alone: records, and what is published or set aside."""
        files = [self.run / name for name in (*REPLACED, RUN, RECIPE)]
        files += [path / MANIFEST for path in (*published(self.run), *superseded(self.run))]
        return {str(path.relative_to(self.run)): path.read_bytes() if path.exists() else None for path in files}

    def _start(self, fault: str, asynchronous: bool) -> RunningRanks:
        options = (f"checkpoint.asynchronous={json.dumps(asynchronous)}",)
        return RunningRanks(self.recipe, self.ranks, *options, log=self.log, DIST_CPT_FAULT=fault, **JOB)

    def _claimed(self, number: int, running: RunningRanks) -> None:
        """Wait until the attempt has taken the folder over."""
        until = time.monotonic() + FREEZE_SECONDS
        while read_object(self.run / RUN).get("attempts") != number + 1:
            assert time.monotonic() < until
            assert all(process.is_alive() for process in running.processes)
            time.sleep(0.01)

    def _before(self, act: Act) -> None:
        checkpoints = published(self.run)
        if act.damage and len(checkpoints) > 1 and not any(map(verify_checkpoint, checkpoints)):
            (checkpoints[0] / STATE).write_bytes(b"{}")
            self.best = step_of(checkpoints[1])
        if act.point == "change.reinstate":  # as after a crash between the two renames of a step that is taken
            aside = self.run / "checkpoints" / SUPERSEDED
            aside.mkdir(exist_ok=True)
            for path in checkpoints:
                path.rename(aside / f"{path.name}.moved")

    def _due(self) -> list[Sleeper]:
        for sleeper in self.sleepers:
            sleeper.left -= 1
        due = [sleeper for sleeper in self.sleepers if sleeper.left <= 0]
        self.sleepers = [sleeper for sleeper in self.sleepers if sleeper.left > 0]
        return due

    def _wake(self, sleeper: Sleeper) -> None:
        running = sleeper.running
        if sleeper.act.killed:
            running.send(signal.SIGKILL)
            codes = {-signal.SIGKILL}
        else:
            until = time.monotonic() + FREEZE_SECONDS
            while any(process.is_alive() for process in running.processes) and time.monotonic() < until:
                with suppress(ProcessLookupError):
                    running.send(signal.SIGCONT)  # again and again: beside a save it may meet the other freeze, too
                time.sleep(0.02)
            codes = {76}
        ended = running.finish(FREEZE_SECONDS, grace_seconds=60.0)
        assert set(ended) == codes, f"attempt {sleeper.number} ended with {ended}"

    def _require_nothing_lost(self) -> None:
        """The newest checkpoint is never older than before; rows are once in the record."""
        newest = self.newest()
        assert newest >= self.best, f"step {self.best} is lost, {newest} is the newest"
        self.best = newest
        path = self.run / METRICS
        steps = [row["step"] for row in rows(path)] if path.exists() else []
        assert steps == list(range(1, len(steps) + 1))


def recipe(made: tuple[Path, Path], folder: Path, num_steps: int, ranks: int, every: int) -> Path:
    base, corpus = made
    values = tiny.recipe(
        base,
        corpus,
        folder,
        engine="single" if ranks == 1 else {"kind": "fsdp", "shard": "full"},
        batch={"global_tokens": 2 * tiny.SEQ_LEN, "micro_batch": 1},
        train={"tokens": num_steps * 2 * tiny.SEQ_LEN},
        checkpoint={"every_steps": every, "keep": KEEP, "trial": False},
        evaluate={"every_steps": 1, "max_blocks": 1},
        optim={"lr": 1e-3, "embedding_lr": 1e-4},
    )
    values["data"]["cache_dir"] = str(base.parent / "storm-stores")
    return tiny.write_recipe(folder / "recipe.yaml", values)


def storm(made: tuple[Path, Path], folder: Path, seed: int, attempts: int, ranks: int) -> list[Act]:
    """Carry the plan out; the run must then be the unbroken one, bit for bit."""
    acts = plan(seed, attempts, ranks)
    num_steps = sum(act.num_steps for act in acts) + 20
    runs = []
    for name, every in (("unbroken", num_steps), ("broken", EVERY)):
        (folder / name).mkdir()
        path = recipe(made, folder / name, num_steps, ranks, every)
        runs.append(Storm(path, folder / name / "tiny", ranks, folder / name / "log"))
    unbroken, broken = runs
    unbroken.carry_out([])
    with with_plan_on_failure(seed, acts, broken.log):
        broken.carry_out(acts)
        assert set(map(tuple, verify_run(broken.run).values())) == {()}
        assert record_problems(broken.run) == []
        here, there = (rows(run.run / METRICS) for run in (broken, unbroken))
        for key in ("step", "position", "tokens", "tokens_by_source", "loss", "grad_norm", "lr"):
            assert [row[key] for row in here] == [row[key] for row in there], key
        same = {read_manifest(published(run.run)[0]).state_sha256 for run in (broken, unbroken)}
        assert len(same) == 1
        evaluated = [[row["step"] for row in rows(run.run / EVALUATIONS)] for run in (broken, unbroken)]
        assert evaluated[0] == evaluated[1]
        assert not list(broken.run.glob("*.tmp"))
    return acts


def test_a_plan_is_a_function_of_its_seed_and_has_every_point() -> None:
    assert plan(3, 200) == plan(3, 200) != plan(4, 200)
    assert {act.point for act in plan(3, len(POINTS))} == set(POINTS)


SEED = 7


@pytest.mark.matrix
def test_attempts_that_wake_up_at_any_point_lose_and_double_nothing(made, tmp_path) -> None:
    acts = storm(made, tmp_path, SEED, 200, 1)
    assert len(acts) >= 200
