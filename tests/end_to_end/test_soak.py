"""A run that is killed, stopped, damaged, overtaken and moved at random ends where the unbroken one ends.

`plan(seed, ...)` is a pure function: what is done to each attempt, and, because every fault hits at a step and not
at a time, also where each attempt must begin. An execution that agrees with its plan is therefore the same as any
other execution of that seed.
"""

from __future__ import annotations

import json
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from dist_cpt.checkpoint.folders import published
from dist_cpt.checkpoint.restore import load
from dist_cpt.checkpoint.store import SAVE_POINTS
from dist_cpt.checkpoint.verify import verify_run
from dist_cpt.train.record import record_problems
from tests import tiny
from tests.contract.engines import ENGINES, WORLDS
from tests.run_ranks import RunningRanks
from tests.whole_run import rows, train

EVERY, KEEP = 5, 3
ON_ALL_RANKS = ("staged", "tensor", "written", "sidecars", "reread", "agreed")
POINTS = tuple(point for point in SAVE_POINTS if point != "aside")  # nobody else publishes here
AFTER_RENAME = ("renamed", "published", "pruned")
DAMAGES = ("flip", "cut", "delete", "zero")
JOB = {"SLURM_JOB_ID": "11"}  # every attempt may take over from the one before, as a requeued job does


@dataclass(frozen=True)
class Attempt:
    """One start: where, how it ends, and what the newest checkpoint suffers afterwards."""

    engine: str
    ranks: int
    asynchronous: bool
    begins_at: int  # step of the checkpoint that it must resume from; 0 is a start from nothing
    ends: str  # kill, stop, freeze (until the next attempt has ended) or done
    victim: int = 0
    fault: str = ""
    damage: tuple[str, int] | None = None  # (how, which of the newest checkpoint's files)

    @property
    def disturbances(self) -> int:
        return (self.ends != "done") + (self.damage is not None)


def plan(seed: int, num_steps: int, disturbances: int, max_ranks: int) -> list[Attempt]:
    """At least `disturbances` random ones, spread over the run, then an attempt to the end."""
    dice = random.Random(seed)
    # On several ranks each has only a part of the moments, so those engines are tried on several only.
    places = [(engine, ranks) for engine in ENGINES for ranks in WORLDS[engine] if 1 < ranks <= max_ranks]
    places.append(("single", 1))
    saved: list[int] = []  # steps of the checkpoints on the disk that hold
    attempts: list[Attempt] = []
    while (left := disturbances - sum(attempt.disturbances for attempt in attempts)) > 0:
        engine, ranks = dice.choice(places)
        begins_at = saved[-1] if saved else 0
        attempt = Attempt(engine, ranks, dice.random() < 0.5, begins_at, "kill", dice.randrange(ranks))
        ways = ["save", "save", "save", "step", "stop", "stop", "restore", "freeze"]
        if attempts and attempts[-1].ends == "freeze":
            ways.pop()  # at most two attempts live at once
        stretch = 1 + 3 * (num_steps - begins_at) // (EVERY * left)  # in saves; some of them are lost again
        attempt, published_steps = _disturbed(attempt, dice, dice.choice(ways), stretch, num_steps - EVERY)
        for step in published_steps:
            saved = [*saved, step][-KEEP:]
        if attempt.ends != "freeze" and len(saved) > 1 and dice.random() < 0.3:
            attempt = replace(attempt, damage=(dice.choice(DAMAGES), dice.randrange(100)))
            saved.pop()
        attempts.append(attempt)
    engine, ranks = dice.choice(places)
    return [*attempts, Attempt(engine, ranks, dice.random() < 0.5, saved[-1] if saved else 0, "done")]


