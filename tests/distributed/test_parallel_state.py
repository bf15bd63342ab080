"""Saves and restores of several ranks at the same time: who reads what, and that nobody waits for another's disk."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_cpt.checkpoint.load import LoadedCheckpoint, load, newest_valid
from dist_cpt.checkpoint.plan_files import files_by_rank, reading_order
from dist_cpt.engines.slices import SlicedState
from dist_cpt.errors import CheckpointError
from dist_cpt.run_folder.checkpoints import read_manifest
from dist_cpt.runtime.collectives import rank, world_size
from dist_cpt.training_state import STATE_KINDS, StateKind, TensorSpec
from tests.checkpoint_state import expected, save_step
from tests.ranks import RankPool

HERE = "tests.distributed.test_parallel_state"
SPECS = tuple(TensorSpec(f"layers.{i}.weight", (16 + i, 8), "bfloat16", "weights") for i in range(7))


class Shards:
    """A sharded state in memory: every rank has its rows; with `replicas`, each half of the ranks has all rows."""

    def __init__(self, replicas: int = 1) -> None:
        shards = world_size() // replicas
        self.ranges: dict[str, tuple[int, int]] = {}
        for spec in SPECS:
            elements = spec.shape[0] * spec.shape[1]
            share = -(-elements // shards)
            first = min(rank() % shards * share, elements)
            self.ranges[spec.name] = (first, min(first + share, elements))
        self.parts = {
            (kind, name): torch.zeros(stop - start)
            for name, (start, stop) in self.ranges.items()
            for kind in STATE_KINDS
        }
        shapes = {spec.name: torch.Size(spec.shape) for spec in SPECS}
        cpu = torch.device("cpu")
        self.state = SlicedState(shapes, self.ranges, self._read, self._write, cpu, primary=rank() < shards)

    def fill(self, seed: int) -> None:
        for spec in SPECS:
            start, stop = self.ranges[spec.name]
            for kind in STATE_KINDS:
                self.parts[kind, spec.name] = expected(seed, kind, spec).view(-1)[start:stop].clone()

    def _read(self, kind: StateKind, name: str) -> torch.Tensor:
        return self.parts[kind, name]

    def _write(self, kind: StateKind, name: str, values: torch.Tensor) -> None:
        self.parts[kind, name].copy_(values)


def save_case(folder: str, replicas: int = 1) -> None:
    shards = Shards(replicas)
    shards.fill(3)
    save_step(Path(folder), 1, specs=SPECS, adapter=False, sidecars=[_config], export=shards.state.export)


def _config(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


class Opened:
    """The tensor files below a folder that this process opens, in order; only while `on`."""

    def __init__(self, folder: Path) -> None:
        self.names: list[str] = []
        self.on = True
        sys.addaudithook(lambda event, args: self._note(event, args, str(folder)))

    def _note(self, event: str, args: tuple[Any, ...], folder: str) -> None:
        if self.on and event == "open" and str(args[0]).startswith(folder) and str(args[0]).endswith(".safetensors"):
            self.names.append(Path(str(args[0])).name)


def restore_case(folder: str, replicas: int = 1) -> dict[str, Any]:
    """Verify and import: (opened files, those expected, elements read, most files open at once, all values right)."""
    shards = Shards(replicas)
    opened = Opened(Path(folder))
    path, _ = newest_valid(Path(folder))
    assert path is not None
    verified, most_open, elements = list(opened.names), 0, 0
    with load(path, verified=True) as checkpoint:

        def read(kind: StateKind, name: str, start: int, stop: int) -> torch.Tensor:
            nonlocal most_open, elements
            values = checkpoint.read(kind, name, start, stop)
            elements += values.numel()
            most_open = max(most_open, _open_files(path))
            return values

        shards.state.import_(read, checkpoint.reading_order())
        mine = files_by_rank(checkpoint.manifest, world_size())[rank()]
    opened.on = False
    got = dict(shards.parts)
    shards.fill(3)
    return {
        "verified": verified,
        "imported": opened.names[len(verified) :],
        "mine": sorted(name for name in mine if name.endswith(".safetensors")),
        "elements": elements,
        "most_open": most_open,
        "right": all(torch.equal(got[key], part) for key, part in shards.parts.items()),
    }


def _open_files(folder: Path) -> int:
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return sum(os.path.lexists(link) and os.readlink(link).startswith(str(folder)) for link in links)


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("ranks", [2, 4])
def test_each_file_of_a_checkpoint_is_read_by_one_rank(
    tmp_path: Path, pool: RankPool, four: RankPool, ranks: int, replicas: int
) -> None:
    four.run(f"{HERE}:save_case", folder=str(tmp_path))
    results = {2: pool, 4: four}[ranks].run(f"{HERE}:restore_case", folder=str(tmp_path), replicas=replicas)
    assert all(result["right"] for result in results)
    for result in results:
        assert sorted(result["verified"]) == sorted(result["imported"]) == result["mine"]
        assert result["most_open"] == 1
    assert len({name for result in results for name in result["mine"]}) == 8
    whole = sum(spec.shape[0] * spec.shape[1] for spec in SPECS)
    assert sum(result["elements"] for result in results) == len(STATE_KINDS) * whole


def test_replicas_are_saved_once(tmp_path: Path, four: RankPool) -> None:
    four.run(f"{HERE}:save_case", folder=str(tmp_path), replicas=2)
    assert all(result["right"] for result in four.run(f"{HERE}:restore_case", folder=str(tmp_path), replicas=2))


def failing_case(folder: str, failing_rank: int, how: str) -> str:
    """What each rank sees when one of them cannot read its second tensor."""
    shards = Shards()
    calls = 0
    path = Path(folder) / "checkpoints" / "step-00000001"

    def read(checkpoint: LoadedCheckpoint, kind: StateKind, name: str, start: int, stop: int) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if rank() == failing_rank and calls == 2:
            if how == "error":
                raise OSError("disk went away")
            return torch.zeros(1)
        return checkpoint.read(kind, name, start, stop)

    with load(path, verified=True) as checkpoint:
        try:
            shards.state.import_(lambda *key: read(checkpoint, *key), checkpoint.reading_order())
        except CheckpointError as error:
            return str(error)
    return "no error"


@pytest.mark.parametrize("how", ["error", "too short"])
def test_a_rank_that_cannot_read_leaves_no_other_waiting(tmp_path: Path, four: RankPool, how: str) -> None:
    four.run(f"{HERE}:save_case", folder=str(tmp_path))
    answers = four.run(f"{HERE}:failing_case", folder=str(tmp_path), failing_rank=2, how=how)
    assert len(set(answers)) == 1
    assert "rank 2: " in answers[0]


def held_case(folder: str, import_too: bool) -> int:
    """Rank 1 handles its first tensor only when rank 0 has handled all of its six; returns how many each got."""
    shards = Shards()
    shards.fill(3)
    signal = Path(folder) / f"rank-0-has-all-{import_too}"
    handled = 0

    def handle() -> None:
        nonlocal handled
        handled += 1
        if (rank(), handled) == (0, 6):
            signal.touch()
        deadline = time.monotonic() + 20
        while (rank(), handled) == (1, 1) and not signal.exists():
            assert time.monotonic() < deadline, "rank 0 waits for rank 1"
            time.sleep(0.01)

    order: list[tuple[str, StateKind]] = [(spec.name, kind) for spec in SPECS for kind in STATE_KINDS]
    owner: dict[Any, int] = {(kind, name): number % world_size() for number, (name, kind) in enumerate(order)}
    if import_too:

        def read(kind: StateKind, name: str, start: int, stop: int) -> torch.Tensor:
            handle()
            return torch.zeros(stop - start)

        shards.state.import_(read, [(owner[kind, name], kind, name) for name, kind in order])
        return handled
    for tensor in shards.state.export(lambda kind, name: owner[kind, name]):
        if tensor.values is not None:
            handle()
    return handled


def messages_case() -> tuple[dict[str, int], int]:
    """(calls of torch.distributed during an export, tensors of which this rank sends a part)."""
    import torch.distributed as dist

    shards = Shards()
    calls = dict.fromkeys(("isend", "send", "broadcast", "all_reduce", "all_gather", "gather", "barrier"), 0)

    def counted(name: str) -> Any:
        original = getattr(dist, name)

        def call(*arguments: Any, **options: Any) -> Any:
            calls[name] += 1
            return original(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in calls:
            patch.setattr(dist, name, counted(name))
        owned = sum(
            t.values is not None for t in shards.state.export(lambda kind, name: len(name + kind) % world_size())
        )
    held = sum(start < stop for start, stop in shards.ranges.values()) * len(STATE_KINDS)
    return calls, held - owned


def test_ranks_read_at_one_pace_in_bytes(tmp_path: Path, four: RankPool) -> None:
    four.run(f"{HERE}:save_case", folder=str(tmp_path))
    manifest = read_manifest(tmp_path / "checkpoints/step-00000001")
    bytes_of = {tensor.name: 4 * tensor.shape[0] * tensor.shape[1] for tensor in manifest.tensors}
    for ranks in (1, 2, 3, 4):
        order = reading_order(manifest, ranks)
        assert sorted((kind, name) for _, kind, name in order) == sorted((k, n) for n in bytes_of for k in STATE_KINDS)
        read = [0] * ranks
        for number, (reader, _, name) in enumerate(order):
            waiting = {rank for rank, _, _ in order[number:]}
            assert read[reader] == min(read[rank] for rank in waiting)
            read[reader] += bytes_of[name]
        largest = max(manifest.files[name].num_bytes for name in manifest.files)
        assert max(read) - min(read) <= largest


def test_a_tensor_costs_one_message_of_each_rank_and_no_collective(four: RankPool) -> None:
    for calls, sent in four.run(f"{HERE}:messages_case"):
        assert sent > 0
        assert calls.pop("isend") == sent
        assert set(calls.values()) == {0}


def test_an_owner_that_is_slow_to_write_holds_up_no_other(tmp_path: Path, four: RankPool) -> None:
    assert four.run(f"{HERE}:held_case", folder=str(tmp_path), import_too=False) == [6, 5, 5, 5]


def test_a_rank_that_is_slow_to_read_holds_up_no_other(tmp_path: Path, four: RankPool) -> None:
    assert four.run(f"{HERE}:held_case", folder=str(tmp_path), import_too=True) == [6, 5, 5, 5]
