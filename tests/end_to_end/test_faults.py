"""Kill a run at any point, damage what it saved, run two of it: what is left always resumes, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dist_cpt.checkpoint.load import newest_valid
from dist_cpt.checkpoint.save import POINTS_ON_EVERY_RANK, SAVE_POINTS
from dist_cpt.checkpoint.verify import verify_checkpoint, verify_run
from dist_cpt.errors import EXIT_INTERNAL
from dist_cpt.run_folder.audit import record_problems
from dist_cpt.run_folder.checkpoints import published, read_manifest, superseded
from tests import tiny
from tests.run_ranks import RunningRanks
from tests.whole_run import rows, train

NUM_STEPS, EVERY = 12, 2
GRACE_SECONDS = 20.0  # the other ranks of one that was killed must end before a launcher would end them
ENGINES = {
    "fsdp-full": "engine={kind: fsdp, shard: full}",
    "zero-3": "engine={kind: zero, stage: 3}",
    "zero-1": "engine={kind: zero, stage: 1}",
}
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
            return running.finish(grace_seconds=GRACE_SECONDS)

    def started(self) -> dict[str, Any]:
        """The event with which the newest attempt began."""
        return [row for row in rows(self.run / "events.jsonl") if row["kind"] in ("start", "resume")][-1]

    def code(self) -> int:
        return json.loads((self.run / "exit.json").read_text())["code"]

    def output(self) -> str:
        """What its ranks have printed."""
        return self.log.read_text() if self.log.exists() else ""


@pytest.fixture(scope="session")
def unbroken(made, tmp_path_factory) -> Callable[[str, int], Job]:
    """The run that nothing disturbs, once for an engine and a number of ranks; it keeps every checkpoint."""
    done: dict[tuple[str, int], Job] = {}

    def of(engine: str, ranks: int) -> Job:
        if (engine, ranks) not in done:
            folder = tmp_path_factory.mktemp(f"{engine}-{ranks}")
            job = _job(made, folder, engine, ranks, keep=1000, asynchronous=False)
            assert job.attempt() == [0] * ranks, job.output()
            done[engine, ranks] = job
        return done[engine, ranks]

    return of


@pytest.fixture
def new_job(made, unbroken, tmp_path) -> Callable[..., Job]:
    """`new_job(engine, ranks, **checkpoint)`: a run that has not been started."""

    def make(engine: str, ranks: int, **checkpoint: object) -> Job:
        return _job(made, tmp_path, engine, ranks, unbroken=unbroken(engine, ranks), **checkpoint)

    return make


def _job(
    made: tuple[Path, Path], folder: Path, engine: str, ranks: int, unbroken: Job | None = None, **checkpoint: object
) -> Job:
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
    """The newest valid checkpoint is of this step and bit for bit the unbroken run's; nothing is damaged."""
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

    The first attempt saves once before. After each kill the newest checkpoint must be valid and be the unbroken run's
    of that step, and the next attempt must resume from it.
    """
    newest = 0
    for number, (point, victim) in enumerate(faults):
        begun_at = newest
        newest = newest or (0 if point.startswith("trial.") else EVERY)
        step = newest + EVERY
        planned = f"{point}:rank{victim}"
        if point == "save.aside":
            codes = attempt_that_finds_its_step_taken(job, step, f"{planned}:step{step}")
        else:
            codes = job.attempt(planned if point.startswith(("trial.", "restore")) else f"{planned}:step{step}")
        why = f"attempt {number} of {faults}, exit codes {codes}\n{job.output()}"
        assert codes[victim] == -signal.SIGKILL, why
        assert {*codes[:victim], *codes[victim + 1 :]} <= {EXIT_INTERNAL}, (
            f"the others did not end by themselves; {why}"
        )
        if not point.startswith(("trial.", "restore")):
            require_began_at(job, number, begun_at, why)
        newest += EVERY * (point.removeprefix("save.") in PUBLISHED)
        if newest:
            require_state_of_unbroken(job, newest, why)
        else:
            assert newest_valid(job.run) == (None, []), why
    assert job.attempt() == [0] * job.ranks, job.output()
    require_began_at(job, len(faults), newest, "the last attempt")
    require_as_unbroken(job)


def require_began_at(job: Job, attempt: int, step: int, why: str) -> None:
    started = job.started()
    assert (started["attempt"], started["first_step"]) == (attempt, step), why
    assert started["resumed_from"] == (f"step-{step:08d}" if step else None), why


def attempt_that_finds_its_step_taken(job: Job, step: int, planned: str) -> list[int]:
    """While the run saves `step`, a folder of that name appears, as a late older attempt would leave it."""
    with job.start(f"save.staged:rank0:step{step}:freeze,{planned}") as running:
        running.freeze()
        folder = job.run / "checkpoints"
        shutil.copytree(folder / f"step-{step - EVERY:08d}", folder / f"step-{step:08d}")
        running.send(signal.SIGCONT)
        codes = running.finish(grace_seconds=GRACE_SECONDS)
    (aside,) = superseded(job.run)
    assert aside.name.startswith(f"step-{step:08d}.")
    return codes


def test_kills_all_over_a_save_beside_training(new_job) -> None:
    kill_in_turn(new_job("fsdp-full", 2, keep=1), [("save.tensor", 1), ("save.renamed", 0), ("save.agreed", 1)])


@pytest.mark.matrix
def test_kills_all_over_a_save_in_the_way_of_training(new_job) -> None:
    job = new_job("zero-3", 2, keep=1, asynchronous=False)
    kill_in_turn(job, [("save.manifest", 0), ("restore", 1), ("save.published", 0)])


@pytest.mark.matrix
def test_kills_before_the_first_checkpoint_and_where_a_step_is_taken(new_job) -> None:
    kill_in_turn(new_job("zero-1", 2, keep=1), [("trial.reread", 1), ("save.aside", 0), ("step", 1)])


@pytest.mark.matrix
def test_no_rank_waits_for_one_that_was_killed_while_it_saved(new_job) -> None:
    """Two groups of ranks, that of training and that of saving, must not wait for each other."""
    kill_in_turn(new_job("fsdp-full", 4, keep=1), [("save.manifest", 0)])


def kills(engine: str, ranks: int, asynchronous: bool) -> list[tuple[str, int]]:
    """This engine's third of all (point, rank); over 2 and 4 ranks, beside and not, it meets every point."""
    everything = [(f"save.{point}", rank) for point in SAVE_POINTS for rank in range(ranks)]
    everything = [(point, rank) for point, rank in everything if rank == 0 or point[5:] in POINTS_ON_EVERY_RANK]
    everything += [(point, rank) for point in ("step", "restore") for rank in range(ranks)]
    everything += [(f"trial.{point}", rank) for point in POINTS_ON_EVERY_RANK for rank in range(ranks)]
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
    points = {*(f"save.{p}" for p in SAVE_POINTS), *(f"trial.{p}" for p in POINTS_ON_EVERY_RANK), "step", "restore"}
    assert seen == dict.fromkeys(ENGINES, points)


