"""A recipe that several processes prepare, and processes that do so and can be killed."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

from dist_cpt.config.resolve import resolve_paths
from dist_cpt.config.schema import RunConfig
from dist_cpt.data.prepare import prepare
from tests.tiny import write_corpus, write_tokenizer

UNIT_BYTES = 2048


def recipe(folder: Path, cache: Path, **data: Any) -> RunConfig:
    """Lines of jsonl, row groups of parquet and small texts, each of several units."""
    values = {
        "name": "test",
        "output_dir": str(folder / "runs"),
        "model": {"config": {"model_type": "llama"}},
        "adapter": {"kind": "none"},
        "data": {
            "seq_len": 32,
            "tokenizer": str(folder / "tokenizer"),
            "cache_dir": str(cache),
            "on_bad_record": "quarantine",
            "bad_record_budget_fraction": 0.5,
            "sources": [{"path": str(folder / name)} for name in ("lines.jsonl", "rows.parquet", "texts")],
        }
        | data,
        "batch": {"global_tokens": 64},
        "train": {"tokens": 64},
    }
    return resolve_paths(RunConfig.model_validate(values))


def write_input(folder: Path, num_records: int = 120) -> Path:
    """`folder` with input: some lines are bad, one is longer than several units."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    write_tokenizer(folder / "tokenizer", write_corpus(folder))
    texts = [f"text {number}: " + "ein Wort, zwei Wörter 二つ " * (number % 7) for number in range(num_records)]
    texts[num_records // 2] = "a long one " * (3 * UNIT_BYTES // 10)
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    lines[7::20] = ["{broken"] * len(lines[7::20])
    (folder / "lines.jsonl").write_text("\n".join(lines) + "\n\n")
    parquet.write_table(pa.table({"text": texts}), folder / "rows.parquet", row_group_size=5)
    (folder / "texts").mkdir()
    for number, text in enumerate(texts[:40]):
        (folder / "texts" / f"{number:03}.txt").write_text(text)
    return folder


def content(cache: Path) -> dict[str, bytes]:
    """Every file of a cache's stores."""
    return {str(path.relative_to(cache)): path.read_bytes() for path in sorted(cache.rglob("*")) if path.is_file()}


def prepare_here(config: RunConfig, workers: int) -> None:
    """In a process group of its own, to be killed with all it starts."""
    os.setpgid(0, 0)
    prepare(config, workers=workers, unit_bytes=UNIT_BYTES)


def started(config: RunConfig, workers: int = 1) -> Any:
    """A process that prepares; modules are imported once for all of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.prepared_by_many", "transformers.models.auto.tokenization_auto"])
    process = context.Process(target=prepare_here, args=(config, workers))
    process.start()
    with contextlib.suppress(ProcessLookupError):
        while os.getpgid(process.pid) != process.pid:  # a kill of a group that does not exist yet would miss it
            time.sleep(0.001)
    return process
