"""The same texts in every container that is read, plain and compressed: the bytes of each file."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet

TEXTS = [
    "Die Berufung ist zulässig.\r\nBegründet ist sie nicht.",
    'He said: "no, thanks"; twice\ttoday',
    "日本語の文章です。\n二行目。",
    "नमस्ते दुनिया, مرحبا بالعالم 🙂 é",
    "line separator \u2028 inside",
    "long " * 30_000,  # above the default limit of a field of csv
]


def table() -> pa.Table:
    return pa.table({"number": list(range(len(TEXTS))), "text": TEXTS})


def jsonl() -> bytes:
    return b"".join(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in TEXTS)


def comma_separated(delimiter: str = ",") -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows([("number", "text"), *enumerate(TEXTS)])
    return file.getvalue().encode()


def parquet() -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(table(), file, row_group_size=2)
    return file.getvalue()


def arrow(new: Callable[..., Any]) -> bytes:
    file = io.BytesIO()
    with new(file, table().schema) as writer:
        writer.write_table(table(), max_chunksize=2)
    return file.getvalue()


def archive() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for number, text in enumerate(TEXTS):
            name, content = (f"{number:03}.txt", text.encode())
            if number % 2:
                name, content = f"{number:03}.json", json.dumps({"text": text}).encode()
            for member_name, member in ((name, content), (f"{number:03}.jpg", b"\xff\xd8")):
                info = tarfile.TarInfo(f"shard/{member_name}")
                info.size = len(member)
                tar.addfile(info, io.BytesIO(member))
    return file.getvalue()


def zstd(content: bytes) -> bytes:
    """Two frames, as `cat a.zst b.zst` makes them."""
    frames = []
    for part in (content[: len(content) // 2], content[len(content) // 2 :]):
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(part)
        frames.append(sink.getvalue().to_pybytes())
    return b"".join(frames)


PLAIN: dict[str, Callable[[], bytes]] = {
    "a.jsonl": jsonl,
    "a.json": lambda: json.dumps([{"text": text} for text in TEXTS], indent=2).encode(),
    "lines.json": jsonl,
    "a.csv": comma_separated,
    "a.tsv": lambda: comma_separated("\t"),
    "a.parquet": parquet,
    "file.arrow": lambda: arrow(pa.ipc.new_file),
    "stream.arrow": lambda: arrow(pa.ipc.new_stream),
    "a.tar": archive,
}
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstd,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}
