from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dist_cpt.checkpoint import safetensors_stream
from dist_cpt.checkpoint.safetensors_stream import StreamWriter, TensorFile, scan, tensor_sha256
from dist_cpt.errors import CheckpointError, NumericsError
from dist_cpt.runtime.threads import started

TENSORS = {"b": torch.randn(5, 7), "a": torch.randn(3), "scalar": torch.tensor(2.5), "é": torch.randn(1, 2, 3)}


def write(path: Path, tensors: dict[str, torch.Tensor] = TENSORS) -> dict[str, str]:
    writer = StreamWriter(path, {key: tuple(value.shape) for key, value in tensors.items()})
    hashes = {key: writer.write(key, tensors[key]) for key in reversed(tensors)}  # not the order of the file
    writer.finish()
    return hashes


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors")
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[key], value) for key, value in TENSORS.items())
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_we_read_what_the_library_writes(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors")
    content = scan(tmp_path / "x.safetensors")
    assert {key: tensor.sha256 for key, tensor in content.tensors.items()} == {
        key: tensor_sha256(value) for key, value in TENSORS.items()
    }


def test_slices_are_those_of_the_flat_tensor(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors")
    file = TensorFile(tmp_path / "x.safetensors")
    flat = TENSORS["b"].view(-1)
    for start, stop in ((0, 35), (3, 11), (34, 35), (35, 35)):
        assert torch.equal(file.read("b", start, stop), flat[start:stop])
    with pytest.raises(CheckpointError, match="35 elements, asked for 30:36"):
        file.read("b", 30, 36)
    with pytest.raises(CheckpointError, match="no tensor c"):
        file.read("c", 0, 1)
    file.close()


def test_scan_hashes_across_chunk_borders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    from dist_cpt.checkpoint import safetensors_stream

    hashes = write(tmp_path / "x.safetensors")
    monkeypatch.setattr(safetensors_stream, "CHUNK_BYTES", 16)
    content = scan(tmp_path / "x.safetensors")
    raw = (tmp_path / "x.safetensors").read_bytes()
    assert (content.num_bytes, content.sha256) == (len(raw), hashlib.sha256(raw).hexdigest())
    assert {key: tensor.sha256 for key, tensor in content.tensors.items()} == hashes
    assert all(tensor.finite for tensor in content.tensors.values())


def test_several_threads_share_small_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tensors of 2 MiB, as in many an adapter: no piece is a large part of the file."""
    sizes: dict[str, list[int]] = {"_write_all": [], "_read_all": []}
    for name, at in (("_write_all", 1), ("_read_all", 2)):
        real = getattr(safetensors_stream, name)
        counted = sizes[name]
        monkeypatch.setattr(
            safetensors_stream, name, lambda *a, real=real, at=at, into=counted: (into.append(len(a[at])), real(*a))[1]
        )
    tensors = {"a": torch.randn(512, 1024), "b": torch.randn(512, 1024)}
    hashes = write(tmp_path / "x.safetensors", tensors)
    assert max(sizes["_write_all"]) == 2**19
    content = scan(tmp_path / "x.safetensors")
    assert max(sizes["_read_all"]) == 2**18
    assert {key: tensor.sha256 for key, tensor in content.tensors.items()} == hashes


BIG = {f"layers.{i}": torch.randn(64, 64 + i) for i in range(16)}  # more than a page each


def written_behind(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[StreamWriter, threading.Event]:
    """A writer of BIG in small parts, and what is set once a part of its data has been read."""
    monkeypatch.setattr(safetensors_stream, "CHUNK_BYTES", 4096)
    data_was_read, real = threading.Event(), safetensors_stream._read_all

    def read_all(file: object, path: object, data: memoryview, offset: int) -> None:
        real(file, path, data, offset)
        if offset > 4096:
            data_was_read.set()

    monkeypatch.setattr(safetensors_stream, "_read_all", read_all)
    return StreamWriter(path, {key: tuple(value.shape) for key, value in BIG.items()}), data_was_read


def test_a_part_is_read_back_before_the_last_one_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, data_was_read = written_behind(tmp_path / "x.safetensors", monkeypatch)
    reading = started(writer.read_back)
    *first, last = BIG
    hashes = {key: writer.write(key, BIG[key]) for key in first}
    assert data_was_read.wait(20)
    assert not reading.done()
    hashes[last] = writer.write(last, BIG[last])
    writer.finish()
    content = reading.result()
    assert {key: tensor.sha256 for key, tensor in content.tensors.items()} == hashes
    assert content == scan(tmp_path / "x.safetensors")


def test_nothing_is_read_back_that_was_not_forced_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, data_was_read = written_behind(tmp_path / "x.safetensors", monkeypatch)
    may_force, real = threading.Event(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (may_force.wait(20), real(fd)))
    reading = started(writer.read_back)
    for key, values in BIG.items():
        writer.write(key, values)
    assert not data_was_read.wait(0.2)
    may_force.set()
    writer.finish()
    assert reading.result().num_bytes == (tmp_path / "x.safetensors").stat().st_size


def test_a_part_that_the_disk_refuses_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, _ = written_behind(tmp_path / "x.safetensors", monkeypatch)
    refuse = OSError(5, "Input/output error")

    def fails(_: int) -> None:
        raise refuse

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        reading = started(writer.read_back)
        *first, last = BIG
        for key in first:
            writer.write(key, BIG[key])
        assert reading.exception(20) is refuse
    writer.write(last, BIG[last])
    writer.finish()  # the kernel reports such an error once


def test_a_file_that_is_never_finished_is_not_read_for_ever(tmp_path: Path) -> None:
    writer = StreamWriter(tmp_path / "x.safetensors", {"a": (2, 2), "b": (1,)})
    reading = started(writer.read_back)
    writer.write("a", torch.zeros(2, 2))
    writer.close()
    assert isinstance(reading.exception(20), CheckpointError)


def test_a_file_truncated_while_open_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors")
    file = TensorFile(tmp_path / "x.safetensors")
    os.truncate(tmp_path / "x.safetensors", 300)
    with pytest.raises(CheckpointError, match=r"x\.safetensors\b.*\bbyte \d+"):
        file.read("é", 0, 6)
    file.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_values_are_refused(tmp_path: Path, value: float) -> None:
    writer = StreamWriter(tmp_path / "x.safetensors", {"a": (2, 2)})
    with pytest.raises(NumericsError, match=r"\ba\b"):
        writer.write("a", torch.tensor([[0.0, value], [1.0, 2.0]]))
    writer.close()


def test_only_the_tensors_of_the_header_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"\[0, 4\]"):
        StreamWriter(tmp_path / "empty", {"a": (0, 4)})
    writer = StreamWriter(tmp_path / "x.safetensors", {"a": (2, 2), "b": (1,)})
    with pytest.raises(CheckpointError, match=r"fp32 \[2, 2\]"):
        writer.write("a", torch.zeros(4))
    with pytest.raises(CheckpointError, match="bfloat16"):
        writer.write("a", torch.zeros(2, 2, dtype=torch.bfloat16))
    writer.write("a", torch.zeros(2, 2))
    with pytest.raises(CheckpointError, match=r"^a\b"):
        writer.write("a", torch.zeros(2, 2))
    with pytest.raises(CheckpointError, match=r"x\.safetensors: b\b"):
        writer.finish()
    writer.close()


def test_a_transposed_tensor_is_written_in_c_order(tmp_path: Path) -> None:
    values = torch.randn(3, 5).t()
    assert write(tmp_path / "x.safetensors", {"a": values})["a"] == tensor_sha256(values.contiguous())
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], values)


def test_links_and_folders_are_not_opened(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors")
    (tmp_path / "link").symlink_to(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="link"):
        scan(tmp_path / "link")
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        scan(tmp_path)


def test_damaged_headers_are_named(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors")
    raw = (tmp_path / "x.safetensors").read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    damaged = {
        "short": raw[:4],
        "length": b"\xff" * 8 + raw[8:],
        "header": raw[:8] + b"\0" * (begin - 8) + raw[begin:],
        "tail": raw + b"\0",
        "dtype": raw.replace(b'"F32"', b'"I32"'),
        "overlap": raw.replace(b'"data_offsets":[0,', b'"data_offsets":[4,'),
        "negative": raw.replace(b'"shape":[3]', b'"shape":[-]'),
        "nothing": b"",
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError):
            scan(tmp_path / name)
