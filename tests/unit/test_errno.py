"""Every system call of a claim, a restore, a save and a preparation fails, once or for ever, with every errno.

A call that fails once is asked again, or the save is tried again: the phase ends as if nothing had happened. A server
that does not come back ends it with 66 or 73. Then nothing is lost, and the same phase succeeds on a server that is
back. `pytest -m matrix tests/unit/test_errno.py -s` prints the totals, which stand in docs/reliability.md.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from dist_cpt import storage
from dist_cpt.checkpoint.load import load, newest_valid
from dist_cpt.checkpoint.retention import remove_staging
from dist_cpt.config.schema import RunConfig
from dist_cpt.data.prepare import prepare
from dist_cpt.data.store import TokenStore
from dist_cpt.errors import EXIT_CANNOT_WRITE, EXIT_STORAGE, StorageError, WriteError
from dist_cpt.run_folder.claim import claim
from dist_cpt.run_folder.metrics import MetricsFile
from dist_cpt.run_folder.staging import remove_abandoned
from dist_cpt.runtime.collectives import on_rank_zero
from dist_cpt.train import restore
from tests import tiny
from tests.checkpoint_state import matches, save_step
from tests.claimed import claimed
from tests.errno_layer import ErrnoLayer
from tests.whole_run import built, rows

CODES = {code: errno.errorcode[code] for code in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)}
CODES |= {code: errno.errorcode[code] for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)}
SAMPLE_EVERY = 61  # of all (call, errno) pairs in a run of the suite; the matrix takes all


@dataclass(frozen=True)
class Phase:
    """One phase on a folder that `make` fills: what it does, what must be true then, and what it must not touch."""

    make: Callable[[Path], object]
    run: Callable[[Path], object]
    check: Callable[[Path], None]
    kept: tuple[str, ...]  # patterns of files that no error may change
    tries: int = 1  # of the phase by its caller: a refused save is tried again


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only sleeping advances."""
    now = [0.0]
    clock = SimpleNamespace(
        monotonic=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + max(seconds, 0.01))
    )
    monkeypatch.setattr(storage, "time", clock)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A recipe whose data lies in the folder `DATA`, which a phase replaces."""
    folder = tmp_path_factory.mktemp("made")
    corpus = tiny.write_corpus(folder, 8)
    tokenizer = tiny.write_tokenizer(folder / "tokenizer", corpus)
    return built(tiny.recipe(tokenizer, corpus, folder / "runs"))  # of a base, only the tokenizer is read


def at(config: RunConfig, folder: Path) -> RunConfig:
    """The recipe with its run and its data in this folder."""
    sources = [source.model_copy(update={"path": str(folder / "corpus.jsonl")}) for source in config.data.sources]
    held_out = [one.model_copy(update={"path": str(folder / "held-out.jsonl")}) for one in config.data.validation]
    data = config.data.model_copy(
        update={"sources": tuple(sources), "validation": tuple(held_out), "cache_dir": str(folder / "stores")}
    )
    return config.model_copy(update={"output_dir": str(folder), "name": "run", "data": data})


def phase(name: str, config: RunConfig) -> Phase:
    return {"claim": claiming, "restore": restoring, "save": saving, "prepare": preparing}[name](config)


def claiming(config: RunConfig) -> Phase:
    def make(folder: Path) -> None:
        taken = claim(folder / "run", at(config, folder), "wandb1")
        save_step(folder / "run", 10, claim=taken)
        metrics = MetricsFile(taken)
        metrics._append("metrics.jsonl", {"step": 10})
        metrics.close()
        taken.close()
        (folder / "run/exit.json").write_text('{"code": 75, "reason": "SIGTERM", "step": 10}')
        (folder / "run/checkpoints/step-00000020.attempt-0-aa.tmp").mkdir()

    def run(folder: Path) -> None:
        taken = claim(folder / "run", at(config, folder), "wandb2")
        taken.close()
        remove_staging(taken.folder, taken.attempt)

    def check(folder: Path) -> None:
        from dist_cpt.run_folder.json_files import read_object

        now = read_object(folder / "run/run.json")
        assert now["attempts"] >= 2
        assert now["wandb_run_id"] == "wandb1"
        assert now["ends"][0]["code"] == 75
        assert not (folder / "run/exit.json").exists()

    return Phase(make, run, check, ("run/checkpoints/step-*[0-9]/*", "run/metrics.jsonl"))


def restoring(config: RunConfig) -> Phase:
    """A return to an older checkpoint, as after a rollback: the newer one and its rows move aside."""

    def make(folder: Path) -> None:
        for step in (10, 20, 30):
            save_step(folder / "run", step, keep=9)
        metrics = MetricsFile(claimed(folder / "run"))
        for step in range(1, 31):
            metrics._append("metrics.jsonl", {"step": step})
        metrics.close()

    def run(folder: Path) -> None:
        newest, skipped = newest_valid(folder / "run", up_to_step=20)
        assert newest is not None
        assert (newest.name, skipped) == ("step-00000020", [])
        with load(newest, verified=True) as checkpoint:
            assert matches(checkpoint, 20)
        own = claimed(folder / "run")
        run = SimpleNamespace(context=SimpleNamespace(claim=own), metrics=MetricsFile(own))
        on_rank_zero("checkpoints", lambda: storage.patiently(newest, lambda: restore._leave_behind(run, newest, 20)))

    def check(folder: Path) -> None:
        assert [row["step"] for row in rows(folder / "run/metrics.jsonl")] == list(range(1, 21))
        assert [row["step"] for row in rows(folder / "run/metrics.rewound.jsonl")] == list(range(21, 31))
        assert newest_valid(folder / "run") == (folder / "run/checkpoints/step-00000020", [])

    return Phase(make, run, check, ("run/checkpoints/**/step-*/*",))


def saving(config: RunConfig) -> Phase:
    def make(folder: Path) -> None:
        for step in (10, 20):
            save_step(folder / "run", step, keep=9)

    def run(folder: Path) -> None:
        save_step(folder / "run", 30, keep=2)

    def check(folder: Path) -> None:
        newest, skipped = newest_valid(folder / "run")
        assert newest is not None
        assert (newest.name, skipped) == ("step-00000030", [])
        with load(newest) as checkpoint:
            assert matches(checkpoint, 30)
        remove_staging(folder / "run", 1)
        assert not list(folder.rglob("*.tmp"))

    return Phase(make, run, check, ("run/checkpoints/step-00000020/*",), tries=2)


def preparing(config: RunConfig) -> Phase:
    """One store is there, the other is made."""

    def make(folder: Path) -> None:
        for name in ("corpus.jsonl", "held-out.jsonl"):
            shutil.copy2(Path(config.data.sources[0].path).with_name(name), folder)
        prepare(at(config, folder))
        (held_out,) = (folder / "stores").glob("held-out-*")
        shutil.rmtree(held_out)

    def run(folder: Path) -> None:
        prepare(at(config, folder))

    def check(folder: Path) -> None:
        finished = [path for path in (folder / "stores").glob("[ch]*") if ".tmp-" not in path.name]  # plans aside
        assert sorted(path.name.rpartition("-")[0] for path in finished) == ["corpus", "held-out"]
        assert all(TokenStore.open(path, verify=True) for path in finished)

    return Phase(make, run, check, ("stores/corpus-*/*", "*.jsonl"))


def fingerprints(folder: Path, patterns: tuple[str, ...]) -> set[str]:
    """Of the content, wherever a checkpoint has been moved."""
    files = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files}


def outcome(made: Path, work: Path, case: Phase, layer: ErrnoLayer) -> str:
    """How the phase ends under `layer`; then nothing is lost, and without it the phase succeeds."""
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(made, work, symlinks=True)
    before = fingerprints(work, case.kept)
    ended = "in spite of it"
    with layer.installed():
        for number in range(1, case.tries + 1):
            try:
                on_rank_zero("phase", lambda: case.run(work))
                ended = "in spite of it" if number == 1 else "at the next try"
                break
            except (StorageError, WriteError) as error:
                ended = f"exit code {error.exit_code}" + ("" if str(work) in str(error) else " without a name")
    assert before <= fingerprints(work, case.kept), "lost"
    if ended.startswith("exit"):
        case.run(work)
    case.check(work)
    return ended


def sweep(name: str, config: RunConfig, tmp_path: Path, *, lasts: bool, every: int = 1) -> Counter[str]:
    """How a phase ends when a call of it fails, for each chosen pair of call and errno."""
    case, made, work = phase(name, config), tmp_path / "made", tmp_path / "work"
    work.mkdir()
    case.make(work)
    shutil.copytree(work, made, symlinks=True)
    counting = ErrnoLayer(work)
    assert outcome(made, work, case, counting) == "in spite of it"
    counts: Counter[str] = Counter()
    for number, code in [(number, code) for number in range(len(counting.calls)) for code in CODES][::every]:
        layer = ErrnoLayer(work, code, number, for_ever=lasts)
        try:
            ended = outcome(made, work, case, layer)
            assert ended in right(code, lasts), ended
        except Exception as error:
            call = layer.calls[number] if number < len(layer.calls) else "not reached"
            raise AssertionError(f"{name}, call {number} {call}, {CODES[code]}, lasts: {lasts}: {error!r}") from error
        counts[ended] += 1
    return counts


def right(code: int, lasts: bool) -> set[str]:
    """An errno that passes is survived, unless it says that there is no room; one that lasts has its code."""
    if lasts:
        return {"in spite of it", f"exit code {EXIT_STORAGE}", f"exit code {EXIT_CANNOT_WRITE}"}
    full = code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    return {"in spite of it", "at the next try", *((f"exit code {EXIT_CANNOT_WRITE}",) if full else ())}


@pytest.mark.parametrize("name", ["claim", "restore", "save", "prepare"])
def test_a_sample_of_all_calls(config: RunConfig, tmp_path: Path, name: str) -> None:
    for lasts in (False, True):
        folder = tmp_path / str(lasts)
        folder.mkdir()
        assert sweep(name, config, folder, lasts=lasts, every=SAMPLE_EVERY).total() > 5


@pytest.mark.parametrize("call", ["stat", "scandir"])
def test_a_folder_of_runs_that_cannot_be_listed_is_left_as_it_is(tmp_path: Path, call: str) -> None:
    with ErrnoLayer(tmp_path).installed() as counting:
        remove_abandoned(tmp_path / "run")
    number = [function for function, _ in counting.calls].index(call)
    with ErrnoLayer(tmp_path, errno.EIO, number).installed():
        remove_abandoned(tmp_path / "run")


def test_a_block_plan_whose_rename_fails_once_is_made(config: RunConfig, tmp_path: Path) -> None:
    case, made, work = preparing(config), tmp_path / "made", tmp_path / "work"
    work.mkdir()
    case.make(work)
    shutil.copytree(work, made)
    counting = ErrnoLayer(work)
    assert outcome(made, work, case, counting) == "in spite of it"
    (number,) = [n for n, (call, path) in enumerate(counting.calls) if call == "rename" and "/blocks-" in path]
    assert outcome(made, work, case, ErrnoLayer(work, errno.EIO, number)) == "in spite of it"


@pytest.mark.matrix
@pytest.mark.parametrize("lasts", [False, True], ids=["once", "for ever"])
@pytest.mark.parametrize("name", ["claim", "restore", "save", "prepare"])
def test_every_call(config: RunConfig, tmp_path: Path, name: str, lasts: bool) -> None:
    counts = sweep(name, config, tmp_path, lasts=lasts)
    calls = counts.total() // len(CODES)
    print(f"\n{name}, {'for ever' if lasts else 'once'}: {calls} calls x {len(CODES)} errnos, {dict(counts)}")
