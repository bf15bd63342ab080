"""Checkpoints of several ranks: what one rank meets reaches all, and no kill leaves a run without one."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_cpt.checkpoint.certificate import ReplayedLoss, certify
from dist_cpt.checkpoint.load import load, newest_valid
from dist_cpt.checkpoint.plan_files import owners, plan_files
from dist_cpt.checkpoint.retention import remove_staging
from dist_cpt.checkpoint.save import POINTS_ON_EVERY_RANK, SAVE_POINTS
from dist_cpt.checkpoint.verify import verify_checkpoint
from dist_cpt.errors import DistCptError
from dist_cpt.run_folder.checkpoints import published
from dist_cpt.runtime.collectives import rank, world_size
from dist_cpt.training_state import STATE_KINDS, ExportedTensor, ExportState, OwnerOf, StateKind, TensorSpec
from tests.checkpoint_state import FULL_SPECS, LORA_A, SPECS, ShardedState, matches, save_step
from tests.ranks import RankError, RankPool

HERE = "tests.distributed.test_checkpoint_ranks"


def _specs(adapter: bool) -> Any:
    return SPECS if adapter else FULL_SPECS


def save_case(folder: str, step: int, adapter: bool = True, **changes: Any) -> str:
    return save_step(Path(folder), step, specs=_specs(adapter), **changes).path.name


def restore_case(folder: str, adapter: bool) -> dict[str, Any]:
    """Load onto this world, certify what arrived, and save it again as the next step."""
    run_folder, specs = Path(folder), _specs(adapter)
    path, _ = newest_valid(run_folder)
    assert path is not None
    state = ShardedState(-1, specs)
    with load(path, verified=True) as checkpoint:
        state.import_state(checkpoint)
        saved = checkpoint.manifest
        placed = owners(specs, world_size(), adapter)
        certificate = certify(
            saved,
            state.export_state(lambda kind, name: placed[kind, name]),
            facts={},
            loss=ReplayedLoss(checkpoint.state.probe.loss, checkpoint.state.probe.loss, tolerance=0.0),
        )
    again = save_step(run_folder, saved.step + 1, specs=specs, export=state.export_state)
    return {"certificate": certificate, "path": str(again.path), "hashes": [t.sha256 for t in saved.tensors]}


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "full"])
def test_every_ranks_slice_survives_a_change_of_the_world_size(
    tmp_path: Path, pool: RankPool, four: RankPool, adapter: bool
) -> None:
    pool.run(f"{HERE}:save_case", folder=str(tmp_path), step=1, adapter=adapter)
    assert verify_checkpoint(tmp_path / "checkpoints" / "step-00000001") == []
    restored = [*four.run(f"{HERE}:restore_case", folder=str(tmp_path), adapter=adapter)]
    restored += pool.run(f"{HERE}:restore_case", folder=str(tmp_path), adapter=adapter)
    restored.append(restore_case(str(tmp_path), adapter))
    assert all(result["certificate"]["verdict"] == "pass" for result in restored)
    assert all(result["hashes"] == restored[0]["hashes"] for result in restored)
    with load(Path(restored[-1]["path"])) as checkpoint:
        assert checkpoint.manifest.step == 4
        assert matches(checkpoint, 1, _specs(adapter))


def test_full_parameter_shards_lie_on_several_ranks(tmp_path: Path, pool: RankPool) -> None:
    pool.run(f"{HERE}:save_case", folder=str(tmp_path), step=1, adapter=False)
    names = {path.name for path in (tmp_path / "checkpoints" / "step-00000001").iterdir()}
    assert {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"} <= names
    assert {"optimizer-00001-of-00002.safetensors", "optimizer-00002-of-00002.safetensors"} <= names


def damaged_case(folder: str) -> tuple[str, list[tuple[str, str]]]:
    path, skipped = newest_valid(Path(folder))
    return str(path), skipped


def test_all_ranks_skip_the_same_damaged_checkpoint(tmp_path: Path, pool: RankPool) -> None:
    for step in (1, 2):
        pool.run(f"{HERE}:save_case", folder=str(tmp_path), step=step)
    victim = tmp_path / "checkpoints" / "step-00000002" / "optimizer-00002-of-00002.safetensors"
    raw = bytearray(victim.read_bytes())
    raw[-2] ^= 64
    victim.write_bytes(bytes(raw))
    first, second = pool.run(f"{HERE}:damaged_case", folder=str(tmp_path))
    assert first == second
    assert Path(first[0]).name == "step-00000001"
    assert first[1][0][0] == "step-00000002"
    assert "optimizer-00002-of-00002.safetensors" in first[1][0][1]


def failing_case(folder: str, how: str) -> tuple[str, str, int]:
    """Only rank 1 fails; every rank returns the error it raised."""
    state = ShardedState(2)
    changes: dict[str, Any] = {"export": state.export_state}
    if how == "nan":
        state.parts["exp_avg", LORA_A] = torch.full_like(state.parts["exp_avg", LORA_A], float("nan"))
    if how == "disk" and rank() == 1:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (512, resource.RLIM_INFINITY))
    if how == "sidecar":
        changes["sidecars"] = [_refuse]
    try:
        save_step(Path(folder), 2, **changes)
    except DistCptError as error:
        return type(error).__name__, str(error), rank()
    finally:
        if how == "disk":
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return "saved", "", rank()


def _refuse(folder: Path) -> None:
    raise PermissionError(13, "Permission denied", str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    ("how", "name", "named"),
    [("nan", "NumericsError", LORA_A), ("disk", "WriteError", "rank 1"), ("sidecar", "WriteError", "rank 0")],
)
def test_an_error_of_one_rank_reaches_all(tmp_path: Path, pool: RankPool, how: str, name: str, named: str) -> None:
    pool.run(f"{HERE}:save_case", folder=str(tmp_path), step=1)
    answers = pool.run(f"{HERE}:failing_case", folder=str(tmp_path), how=how)
    assert [answer[0] for answer in answers] == [name, name]
    assert answers[0][1] == answers[1][1]
    assert named in answers[0][1]
    assert list(tmp_path.rglob("*.tmp")) == []
    assert verify_checkpoint(tmp_path / "checkpoints" / "step-00000001") == []
    assert pool.run(f"{HERE}:save_case", folder=str(tmp_path), step=2) == ["step-00000002"] * 2


def killed_case(folder: str, point: str, victim: int, seed: int) -> str:
    def fault(here: str, step: int) -> None:
        if here == f"save.{point}" and rank() == victim:
            os.kill(os.getpid(), signal.SIGKILL)

    return save_step(Path(folder), 20, seed=seed, attempt=1, keep=1, fault=fault).path.name


KILLS = [(point, 0) for point in SAVE_POINTS] + [(point, 1) for point in POINTS_ON_EVERY_RANK]


@pytest.mark.parametrize(("point", "victim"), KILLS)
def test_a_kill_at_any_point_leaves_a_valid_checkpoint(tmp_path: Path, pool: RankPool, point: str, victim: int) -> None:
    pool.run(f"{HERE}:save_case", folder=str(tmp_path), step=10)
    if point == "aside":  # only reached where step 20 exists with another state
        pool.run(f"{HERE}:save_case", folder=str(tmp_path), step=20)
    with pytest.raises(RankError, match="no answer"):
        pool.run(f"{HERE}:killed_case", folder=str(tmp_path), point=point, victim=victim, seed=21)
    path, skipped = newest_valid(tmp_path)
    assert path is not None
    assert skipped == []
    with load(path) as checkpoint:
        done = point in ("renamed", "published", "pruned")
        assert checkpoint.manifest.step == (20 if done else 10)
        assert matches(checkpoint, 21 if done else 10)
    # The next attempt removes the staging folder, reaches the step and saves it.
    remove_staging(tmp_path, before_attempt=2)
    assert pool.run(f"{HERE}:save_case", folder=str(tmp_path), step=20, seed=22, attempt=2, keep=1)
    assert [found.name for found in published(tmp_path)] == ["step-00000020"]
    assert list(tmp_path.rglob("*.tmp")) == []
    with load(tmp_path / "checkpoints" / "step-00000020") as checkpoint:
        assert matches(checkpoint, 22)


def whole_tensors(specs: Sequence[TensorSpec]) -> ExportState:
    """An export without collectives: every owner makes up its tensors."""

    def export(owner_of: OwnerOf, kinds: Sequence[StateKind] = STATE_KINDS) -> Iterator[ExportedTensor]:
        for spec in specs:
            for kind in kinds:
                mine = owner_of(kind, spec.name) == rank()
                yield ExportedTensor(kind, spec.name, torch.randn(spec.shape) if mine else None)

    return export


def peak_case(folder: str) -> float:
    """MiB by which this rank's resident set grew at most while it saved 24 tensors of 4 MiB (288 MiB)."""
    import resource

    save_step(Path(folder), 0)  # everything is imported and mapped after this
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    specs = tuple(TensorSpec(f"w{i}.weight", (1024, 1024), "bfloat16", "weights") for i in range(24))
    save_step(Path(folder), 1, specs=specs, export=whole_tensors(specs))
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def test_saving_holds_one_tensor_at_a_time(tmp_path: Path, four: RankPool) -> None:
    four.close()  # fresh processes: the peak of a process never falls
    grown = four.run(f"{HERE}:peak_case", folder=str(tmp_path))
    assert max(grown) < 48  # a few tensors and the 16 MiB read buffer, out of 72 or more per rank