# -- damaged on the disk ------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    """One bit, in the middle."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 16
    path.write_bytes(raw)


def swap(one: Path, other: Path) -> None:
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)


def link(path: Path) -> None:
    path.rename(path.parent.parent.parent / "elsewhere")
    path.symlink_to("../../elsewhere")


TO_A_FILE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "zero-length": lambda path: os.truncate(path, 0),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "flipped": flip,
    "deleted": lambda path: path.unlink(),
    "of another step": lambda path: shutil.copy(path.parent.parent / "step-00000010" / path.name, path),
    "a link": link,
}
FILES = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "optimizer-00001-of-00002.safetensors",
    "optimizer-00002-of-00002.safetensors",
    "state.json",
    "manifest.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
# The same in every checkpoint of a run.
CONSTANT = ("adapter_config.json", "tokenizer.json", "tokenizer_config.json")
# Damage to the newest checkpoint as a whole, and the file that must be named.
TO_THE_FOLDER: dict[str, tuple[Callable[[Path], object], str]] = {
    "optimizer files swapped": (lambda path: swap(path / FILES[2], path / FILES[3]), FILES[2]),
    "json files swapped": (lambda path: swap(path / "state.json", path / "adapter_config.json"), "state.json"),
    "tokenizer files swapped": (lambda path: swap(path / FILES[6], path / FILES[7]), "tokenizer.json"),
    "old manifest and old state": (
        lambda path: [shutil.copy(path.parent / "step-00000010" / name, path) for name in ("manifest.json", FILES[4])],
        "manifest.json",
    ),
    "old files under a new manifest": (
        lambda path: [shutil.copy(path.parent / "step-00000010" / name, path) for name in FILES if "man" not in name],
        "state.json",
    ),
    "an extra file": (lambda path: (path / "extra.safetensors").write_bytes(b"x"), "extra.safetensors"),
    "an extra link": (lambda path: (path / "extra").symlink_to("/etc/passwd"), "extra"),
    "an extra link to a folder": (lambda path: (path / "extra").symlink_to("/etc"), "extra"),
    "emptied": (lambda path: [file.unlink() for file in path.iterdir()], "manifest.json"),
    "only a manifest": (lambda path: [(path / name).unlink() for name in FILES if "man" not in name], FILES[0]),
}


