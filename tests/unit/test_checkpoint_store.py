from __future__ import annotations

import errno
import math
import os
import pickle
import pickletools
import resource
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dist_cpt.checkpoint.load import load, newest_valid, require_fit
from dist_cpt.checkpoint.retention import prune, remove_staging, set_aside_after
from dist_cpt.checkpoint.safetensors_stream import StreamWriter
from dist_cpt.checkpoint.save import SAVE_POINTS
from dist_cpt.checkpoint.verify import verify_checkpoint
from dist_cpt.errors import CheckpointError, NumericsError, WriteError
from dist_cpt.run_folder.checkpoints import published, superseded
from dist_cpt.run_folder.manifest import Identity
from dist_cpt.training_state import ExportedTensor, TensorSpec
from tests.checkpoint_state import (
    EMBED,
    FULL_SPECS,
    HEAD,
    IDENTITY,
    LORA_A,
    SPECS,
    ShardedState,
    matches,
    save_step,
    train_state,
    write_adapter_config,
)
from tests.claimed import claimed


def leftovers(run_folder: Path) -> list[str]:
    return sorted(path.name for path in run_folder.rglob("*.tmp"))


@pytest.mark.parametrize("specs", [SPECS, FULL_SPECS], ids=["adapter", "full"])
def test_what_was_saved_is_read_back_bit_for_bit(tmp_path: Path, specs: tuple[TensorSpec, ...]) -> None:
    info = save_step(tmp_path, 12, specs=specs)
    assert info.path == tmp_path / "checkpoints" / "step-00000012"
    assert verify_checkpoint(info.path) == []
    with load(info.path) as checkpoint:
        assert matches(checkpoint, 12, specs)
        assert not matches(checkpoint, 13, specs)
        assert checkpoint.state == train_state(12)
        assert checkpoint.manifest.names() == [spec.name for spec in specs]
        assert (checkpoint.manifest.engine, checkpoint.manifest.world_size) == ("fsdp-full", 1)
    assert leftovers(tmp_path) == []


def test_a_checkpoint_costs_twelve_bytes_per_trainable_parameter(tmp_path: Path) -> None:
    specs = (TensorSpec("base_model.model.a.weight", (1000, 1000), "bfloat16", "adapter"),)
    info = save_step(tmp_path, 1, specs=specs)
    on_disk = sum(path.stat().st_size for path in info.path.iterdir())
    assert on_disk / 1_000_000 <= 12.6
    assert info.num_bytes == on_disk - (info.path / "manifest.json").stat().st_size