def received_case(folder: str, count: int) -> int:
    """Bytes that the collectives of a save with `count` tensors bring to this rank, the export left out."""
    import torch.distributed as dist

    received = 0

    def counting(collective: Any, received_by: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal received
            received += sum(tensor.nbytes for tensor in received_by(arguments[0], arguments) or ())
            return collective(*arguments, **options)

        return call

    specs = tuple(replace(SPECS[0], name=f"{LORA_A}.{number}") for number in range(count))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "broadcast"):
            patch.setattr(dist, name, counting(getattr(dist, name), lambda first, _: [first]))
        patch.setattr(dist, "all_gather", counting(dist.all_gather, lambda first, _: first))
        patch.setattr(dist, "gather", counting(dist.gather, lambda _, arguments: arguments[1]))
        save_step(Path(folder), count, specs=specs, export=whole_tensors(specs))
    return received


def test_only_rank_0_receives_what_the_manifest_lists(tmp_path: Path, four: RankPool) -> None:
    few = four.run(f"{HERE}:received_case", folder=str(tmp_path), count=10)
    many = four.run(f"{HERE}:received_case", folder=str(tmp_path), count=100)
    assert max(abs(more - less) for more, less in zip(many[1:], few[1:], strict=True)) < 16  # digits of a number
    assert many[0] > 4 * few[0]


def test_the_plan_names_a_file_for_every_rank_that_writes() -> None:
    files = plan_files(SPECS, {}, owners(SPECS, 2, True), True)
    assert next((file.name, file.owner) for file in files) == ("adapter_model.safetensors", 0)
    assert {file.owner for file in files} == {0, 1}