@pytest.fixture
def copied(unbroken, tmp_path) -> Path:
    """The last three checkpoints of a finished run of two ranks, to be damaged."""
    run = tmp_path / "copied"
    for step in (8, 10, 12):
        name = f"step-{step:08d}"
        shutil.copytree(unbroken("fsdp-full", 2).run / "checkpoints" / name, run / "checkpoints" / name)
    assert sorted(path.name for path in (run / "checkpoints" / "step-00000012").iterdir()) == sorted(FILES)
    return run


def require_named_and_skipped(run: Path, damaged: tuple[str, ...], file: str) -> None:
    """`verify` and the search for a checkpoint to resume from name the folder, the file and a reason."""
    problems_of = verify_run(run)
    assert {name for name, problems in problems_of.items() if problems} == set(damaged)
    path, skipped = newest_valid(run)
    assert path is not None
    assert path.name == max(problems_of.keys() - set(damaged))
    assert [name for name, _ in skipped] == list(damaged)
    for name, reason in skipped:
        named = [problem for problem in problems_of[name] if file in problem]
        assert named, f"{file} is not named in {problems_of[name]}"
        assert all(len(problem.replace(file, "").split()) >= 2 for problem in named), "no reason"
        assert reason.startswith(problems_of[name][0])


@pytest.mark.parametrize("damage", TO_A_FILE)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_taken(copied: Path, file: str, damage: str) -> None:
    newest = copied / "checkpoints" / "step-00000012"
    TO_A_FILE[damage](newest / file)
    if damage == "of another step" and file in CONSTANT:
        assert verify_checkpoint(newest) == []
        return
    require_named_and_skipped(copied, ("step-00000012",), file)


@pytest.mark.parametrize("damage", TO_THE_FOLDER)
def test_a_damaged_folder_is_named_and_the_checkpoint_before_is_taken(copied: Path, damage: str) -> None:
    do_damage, file = TO_THE_FOLDER[damage]
    do_damage(copied / "checkpoints" / "step-00000012")
    require_named_and_skipped(copied, ("step-00000012",), file)


@pytest.mark.parametrize("file", [name for name in FILES if name not in CONSTANT])
def test_files_swapped_between_two_checkpoints_damage_both(copied: Path, file: str) -> None:
    swap(copied / "checkpoints" / "step-00000012" / file, copied / "checkpoints" / "step-00000010" / file)
    require_named_and_skipped(copied, ("step-00000012", "step-00000010"), file)


