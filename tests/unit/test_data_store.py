"""The token store: Megatron-LM's bytes, and refusal of anything that is not what the manifest says."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from dist_cpt.data.store import StoreWriter, TokenStore, check_chunks
from dist_cpt.errors import DataError

LENGTHS = np.array([3, 1, 5], dtype=np.int32)
IDS = np.array([5, 6, 0, 0, 9, 8, 7, 6, 0], dtype=np.int32)


def write(folder: Path, vocab_size: int = 100, parts: int = 1) -> Path:
    folder.mkdir()
    writer = StoreWriter(folder, vocab_size)
    ends = np.cumsum(LENGTHS)
    if parts == 1:
        writer.append(IDS, LENGTHS)
    else:
        writer.append(IDS[: ends[0]], LENGTHS[:1])
        writer.append(IDS[:0], LENGTHS[:0])
        writer.append(IDS[ends[0] :], LENGTHS[1:])
    writer.finish("hash", {"name": "s"}, {"records": 3}, [])
    return folder


@pytest.mark.parametrize(("vocab_size", "code", "char"), [(65499, 8, "H"), (65500, 4, "i")])
def test_bytes_are_megatron_lms(tmp_path: Path, vocab_size: int, code: int, char: str) -> None:
    folder = write(tmp_path / "s", vocab_size)
    size = struct.calcsize(char)
    expected = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code)
    expected += struct.pack("<Q", 3) + struct.pack("<Q", 4)
    expected += struct.pack("<3i", 3, 1, 5) + struct.pack("<3q", 0, 3 * size, 4 * size)
    expected += struct.pack("<4q", 0, 1, 2, 3)
    assert (folder / "tokens.idx").read_bytes() == expected
    assert (folder / "tokens.bin").read_bytes() == struct.pack(f"<9{char}", *IDS.tolist())


def test_opens_to_what_was_written_however_it_was_cut(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one"), write(tmp_path / "two", parts=2)
    store = TokenStore.open(one, verify=True)
    assert [store.document(i).tolist() for i in range(3)] == [[5, 6, 0], [0], [9, 8, 7, 6, 0]]
    assert (store.num_documents, store.num_tokens, store.tokens.dtype) == (3, 9, np.uint16)
    for name in ("tokens.bin", "tokens.idx"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    assert store.manifest.content_hash == TokenStore.open(two).manifest.content_hash


def test_first_id_beyond_a_vocabulary_is_found(tmp_path: Path) -> None:
    store = TokenStore.open(write(tmp_path / "s"))
    assert store.find_token_at_least(10) is None
    assert store.find_token_at_least(9) == (2, 9)
    assert store.find_token_at_least(6) == (0, 6)


def test_writer_refuses_ids_outside_the_vocabulary(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, 9)
    with pytest.raises(DataError, match="9"):
        writer.append(IDS, LENGTHS)
    writer.close()


DAMAGE = {
    "truncated bin": ("tokens.bin", lambda b: b[:-1], "bytes", False),
    "longer bin": ("tokens.bin", lambda b: b + b"\0\0", "bytes", False),
    "truncated idx": ("tokens.idx", lambda b: b[:-8], "bytes", False),
    "no magic": ("tokens.idx", lambda b: b"x" + b[1:], "MMIDIDX", False),
    "other dtype": ("tokens.idx", lambda b: b[:17] + b"\x04" + b[18:], "dtype", False),
    "other lengths": ("tokens.idx", lambda b: b[:34] + b"\x04" + b[35:], "sha256", True),
    "other last length": ("tokens.idx", lambda b: b[:42] + b"\x04" + b[43:], "token 8, not 9", False),
    "flipped bit": ("tokens.bin", lambda b: bytes([b[0] ^ 1]) + b[1:], "sha256", True),
    "bad manifest": ("manifest.json", lambda b: b[:-5], "manifest.json", False),
    "manifest of another format": ("manifest.json", lambda b: b.replace(b'version": 2', b'version": 3'), "3", False),
    "manifest without a field": ("manifest.json", lambda b: b.replace(b'"dtype"', b'"d"'), "'d'", False),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    name, change, message, verify = DAMAGE[kind]
    folder = write(tmp_path / "s")
    TokenStore.open(folder, verify=True)
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    with pytest.raises(DataError) as raised:
        TokenStore.open(folder, verify=verify)
    assert message in str(raised.value)
    assert str(folder / name) in str(raised.value)


def test_missing_parts_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "s")
    (folder / "tokens.bin").unlink()
    with pytest.raises(DataError, match=r"tokens\.bin"):
        TokenStore.open(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"manifest\.json"):
        TokenStore.open(folder)


def test_manifest_is_plain_json(tmp_path: Path) -> None:
    manifest = json.loads((write(tmp_path / "s") / "manifest.json").read_text())
    assert (manifest["num_documents"], manifest["num_tokens"], manifest["max_token_id"]) == (3, 9, 9)
    assert manifest["files"]["tokens.bin"]["bytes"] == 18


def test_every_chunk_has_a_hash_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_cpt.data.store.CHUNK_BYTES", 4)
    folder = write(tmp_path / "s", parts=2)
    store = TokenStore.open(folder, verify=True)
    mine = [(chunk.start, chunk.num_bytes) for chunk in store.chunks() if chunk.path.name == "tokens.bin"]
    assert mine == [(0, 4), (4, 4), (8, 4), (12, 4), (16, 2)]
    content = bytearray((folder / "tokens.bin").read_bytes())
    content[9] ^= 1
    (folder / "tokens.bin").write_bytes(content)
    with pytest.raises(DataError, match=r"tokens\.bin: chunk 2 \(4 bytes from 8\).*dist-cpt prepare"):
        check_chunks(store.chunks())
    check_chunks([chunk for chunk in store.chunks() if chunk.number != 2])


def test_a_store_of_format_1_opens_and_is_checked_file_by_file(tmp_path: Path) -> None:
    folder = write(tmp_path / "s")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["format_version"] = 1
    del manifest["settings"]
    for entry in manifest["files"].values():
        del entry["chunk_bytes"], entry["chunks"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    store = TokenStore.open(folder, verify=True)
    assert [chunk.num_bytes for chunk in store.chunks()] == [18, (folder / "tokens.idx").stat().st_size]
    (folder / "tokens.bin").write_bytes(bytes(18))
    with pytest.raises(DataError, match=r"tokens\.bin: chunk 0"):
        TokenStore.open(folder, verify=True)
