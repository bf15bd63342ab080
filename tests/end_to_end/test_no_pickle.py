"""Nothing is ever unpickled: not in what a run writes, not from what somebody puts in its place, not in the source."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import shutil
import signal
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.command import Ended, command

ROOT = Path(__file__).parents[2]
DOCUMENTED = {0, 64, 65, 71, 73, 74, 75}
FOREIGN = ("optimizer.pt", "pytorch_model.bin", "adapter_model.bin", "training_args.bin", "rng_state.pth")


class Canary:
    """Whoever unpickles it makes a folder."""

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
    """Whether pickle would read it to its STOP, or find such a member in a zip archive."""
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return any(unpickles(archive.read(name)) for name in archive.namelist())
    try:
        return sum(1 for _ in pickletools.genops(content)) > 1  # a lone "." is a STOP without a value
    except Exception:
        return False


class Run:
    """A finished and once resumed run of two steps, which every case finds as it was."""

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
        self._pristine = folder / "pristine"
        shutil.copytree(self.runs, self._pristine)
        self._number = 0

    def restore(self) -> None:
        shutil.rmtree(self.runs)
        shutil.copytree(self._pristine, self.runs)

    def commands(self, *, trains: bool = True) -> dict[str, Ended]:
        """Every command that reads a run, in one process; the last one goes on with it."""
        self._number += 1
        out = self.runs.parent / f"merged-{self._number}"
        checkpoint, few = self.checkpoint, ("--max-new-tokens", 2)
        ended = {
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
        }
        if trains:
            ended["train"] = command("train", self.recipe)
        return ended

    def codes(self, **options: bool) -> dict[str, int]:
        """The exit codes; that every command ended as documented, and nobody unpickled anything."""
        codes = {}
        for name, end in self.commands(**options).items():
            assert not self.marker.exists(), name
            assert end.code in DOCUMENTED, (name, end)
            assert "Traceback" not in end.out + end.err, (name, end)
            assert len(end.said) == (0 if end.code == 0 else 1), (name, end)
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


def test_the_canary_sings(tmp_path):
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


def test_unharmed_every_command_is_content(run):
    assert set(run.codes().values()) == {0}