def test_a_link_in_the_place_of_a_checkpoint_is_followed_and_its_hashes_decide(copied: Path) -> None:
    newest = copied / "checkpoints" / "step-00000012"
    newest.rename(copied / "elsewhere")
    newest.symlink_to("../elsewhere")
    assert newest_valid(copied) == (newest, [])
    flip(copied / "elsewhere" / "adapter_model.safetensors")
    require_named_and_skipped(copied, ("step-00000012",), "adapter_model.safetensors")
    shutil.rmtree(copied / "elsewhere")
    require_named_and_skipped(copied, ("step-00000012",), "manifest.json")


def continued(job: Job) -> Job:
    """The unbroken run's folder as this job's own."""
    assert job.unbroken is not None
    shutil.copytree(job.unbroken.run, job.run)
    return job


def test_a_finished_run_whose_last_checkpoints_are_damaged_trains_them_again(new_job) -> None:
    job = continued(new_job("fsdp-full", 2))
    flip(job.run / "checkpoints/step-00000012/tokenizer.json")
    swap(*(job.run / f"checkpoints/step-00000010/{name}" for name in FILES[2:4]))
    assert job.attempt() == [0, 0]
    require_began_at(job, 1, 8, job.output())
    skipped = [line for line in (job.run / "logs/rank-0.log").read_text().splitlines() if "skipped" in line]
    assert any("step-00000012" in line and "tokenizer.json: " in line for line in skipped)
    assert any("step-00000010" in line and "optimizer-0000" in line for line in skipped)
    assert [row["step"] for row in rows(job.run / "metrics.rewound.jsonl")] == [9, 10, 11, 12]
    require_as_unbroken(job)


@pytest.mark.matrix
def test_a_finished_run_is_left_as_it_is_by_several_ranks(new_job) -> None:
    job = continued(new_job("fsdp-full", 2))
    before = belongings(job.run)
    assert job.attempt() == [0, 0]
    assert belongings(job.run) == before


def test_a_run_without_a_valid_checkpoint_ends_with_74_and_names_each(new_job) -> None:
    job = continued(new_job("fsdp-full", 2))
    for path in published(job.run)[2:]:
        shutil.rmtree(path)
    (job.run / "checkpoints/step-00000012/optimizer-00001-of-00002.safetensors").unlink()
    flip(job.run / "checkpoints/step-00000010/adapter_model.safetensors")
    before = (job.run / "metrics.jsonl").read_bytes()
    assert job.attempt() == [74, 74]
    (line,) = [line for line in job.output().splitlines() if line.startswith("dist-cpt: ")]
    assert "step-00000012: optimizer-00001-of-00002.safetensors " in line
    assert "step-00000010: adapter_model.safetensors: " in line
    assert job.code() == 74
    assert (job.run / "metrics.jsonl").read_bytes() == before


# -- two attempts at once -----------------------------------------------------------------------------------

SAME_JOB = {"SLURM_JOB_ID": "7"}


def belongings(run: Path) -> dict[str, bytes | str]:
    """All that an attempt must leave alone once another one owns the folder: records, and what is published."""
    names = ("metrics.jsonl", "metrics.rewound.jsonl", "events.jsonl", "exit.json", "run.json", "certificate.json")
    content: dict[str, bytes | str] = {n: (run / n).read_bytes() if (run / n).exists() else "absent" for n in names}
    for path in (*published(run), *superseded(run)):
        content[path.name] = (path / "manifest.json").read_bytes()
    return content


def frozen_then_succeeded(job: Job, freeze: str, resumes_at: int, *, half_way: bool = True) -> None:
    """Attempt A freezes; B takes over and trains on; A wakes up, must leave without a trace; B ends as unbroken."""
    step = f"step:rank0:step{resumes_at + EVERY + 3}:freeze" if half_way else ""
    with job.start(freeze, **SAME_JOB) as a:
        a.freeze()
        with job.start(step, **SAME_JOB) as b:
            if half_way:
                b.freeze()
            else:
                assert b.finish() == [0] * job.ranks, job.output()
            require_began_at(job, 1, resumes_at, job.output())
            before = belongings(job.run)
            a.send(signal.SIGCONT)
            codes = a.finish()
            assert belongings(job.run) == before, f"A, codes {codes}, changed the folder of B\n{job.output()}"
            assert codes == [76] * job.ranks, job.output()
            (line,) = [line for line in job.output().splitlines() if line.startswith("dist-cpt: ")]
            assert all(part in line for part in ("attempt 0", str(job.run), "attempt 1"))
            if half_way:
                b.send(signal.SIGCONT)
                assert b.finish() == [0] * job.ranks, job.output()
    require_as_unbroken(job)