def _disturbed(
    attempt: Attempt, dice: random.Random, way: str, stretch: int, horizon: int
) -> tuple[Attempt, list[int]]:
    """The attempt with its fault, at most `stretch` saves and `horizon` steps on, and what it publishes before."""
    start, victim = attempt.begins_at, attempt.victim
    first = start - start % EVERY + EVERY  # the next save that is due
    if first > horizon:
        way = "restore"
    elif way == "restore" and start == 0:
        way = "save"
    if way == "restore":
        return replace(attempt, fault=f"restore:rank{victim}"), []
    target = min(first + EVERY * dice.randrange(stretch), horizon)
    if way == "save" or (way == "freeze" and dice.random() < 0.5):
        victim = 0 if way == "freeze" else victim
        points = ("agreed", "manifest", "renamed") if way == "freeze" else POINTS if victim == 0 else ON_ALL_RANKS
        point = dice.choice(points)
        fault = f"save.{point}:rank{victim}:step{target}" + (":freeze" if way == "freeze" else "")
        published_steps = range(first, target + (point in AFTER_RENAME), EVERY)
        ends = "freeze" if way == "freeze" else "kill"
        return replace(attempt, fault=fault, victim=victim, ends=ends), list(published_steps)
    # At the boundary before step `at`. A kill there, while a save beside training may or may not be over, would
    # leave open which checkpoint is the newest: then it comes before the first one is begun.
    last = target if way == "stop" or not attempt.asynchronous else first
    at = dice.randint(start + 1 + (start == 0), last + 1)
    regular = list(range(first, at - 1, EVERY))  # one that is due at this very boundary comes after the fault
    if way == "stop":
        fault = f"step:rank{victim}:step{at}:{dice.choice(('term', 'usr1'))}"
        return replace(attempt, fault=fault, ends="stop"), [*regular, *([at - 1] if at - 1 > start else [])]
    if way == "freeze":
        return replace(attempt, fault=f"step:rank0:step{at}:freeze", ends="freeze", victim=0), regular
    return replace(attempt, fault=f"step:rank{victim}:step{at}"), regular


@dataclass
class Execution:
    """A plan carried out, attempt by attempt, on one run folder."""

    recipe: Path
    run: Path
    log: Path

    def carry_out(self, attempts: Sequence[Attempt]) -> Iterator[tuple[int, int | None, str]]:
        """(attempt, first step, how it ended) of each; no step where it ended before it could say so."""
        frozen: RunningRanks | None = None
        with ExitStack() as alive:
            for number, attempt in enumerate(attempts):
                running = alive.enter_context(self._start(attempt))
                if attempt.ends == "freeze":
                    running.freeze()
                    yield number, self._began(number), "freeze"
                    frozen = running
                    continue
                ended = _ending(attempt, running.finish())
                yield number, self._began(number), ended
                if frozen is not None:
                    self._wake(frozen, number)
                    frozen = None
                if attempt.damage is not None:
                    damage(published(self.run)[0], *attempt.damage)

    def _start(self, attempt: Attempt) -> RunningRanks:
        return RunningRanks(
            self.recipe,
            attempt.ranks,
            f"engine={json.dumps(ENGINES[attempt.engine])}",
            f"checkpoint.asynchronous={json.dumps(attempt.asynchronous)}",
            log=self.log,
            DIST_CPT_FAULT=attempt.fault,
            **JOB,
        )

    def _began(self, number: int) -> int | None:
        events = rows(self.run / "events.jsonl") if (self.run / "events.jsonl").exists() else []
        began = [event for event in events if event["kind"] in ("start", "resume") and event["attempt"] == number]
        if not began:
            return None
        if began[0]["kind"] == "resume":
            proof = json.loads((self.run / "certificate.json").read_text())
            assert (proof["verdict"], proof["attempt"], proof["step"]) == ("pass", number, began[0]["first_step"])
        return began[0]["first_step"]

    def _wake(self, frozen: RunningRanks, by: int) -> None:
        """An attempt that was overtaken leaves with 64 and changes nothing."""
        files = ("metrics.jsonl", "events.jsonl", "exit.json", "run.json", "certificate.json")
        before = [self._content(name) for name in files]
        frozen.send(signal.SIGCONT)
        codes = frozen.finish()
        assert set(codes) == {64}, f"attempt {by - 1} was overtaken by {by} and ended with {codes}"
        assert [self._content(name) for name in files] == before, f"attempt {by - 1} wrote after it was overtaken"

    def _content(self, name: str) -> bytes | None:
        path = self.run / name
        return path.read_bytes() if path.exists() else None


def _ending(attempt: Attempt, codes: list[int]) -> str:
    if attempt.ends == "kill":
        as_planned = codes[attempt.victim] == -signal.SIGKILL and 0 not in codes
    else:
        as_planned = codes == [75 if attempt.ends == "stop" else 0] * attempt.ranks
    return attempt.ends if as_planned else f"exit codes {codes}"