def test_an_alias_is_written_under_both_keys(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    path = save_step(tmp_path, 1, aliases={HEAD: EMBED}).path
    weights = load_file(path / "adapter_model.safetensors")
    assert torch.equal(weights[HEAD], weights[EMBED])
    assert verify_checkpoint(path) == []


def test_the_points_of_the_protocol_come_in_order(tmp_path: Path) -> None:
    seen: list[str] = []
    save_step(tmp_path, 1, fault=lambda point, step: seen.append(point))
    assert list(dict.fromkeys(seen)) == [f"save.{point}" for point in SAVE_POINTS if point != "aside"]
    seen.clear()
    save_step(tmp_path, 2, trial=True, fault=lambda point, step: seen.append(point))
    assert list(dict.fromkeys(seen)) == [f"trial.{point}" for point in SAVE_POINTS[: SAVE_POINTS.index("manifest")]]
    assert [path.name for path in published(tmp_path)] == ["step-00000001"]
    assert leftovers(tmp_path) == []


def other_adapter_config(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LOHA"}')


def flip(path: Path, offset: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 4
    path.write_bytes(bytes(raw))


def zero_end(path: Path) -> None:
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.seek(size // 2)
        file.write(b"\0" * (size - size // 2))


FILES = ["adapter_model.safetensors", "optimizer-00001-of-00001.safetensors", "state.json", "adapter_config.json"]
DAMAGE = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 5),
    "emptied": lambda path: os.truncate(path, 0),
    "zeroed": zero_end,
    "flipped at the end": lambda path: flip(path, -1),
    "flipped at the start": lambda path: flip(path, 0),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b" "),
    "deleted": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a link": lambda path: (path.rename(path.parent.parent / "elsewhere"), path.symlink_to("../elsewhere")),
    "of another step": lambda path: shutil.copy(path.parent.parent / "step-00000010" / path.name, path),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_damage_is_named_and_the_checkpoint_before_is_used(tmp_path: Path, name: str, damage: str) -> None:
    save_step(tmp_path, 10)
    newest = save_step(tmp_path, 20, sidecars=[other_adapter_config]).path
    DAMAGE[damage](newest / name)
    problems = verify_checkpoint(newest)
    assert problems
    assert any(name in problem for problem in problems)
    path, skipped = newest_valid(tmp_path)
    assert path is not None
    assert path.name == "step-00000010"
    assert [step for step, _ in skipped] == ["step-00000020"]
    with load(path, verified=True) as checkpoint:
        assert matches(checkpoint, 10)
    with pytest.raises(CheckpointError, match="step-00000020"):
        load(newest)


def test_extra_files_and_renamed_folders_are_noticed(tmp_path: Path) -> None:
    path = save_step(tmp_path, 10).path
    (path / "more").mkdir()
    (path / "more" / "extra.bin").write_bytes(b"x")
    (problem,) = verify_checkpoint(path)
    assert problem.startswith("more/extra.bin ")
    shutil.rmtree(path / "more")
    path.rename(path.with_name("step-00000011"))
    (problem,) = verify_checkpoint(path.with_name("step-00000011"))
    assert "step 10" in problem
    assert "step-00000011" in problem


def test_a_whole_run_without_a_good_checkpoint_says_why_for_each(tmp_path: Path) -> None:
    assert newest_valid(tmp_path) == (None, [])
    for step in (10, 20):
        path = save_step(tmp_path, step).path
        (path / "manifest.json").unlink()
    (tmp_path / "checkpoints" / "step-00000030.attempt-0-aa.tmp").mkdir()
    (tmp_path / "checkpoints" / "notes").mkdir()
    with pytest.raises(CheckpointError, match=r"step-00000020: manifest\.json .*step-00000010: manifest\.json "):
        newest_valid(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_state_that_is_not_finite_is_never_published(tmp_path: Path, value: float) -> None:
    save_step(tmp_path, 10)
    state = ShardedState(20)
    state.parts["exp_avg_sq", LORA_A][2, 3] = value
    with pytest.raises(NumericsError, match=LORA_A):
        save_step(tmp_path, 20, export=state.export_state)
    assert [path.name for path in published(tmp_path)] == ["step-00000010"]
    assert leftovers(tmp_path) == []


def test_an_export_that_differs_from_the_declared_tensors_is_refused(tmp_path: Path) -> None:
    whole = list(ShardedState(1).export_state(lambda kind, name: 0))
    last = f"{whole[-1].kind}.{whole[-1].name}"
    wrong: list[tuple[str, list[ExportedTensor]]] = [
        (last, whole[:-1]),
        ("master.other", [*whole, ExportedTensor("master", "other", torch.zeros(2))]),
        (f"master.{LORA_A} .*rank 0", [ExportedTensor("master", LORA_A, None), *whole[1:]]),
        (whole[0].name, [whole[0], *whole]),
        (rf"{LORA_A}.*fp32 \[4, 32\]", [ExportedTensor("master", LORA_A, torch.zeros(0)), *whole[1:]]),
    ]
    for named, exported in wrong:
        with pytest.raises(CheckpointError, match=named):
            save_step(tmp_path, 1, export=lambda owner_of, exported=exported: exported)
        assert published(tmp_path) == []
        assert leftovers(tmp_path) == []


def test_a_failing_or_missing_sidecar_publishes_nothing(tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        raise ValueError("no tokenizer")

    def full(folder: Path) -> None:
        raise Exception("No space left on device (os error 28)")  # as the tokenizers library does

    from dist_cpt.errors import DistCptError

    with pytest.raises(DistCptError, match="no tokenizer"):
        save_step(tmp_path, 1, sidecars=[write_adapter_config, fails])
    with pytest.raises(WriteError, match="os error 28"):
        save_step(tmp_path, 1, sidecars=[write_adapter_config, full])
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        save_step(tmp_path, 1, sidecars=[])
    assert published(tmp_path) == []
    assert leftovers(tmp_path) == []


def test_a_pickle_is_refused_and_a_checkpoint_holds_none(tmp_path: Path) -> None:
    class Canary:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (os.system, (f"touch {tmp_path / 'sung'}",))

    def pickled(folder: Path) -> None:
        (folder / "training_args.bin").write_bytes(pickle.dumps(Canary()))

    with pytest.raises(CheckpointError, match=r"training_args\.bin"):
        save_step(tmp_path, 1, sidecars=[write_adapter_config, pickled])
    path = save_step(tmp_path, 1).path
    for file in path.rglob("*"):
        with pytest.raises(Exception):  # noqa: B017, PT011  (whatever the pickle parser finds wrong)
            list(pickletools.genops(file.read_bytes()))
    assert not (tmp_path / "sung").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"may not mount a small disk here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_keeps_the_previous_checkpoint(small_disk: Path) -> None:
    kept = save_step(small_disk, 10).path
    (small_disk / "ballast").write_bytes(b"x" * 180 * 1024)
    with pytest.raises(WriteError, match=r"step 20 .*ENOSPC.*step-00000010") as caught:
        save_step(small_disk, 20)
    assert caught.value.exit_code == 73
    assert leftovers(small_disk) == []
    assert verify_checkpoint(kept) == []
    (small_disk / "ballast").unlink()
    assert verify_checkpoint(save_step(small_disk, 20).path) == []


def test_a_read_only_disk_is_named(small_disk: Path) -> None:
    save_step(small_disk, 10)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(WriteError, match=r"EROFS.*step-00000010"):
        save_step(small_disk, 20)


def test_a_file_size_limit_is_a_write_error(tmp_path: Path) -> None:
    save_step(tmp_path, 10)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        with pytest.raises(WriteError, match="EFBIG"):
            save_step(tmp_path, 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert leftovers(tmp_path) == []
    assert newest_valid(tmp_path)[0] == tmp_path / "checkpoints" / "step-00000010"


def test_a_file_in_the_place_of_the_folder_is_a_write_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(WriteError, match=f"{tmp_path}/checkpoints"):
        save_step(tmp_path, 10)


@pytest.mark.parametrize("code", [errno.EDQUOT, errno.EIO])
def test_quota_and_disk_errors_are_write_errors(tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    save_step(tmp_path, 10)

    def fails(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(WriteError, match=errno.errorcode[code]):
        save_step(tmp_path, 20)
    monkeypatch.undo()
    assert leftovers(tmp_path) == []
    assert newest_valid(tmp_path)[0] == tmp_path / "checkpoints" / "step-00000010"


def test_a_tensor_is_written_while_another_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, second, real = [], threading.Event(), StreamWriter.write

    def write(writer: StreamWriter, key: str, values: torch.Tensor) -> str:
        begun.append(key)
        if len(begun) == 2:
            second.set()
        assert second.wait(20), "the second tensor waits for the first one"
        return real(writer, key, values)

    monkeypatch.setattr(StreamWriter, "write", write)
    assert verify_checkpoint(save_step(tmp_path, 10).path) == []


def test_bytes_that_read_back_differently_are_not_published(tmp_path: Path) -> None:
    def disturb(point: str, step: int) -> None:
        if point == "save.written":
            flip(next(tmp_path.rglob("optimizer-*.safetensors")), -1)

    with pytest.raises(WriteError, match=r"optimizer-00001-of-00001\.safetensors"):
        save_step(tmp_path, 10, fault=disturb)
    assert published(tmp_path) == []
    assert leftovers(tmp_path) == []


def test_old_checkpoints_go_only_after_a_new_one_is_published(tmp_path: Path) -> None:
    def names() -> list[str]:
        return [path.name for path in published(tmp_path)]

    before_publishing: list[list[str]] = []

    def look(point: str, step: int) -> None:
        if point == "save.manifest":
            before_publishing.append(names())

    for step in (1, 2, 3, 4):
        save_step(tmp_path, step, keep=2, fault=look)
    assert before_publishing[-1] == ["step-00000003", "step-00000002"]
    assert names() == ["step-00000004", "step-00000003"]
    assert leftovers(tmp_path) == []


def test_a_damaged_checkpoint_does_not_count_as_one_of_those_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_step(tmp_path, step, keep=9)
    (tmp_path / "checkpoints" / "step-00000002" / "state.json").unlink()
    prune(claimed(tmp_path), tmp_path / "checkpoints" / "step-00000003", keep=2)
    assert [path.name for path in published(tmp_path)] == ["step-00000003", "step-00000002", "step-00000001"]


def test_the_landmark_is_kept_beside_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save_step(tmp_path, step, keep=9)
    prune(claimed(tmp_path), tmp_path / "checkpoints" / "step-00000005", keep=2, landmarks=[2])
    assert [path.name for path in published(tmp_path)] == ["step-00000005", "step-00000004", "step-00000002"]


def test_a_damaged_later_step_does_not_push_out_the_last_good_one(tmp_path: Path) -> None:
    for step in (90, 100):
        save_step(tmp_path, step, keep=2)
    flip(tmp_path / "checkpoints" / "step-00000100" / "adapter_model.safetensors", -1)
    assert newest_valid(tmp_path)[0] == tmp_path / "checkpoints" / "step-00000090"
    save_step(tmp_path, 95, keep=1, attempt=1)
    path, skipped = newest_valid(tmp_path)
    assert path == tmp_path / "checkpoints" / "step-00000095"
    assert [name for name, _ in skipped] == ["step-00000100"]


def test_the_same_state_again_is_kept_once(tmp_path: Path) -> None:
    first = save_step(tmp_path, 10)
    written = (first.path / "manifest.json").stat().st_ino
    assert save_step(tmp_path, 10, attempt=1).path == first.path
    assert (first.path / "manifest.json").stat().st_ino == written
    assert (superseded(tmp_path), leftovers(tmp_path)) == ([], [])


@pytest.mark.parametrize("damaged", [False, True])
def test_another_state_of_the_same_step_moves_the_old_one_aside(tmp_path: Path, damaged: bool) -> None:
    first = save_step(tmp_path, 10)
    if damaged:
        flip(first.path / "adapter_model.safetensors", -1)
    second = save_step(tmp_path, 10, seed=10 if damaged else 99, attempt=1)
    assert second.path == first.path
    assert verify_checkpoint(second.path) == []
    with load(second.path) as checkpoint:
        assert checkpoint.manifest.attempt == 1
        assert matches(checkpoint, 10 if damaged else 99)
    (aside,) = superseded(tmp_path)
    assert (verify_checkpoint(aside) == []) is not damaged


def test_a_crash_between_the_two_renames_still_finds_the_one_moved_aside(tmp_path: Path) -> None:
    save_step(tmp_path, 10)

    class Crash(BaseException):
        pass

    def crash(point: str, step: int) -> None:
        if point == "save.aside":
            raise Crash

    with pytest.raises(Crash):
        save_step(tmp_path, 10, seed=99, attempt=1, fault=crash)
    assert published(tmp_path) == []
    path, _ = newest_valid(tmp_path)
    assert path is not None
    with load(path) as checkpoint:
        assert matches(checkpoint, 10)


def test_staging_folders_of_earlier_attempts_go(tmp_path: Path) -> None:
    save_step(tmp_path, 10, attempt=1)
    names = ["step-00000010.attempt-0-aa.tmp", "step-00000020.attempt-1-bb.tmp", "step-00000020.attempt-2-cc.tmp"]
    for name in names:
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "optimizer-00001-of-00001.safetensors").write_bytes(b"half")
    assert remove_staging(tmp_path, before_attempt=2) == names[:2]
    assert (tmp_path / "checkpoints" / names[2]).exists()
    assert newest_valid(tmp_path)[0] is not None


def test_a_refused_save_makes_room_for_the_next_try(tmp_path: Path) -> None:
    orphan = tmp_path / "checkpoints" / "step-00000010.attempt-0-aa.tmp"
    orphan.mkdir(parents=True)

    def full(point: str, step: int) -> None:
        if point == "save.written":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(WriteError):
        save_step(tmp_path, 10, attempt=1, fault=full)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def linked(path: Path, elsewhere: Path) -> Path:
    """A checkpoint that was moved to another disk, and a relative link in its place."""
    path.rename(elsewhere)
    path.symlink_to(os.path.relpath(elsewhere, path.parent))
    return elsewhere


def test_only_the_link_to_a_checkpoint_elsewhere_is_moved_or_removed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first, second = (save_step(run, step, keep=9).path for step in (10, 20))
    elsewhere = [linked(first, tmp_path / "first"), linked(second, tmp_path / "second")]
    before = {path: path.read_bytes() for folder in elsewhere for path in folder.iterdir()}
    assert newest_valid(run) == (second, [])
    claim = claimed(run)
    set_aside_after(claim, 10)
    (aside,) = superseded(run)
    assert verify_checkpoint(aside) == []  # the link leads there from its new place too
    save_step(run, 20, keep=9, seed=1)
    save_step(run, 30, keep=1, seed=2)
    assert [path.name for path in published(run)] == ["step-00000030"]
    assert list(run.rglob("*.tmp")) == []
    assert {path: path.read_bytes() for folder in elsewhere for path in folder.iterdir()} == before


def test_a_checkpoint_of_something_else_is_refused_by_name(tmp_path: Path) -> None:
    with load(save_step(tmp_path, 10).path) as checkpoint:
        manifest = checkpoint.manifest
    moved = Identity({"path": "/moved", "sha256": "b" * 64}, IDENTITY.data, "other", "zero-3")
    require_fit(manifest, SPECS, moved)
    with pytest.raises(CheckpointError, match=LORA_A):
        require_fit(manifest, SPECS[1:], IDENTITY)
    with pytest.raises(CheckpointError, match="step 10: "):
        require_fit(manifest, SPECS[::-1], IDENTITY)
    wide = TensorSpec(EMBED, (64, 32), "bfloat16", "embeddings")
    with pytest.raises(CheckpointError, match=r"\[61, 32\].*\[64, 32\]"):
        require_fit(manifest, (*SPECS[:2], wide), IDENTITY)
    with pytest.raises(CheckpointError, match=r"base\.sha256"):
        require_fit(manifest, SPECS, Identity({"path": "/base", "sha256": "c"}, IDENTITY.data, "", ""))
    with pytest.raises(CheckpointError, match=r"data\.sha256"):
        require_fit(manifest, SPECS, Identity(IDENTITY.base, {"sha256": "c"}, "", ""))


def test_reading_a_slice_touches_no_other_tensor(tmp_path: Path) -> None:
    path = save_step(tmp_path, 10).path
    with load(path) as checkpoint:
        read = checkpoint.read("exp_avg", EMBED, 32, 64)
        assert torch.equal(read, checkpoint.read("exp_avg", EMBED, 0, math.prod((61, 32)))[32:64])
        with pytest.raises(CheckpointError, match="exp_avg of nothing"):
            checkpoint.read("exp_avg", "nothing", 0, 1)