# Where A freezes, whether it saves beside training, and the step that B resumes at.
FROZEN = {
    "between two steps": ("step:rank0:step6:freeze", False, 4),
    "before it reports that all agree": ("save.reread:rank1:step6:freeze", False, 4),
    "before the manifest": ("save.agreed:rank0:step6:freeze", False, 4),
    "before the fence": ("save.manifest:rank0:step6:freeze", False, 4),
    "after the rename": ("save.renamed:rank0:step6:freeze", False, 6),
    "after pruning": ("save.pruned:rank0:step6:freeze", False, 6),
    "beside training, before the manifest": ("save.agreed:rank0:step6:freeze", True, 4),
    "beside training, before the fence": ("save.manifest:rank0:step6:freeze", True, 4),
    "beside training, after the rename": ("save.renamed:rank0:step6:freeze", True, 6),
    "in the save of a stop": ("step:rank0:step6:term,save.published:rank0:step5:freeze", True, 5),
}
FAST = ("beside training, before the fence",)


@pytest.mark.parametrize(
    "where", [name if name in FAST else pytest.param(name, marks=pytest.mark.matrix) for name in FROZEN]
)
def test_an_attempt_that_wakes_up_after_another_took_over_changes_nothing(new_job, where: str) -> None:
    freeze, asynchronous, resumes_at = FROZEN[where]
    job = new_job("fsdp-full", 2, keep=2, asynchronous=asynchronous)
    frozen_then_succeeded(job, freeze, resumes_at)


# Where an attempt that resumes freezes: at the checkpoint's first byte, or in the middle of a change of the folder.
RESTORING = {
    "restore": (),
    "change.certificate.json": (),
    "change.aside": ("damaged",),
    "change.reinstate": ("moved aside",),
    "change.events.jsonl": (),
    "change.metrics.rewound.jsonl": (),
    "change.metrics.jsonl": (),
    "change.contract.json": (),
    "change.append.events.jsonl": (),
    "change.append.metrics.jsonl": (),
    "change.stage": (),
    "change.publish": (),
    "change.prune": (),
}


@pytest.mark.parametrize(
    "point", [point if point == "restore" else pytest.param(point, marks=pytest.mark.matrix) for point in RESTORING]
)
def test_an_attempt_that_wakes_up_in_its_restore_or_at_any_change_changes_nothing(new_job, point: str) -> None:
    """Attempt 0 is killed, 1 resumes and freezes, 2 resumes and publishes, 1 wakes up: what 2 has stays."""
    job = new_job("fsdp-full", 2, keep=2, asynchronous=False)
    # The newest checkpoint is of step 6. Step 7 is read, and has its row, once step 8 has been issued.
    assert job.attempt("step:rank0:step9")[0] == -signal.SIGKILL
    newest = published(job.run)[0]
    if "damaged" in RESTORING[point]:
        flip(newest / "state.json")
    resumes_at = 4 if "damaged" in RESTORING[point] else 6
    if "moved aside" in RESTORING[point]:
        for number, path in enumerate(published(job.run)):
            (job.run / "checkpoints/superseded").mkdir(exist_ok=True)
            path.rename(job.run / f"checkpoints/superseded/{path.name}.{number}")
    with job.start(f"{point}:rank0:freeze", **SAME_JOB) as stale:
        stale.freeze()
        with job.start("step:rank0:step11:freeze", **SAME_JOB) as live:
            live.freeze()
            begun = (job.started()["attempt"], job.started()["first_step"])
            assert begun == (2, 8 if point == "change.prune" else resumes_at), job.output()
            before = belongings(job.run)
            stale.send(signal.SIGCONT)
            codes = stale.finish()
            assert codes == [76] * job.ranks, job.output()
            assert belongings(job.run) == before, f"the stale attempt changed the folder\n{job.output()}"
            live.send(signal.SIGCONT)
            assert live.finish() == [0] * job.ranks, job.output()
    require_as_unbroken(job)