def damage(checkpoint: Path, how: str, which: int) -> None:
    """Harm one file of a checkpoint."""
    files = sorted(path for path in checkpoint.iterdir() if path.is_file())
    victim = files[which % len(files)]
    raw = bytearray(victim.read_bytes())
    if how == "delete":
        victim.unlink()
    elif how == "cut":
        os.truncate(victim, len(raw) // 2)
    else:
        if how == "flip":
            raw[which * len(raw) // 100] ^= 1
        victim.write_bytes(raw if how == "flip" else bytes(len(raw)))


def recipe(made: tuple[Path, Path], folder: Path, num_steps: int) -> dict[str, Any]:
    """Two sources, fp32 weights: between engines only the order of sums differs."""
    base, corpus = made
    values = tiny.recipe(
        base,
        corpus,
        folder,
        model={"path": str(base), "weights": "fp32"},
        train={"tokens": num_steps * 8 * tiny.SEQ_LEN},
        checkpoint={"every_steps": EVERY, "keep": KEEP},
    )
    sources = [{"path": str(corpus), "weight": 0.8}, {"path": str(corpus.parent / "held-out.jsonl"), "weight": 0.2}]
    values["data"] = {"seq_len": tiny.SEQ_LEN, "sources": sources, "cache_dir": str(base.parent / "soak-stores")}
    return values


def totals(metrics: list[dict[str, Any]]) -> Counter[str]:
    """Target tokens of each source."""
    total: Counter[str] = Counter()
    for row in metrics:
        total.update(row["tokens_by_source"])
    return total


def soak(made: tuple[Path, Path], folder: Path, seed: int, attempts: list[Attempt], num_steps: int) -> list[float]:
    """Carry out a plan next to the unbroken run on one rank; returns |loss difference| by step."""
    (folder / "broken").mkdir()
    values = recipe(made, folder / "broken", num_steps)
    path = tiny.write_recipe(folder / "recipe.yaml", values)
    execution = Execution(path, folder / "broken" / "tiny", folder / "log")
    where = f"seed {seed}, plan:\n" + "\n".join(f"{i}: {attempt}" for i, attempt in enumerate(attempts))
    try:
        expected = [
            (number, None if attempt.fault.startswith("restore") else attempt.begins_at, attempt.ends)
            for number, attempt in enumerate(attempts)
        ]
        for happened, wanted in zip(execution.carry_out(attempts), expected, strict=True):
            assert happened == wanted, f"attempt {wanted[0]} went otherwise"
        return _require_like_unbroken(made, folder, execution.run, num_steps)
    except Exception as error:
        tail = execution.log.read_text()[-3000:] if execution.log.exists() else ""
        raise AssertionError(f"{error}\n{where}\n{tail}") from error


def _require_like_unbroken(made, folder: Path, run: Path, num_steps: int) -> list[float]:
    values = recipe(made, folder / "unbroken", num_steps) | {"checkpoint": {"every_steps": num_steps}}
    assert train(values) == 0
    here, there = rows(run / "metrics.jsonl"), rows(folder / "unbroken/tiny/metrics.jsonl")
    assert [row["step"] for row in here] == list(range(1, num_steps + 1))
    for key in ("position", "num_tokens", "tokens", "tokens_by_source", "lr", "skipped"):
        assert [row[key] for row in here] == [row[key] for row in there], key
    assert totals(here) == totals(there)
    with load(published(run)[0]) as one, load(published(folder / "unbroken/tiny")[0]) as other:
        assert one.state.step == other.state.step == num_steps
        assert one.state.next_block_ids == other.state.next_block_ids
        assert one.state.tokens_by_source == other.state.tokens_by_source == dict(totals(there))
        assert one.state.optimizer_steps == num_steps
    assert set(map(tuple, verify_run(run).values())) == {()}
    assert record_problems(run) == []
    assert json.loads((run / "exit.json").read_text())["code"] == 0
    return [abs(a["loss"] - b["loss"]) for a, b in zip(here, there, strict=True)]


def test_a_short_soak(made, tmp_path) -> None:
    differences = soak(made, tmp_path, 11, plan(11, 40, 6, 2), 40)
    print("DIFF", differences)


@pytest.mark.matrix
def test_a_long_soak(made, tmp_path) -> None:
    num_steps = 240
    attempts = plan(LONG, num_steps, 32, 4)
    differences = soak(made, tmp_path, LONG, attempts, num_steps)
    print("DIFF", differences)
    base = recipe(made, tmp_path / "c", num_steps)
    for engine, ranks in (("fsdp-full", 2), ("zero-1", 2), ("zero-3",4)):
        (tmp_path / f"c{engine}").mkdir()
        v = recipe(made, tmp_path / f"c{engine}", num_steps)
        r = tiny.write_recipe(tmp_path / f"c{engine}.yaml", v)
        e = Execution(r, tmp_path / f"c{engine}/tiny", tmp_path / "log2")
        assert e._start(Attempt(engine, ranks, True, 0, "done")).finish() == [0] * ranks
        a, b = rows(e.run / "metrics.jsonl"), rows(tmp_path / "unbroken/tiny/metrics.jsonl")
        print("CONTROL", engine, [abs(x["loss"] - y["loss"]) for x, y in zip(a, b, strict=True)])
    print("LOSS", [x["loss"] for x in b])


LONG = 13
