"""Nothing is ever unpickled: neither what a run writes, nor a pickle put in its place."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import pickletools
import shutil
import signal
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_cpt.run_folder.checkpoints import read_manifest
from dist_cpt.run_folder.manifest import Manifest, manifest_to_bytes
from tests import tiny
from tests.command import Ended, command

DOCUMENTED = {0, 64, 65, 71, 73, 74, 75}
OTHER_TRAINERS = ("optimizer.pt", "pytorch_model.bin", "adapter_model.bin", "training_args.bin", "rng_state.pth")


class Canary:
    """Unpickling it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def pickled(marker: Path) -> bytes:
    return pickle.dumps(Canary(marker), protocol=2)


def zipped(marker: Path) -> bytes:
    """The layout of torch.save."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(marker))
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def unpickles(content: bytes) -> bool:
    """Whether it is a whole pickle, or a zip archive with one."""
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return any(unpickles(archive.read(name)) for name in archive.namelist())
    try:
        return sum(1 for _ in pickletools.genops(content)) > 1  # a lone "." is a STOP without a value
    except Exception:
        return False


class Run:
    """A run of two steps, resumed once and stopped after the last one, restored before every case."""

    def __init__(self, folder: Path, made: tuple[Path, Path]) -> None:
        values = tiny.recipe(
            *made, folder / "runs", train={"tokens": 2 * 8 * tiny.SEQ_LEN}, checkpoint={"every_steps": 1, "keep": 2}
        )
        self.recipe = tiny.write_recipe(folder / "recipe.yaml", values)
        self.runs, self.folder = folder / "runs", folder / "runs" / "tiny"
        self.checkpoint = self.folder / "checkpoints" / "step-00000002"
        self.marker = folder / "unpickled"
        for _ in range(2):
            assert command("train", self.recipe).code == 0
            (self.folder / "exit.json").write_text('{"code": 75, "reason": "SIGTERM", "step": 2}')  # not finished yet
        self._pristine = folder / "pristine"
        shutil.copytree(self.runs, self._pristine)
        self._number = 0

    def restore(self) -> None:
        shutil.rmtree(self.runs)
        shutil.copytree(self._pristine, self.runs)

    def commands(self) -> dict[str, Ended]:
        """Every command that reads a run, in one process; the last one resumes it."""
        self._number += 1
        out = self.runs.parent / f"merged-{self._number}"
        checkpoint, few = self.checkpoint, ("--max-new-tokens", 2)
        return {
            "inspect": command("inspect", self.folder),
            "inspect checkpoint": command("inspect", checkpoint, "--json"),
            "verify": command("verify", self.folder),
            "verify checkpoint": command("verify", checkpoint),
            "report": command("report", self.folder),
            "resume": command("resume", self.folder, "--dry-run"),
            "generate": command("generate", self.folder, *few),
            "generate checkpoint": command("generate", checkpoint, *few),
            "merge": command("merge", self.folder, "--out", out),
            "merge checkpoint": command("merge", checkpoint, "--out", f"{out}-checkpoint"),
            "train": command("train", self.recipe),
        }

    def codes(self) -> dict[str, int]:
        """The exit codes, after checking that every command ended as documented and nothing was unpickled."""
        codes = {}
        for name, end in self.commands().items():
            assert not self.marker.exists(), name
            assert end.code in DOCUMENTED, (name, end)
            assert "Traceback" not in end.out + end.err, (name, end)
            assert len(end.error_lines) == (0 if end.code == 0 else 1), (name, end)
            codes[name] = end.code
        return codes


@pytest.fixture(scope="module")
def _run(made, tmp_path_factory) -> Run:
    return Run(tmp_path_factory.mktemp("run"), made)


@pytest.fixture
def run(_run: Run) -> Iterator[Run]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    _run.restore()
    yield _run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_unpickling_the_canary_makes_its_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        pickle.loads(pickled(tmp_path / "missing" / "folder"))
    pickle.loads(pickled(tmp_path / "marker"))
    assert (tmp_path / "marker").is_dir()


def test_nothing_a_run_writes_can_be_unpickled(run):
    files = [path for path in run.runs.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"tokens.bin", "state.json", "optimizer-00001-of-00001.safetensors", "certificate.json"} <= names
    assert [path for path in files if unpickles(path.read_bytes())] == []
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert unpickles(pickle.dumps({"a": [1, None]}, protocol))
    assert unpickles(zipped(run.marker))


def test_every_command_accepts_the_untouched_run(run):
    assert set(run.codes().values()) == {0}


PAYLOADS = pytest.mark.parametrize("payload", [pickled, pytest.param(zipped, marks=pytest.mark.matrix)])


@pytest.mark.matrix
@PAYLOADS
def test_a_pickle_in_place_of_a_file_of_the_newest_checkpoint(run, payload):
    """Each in turn: the checkpoint is refused, and commands on the run use the one before."""
    names = sorted(path.name for path in run.checkpoint.iterdir())
    assert len(names) == 7
    for name in names:
        run.restore()
        (run.checkpoint / name).write_bytes(payload(run.marker))
        codes = run.codes()
        refused = {"verify", *(command for command in codes if command.endswith(" checkpoint"))}
        assert codes == {command: 74 if command in refused else 0 for command in codes}, name


@pytest.mark.matrix
def test_a_pickle_in_place_of_a_file_of_the_run_folder(run):
    names = sorted(path.name for path in run.folder.iterdir() if path.is_file())
    assert {"recipe.yaml", "run.json", "certificate.json", "metrics.jsonl"} < set(names)
    for name in names:
        run.restore()
        (run.folder / name).write_bytes(pickled(run.marker))
        codes = run.codes()
        record = name not in (".lock", "report.html")  # nothing reads them
        refused = {"recipe.yaml": {"train": 64, "resume": 64}}.get(name, {}) | ({"verify": 74} if record else {})
        assert codes == {command: refused.get(command, 0) for command in codes}, name


def test_a_pickle_in_place_of_a_file_of_a_token_store(run):
    """The store, its block plan or the list beside it is made again, and the run resumes because it is the same."""
    data = run.runs / "data"
    (store,) = data.glob("corpus-*")
    files = [path for path in store.rglob("*") if path.is_file()] + list(data.glob("*.npz"))
    names = sorted(path.relative_to(run.runs) for path in files if path.name != "report.html")  # which nothing reads
    read = {"manifest.json", "tokens.bin", "tokens.idx", "tokenizer.json", "pieces.npy"}
    assert {name.name for name in names} >= read
    for name in names:
        run.restore()
        before = (run.runs / name).read_bytes()
        (run.runs / name).write_bytes(pickled(run.marker))
        assert command("train", run.recipe).code == 0, name
        assert not run.marker.exists(), name
        if name.name != "manifest.json":
            assert (run.runs / name).read_bytes() == before, name


@PAYLOADS
def test_a_pickle_whose_hash_is_in_the_manifest(run, payload):
    """An attacker who also writes the manifest."""
    names = sorted(path.name for path in run.checkpoint.iterdir() if path.name != "manifest.json")
    for name in names:
        run.restore()
        content = payload(run.marker)
        (run.checkpoint / name).write_bytes(content)
        values = read_manifest(run.checkpoint).model_dump(mode="json")
        values["files"][name] = {"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (run.checkpoint / "manifest.json").write_bytes(manifest_to_bytes(Manifest.model_validate(values)))
        codes = run.codes()
        refused = {"verify", "verify checkpoint"}  # every byte is read
        if name != "optimizer-00001-of-00001.safetensors":
            refused |= {"generate checkpoint", "merge checkpoint"}  # the files they use are read
        if not name.endswith(".safetensors"):
            refused |= {"inspect checkpoint"}  # no tensor is read
        assert codes == {command: 74 if command in refused else 0 for command in codes}, name


_watched: list[str] | None = None


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is not None and event == "open" and isinstance(arguments[0], str):
        _watched.append(arguments[0])


def test_files_of_other_trainers_are_named_and_never_opened(run):
    """Files that other trainers write and some loaders would unpickle."""
    global _watched
    sys.addaudithook(_watch)  # for the rest of the process; it records only while there is a list
    for name in OTHER_TRAINERS:
        (run.checkpoint / name).write_bytes(zipped(run.marker) if name.endswith(".pt") else pickled(run.marker))
    _watched = []
    try:
        verified = command("verify", run.folder).out
        codes = run.codes()
        opened = {Path(path).name for path in _watched}
    finally:
        _watched = None
    assert all(name in verified for name in OTHER_TRAINERS)
    assert codes["train"] == codes["generate"] == 0  # from the checkpoint before
    assert codes["generate checkpoint"] == codes["inspect checkpoint"] == 74
    assert "state.json" in opened
    assert opened.isdisjoint(OTHER_TRAINERS)