@pytest.mark.matrix
def test_an_attempt_that_wakes_up_in_its_last_save_leaves_the_end_to_the_other(new_job) -> None:
    job = new_job("fsdp-full", 2, keep=2, asynchronous=False)
    frozen_then_succeeded(job, "save.published:rank0:step12:freeze", 12, half_way=False)


def test_a_start_beside_a_living_attempt_is_refused_by_process_and_host(new_job, monkeypatch, capfd) -> None:
    import socket

    import yaml

    job = new_job("fsdp-full", 2)
    with job.start("step:rank0:step2:freeze", **SAME_JOB) as running:
        running.freeze()
        before = belongings(job.run)
        for job_id in (None, "8"):
            if job_id is not None:
                monkeypatch.setenv("SLURM_JOB_ID", job_id)
            capfd.readouterr()
            assert train(yaml.safe_load(job.recipe.read_text())) == 64
            (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("dist-cpt: ")]
            owner = running.processes[0].pid, socket.gethostname()
            assert all(str(named) in line for named in (job.run, *owner))
        assert belongings(job.run) == before


# -- errors and signals while a save runs beside training ---------------------------------------------------


def test_a_refusal_beside_training_surfaces_within_a_step_and_ends_with_73(new_job) -> None:
    job = new_job("fsdp-full", 2)
    codes = job.attempt("save.written:rank1:step4:eio")
    assert codes == [73, 73], job.output()
    ended = json.loads((job.run / "exit.json").read_text())
    assert ended["code"] == 73
    assert all(named in ended["reason"] for named in ("rank 1", "step 4", "EIO"))
    require_state_of_unbroken(job, 2, "the one before stays")
    # The save removed its folder when it failed; from then on one step may have gone by, and the end of the run.
    gone = (job.run / "checkpoints").stat().st_mtime
    steps = rows(job.run / "metrics.jsonl")
    waited = (job.run / "exit.json").stat().st_mtime - gone
    assert waited <= 2 * max(row["step_seconds"] for row in steps) + 0.5
    assert job.attempt() == [0, 0]
    require_as_unbroken(job)


@pytest.mark.parametrize(
    ("signal_name", "asynchronous"), [("term", True), pytest.param("usr1", False, marks=pytest.mark.matrix)]
)
def test_a_signal_while_a_save_runs_waits_for_it_saves_and_ends_with_75(new_job, signal_name, asynchronous) -> None:
    """The signal comes on one rank's saving thread; two more of another kind come right after."""
    job = new_job("fsdp-full", 2, asynchronous=asynchronous)
    with job.start(f"save.tensor:rank1:step4:{signal_name}") as running:
        staged = time.monotonic() + 60
        while not list(job.run.glob("checkpoints/step-00000004*")) and time.monotonic() < staged:
            time.sleep(0.005)
        running.send(signal.SIGUSR1)
        running.send(signal.SIGTERM)
        assert running.finish() == [75, 75], job.output()
    ended = json.loads((job.run / "exit.json").read_text())
    assert ended["code"] == 75
    assert {path.name for path in published(job.run)} >= {"step-00000004", f"step-{ended['step']:08d}"}
    assert set(map(tuple, verify_run(job.run).values())) == {()}
    assert record_problems(job.run) == []
    assert not list(job.run.rglob("*.tmp"))
    assert job.attempt() == [0, 0]
    require_began_at(job, 1, ended["step"], job.output())
    require_as_unbroken(job)
