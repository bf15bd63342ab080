"""What is in the stores of a recipe, or would be read, for people and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from dist_cpt.config.schema import RunConfig
from dist_cpt.data.hub import HubDataset, with_commits
from dist_cpt.data.mixture import mixture_of
from dist_cpt.data.prepared import Prepared, PreparedSource
from dist_cpt.data.quality import SourceQuality
from dist_cpt.data.sources import RecordTally, read_records
from dist_cpt.data.store import TokenStore
from dist_cpt.data.store_plan import plan_stores
from dist_cpt.data.streamed import StreamedSource
from dist_cpt.data.tokenizer import load_run_tokenizer
from dist_cpt.errors import printable
from dist_cpt.storage import is_there


def data_report(prepared: Prepared) -> dict[str, Any]:
    """JSON-able counts of the stores: per source documents, tokens, blocks, padding, bad records; of a streamed source
    files, bytes and shards."""
    training = [_source_report(source) for source in prepared.sources]
    sizes = [(row["blocks"], row["block_tokens"]) for row in training] or [(1, 1)] * len(prepared.streamed)
    training = training or [_stream_report(source) for source in prepared.streamed]
    mixture = mixture_of(prepared, sizes)
    if len(mixture.segments) == 1:
        for row, share in zip(training, mixture.segments[0].shares.tolist(), strict=True):
            row["share"] = share
    return {
        "seq_len": prepared.seq_len,
        "vocab_size": prepared.vocab_size,
        "tokenizer_hash": prepared.tokenizer_hash,
        "identity": prepared.identity,
        "sources": training,
        "mixture": [{"from_block": part.start, "share": part.shares.tolist()} for part in mixture.segments],
        "validation": [
            _source_report(held_out) | {"in_training": prepared.shared_ngrams(held_out.name)}
            for held_out in prepared.validation
        ],
    }


def report_lines(report: dict[str, Any]) -> list[str]:
    """The counts of `data_report` for people, one line per source or held-out set."""
    lines = []
    for row in [*report["sources"], *report["validation"]]:
        share = f", {row['share']:.1%} of the blocks" if "share" in row else ""
        if "shards" in row:
            what = f"{row['shards']:,} shards of {row['files']:,} files, {row['input_bytes']:,} bytes"
            lines.append(f"{row['name']}: read while training, {what}{share}")
            continue
        bad = f", {sum(row['bad'].values()):,} of {row['records']:,} records bad" if row["bad"] else ""
        bad += f", {row['filtered']:,} not kept by its filter" if row.get("filtered") else ""
        bad += _quality_text(row)
        lines.append(
            f"{row['name']}: {row['documents']:,} documents, {row['tokens']:,} tokens in {row['blocks']:,} blocks of "
            f"{report['seq_len']:,} ({row['padding_fraction']:.1%} padding){share}{bad}; {row['folder']}"
        )
    names = [row["name"] for row in report["sources"]]
    for part in report["mixture"] if len(report["mixture"]) > 1 else ():
        shares = zip(names, part["share"], strict=True)
        read = ", ".join(f"{name} {share:.1%}" for name, share in shares if share)
        lines.append(f"from token {part['from_block'] * report['seq_len']:,} on: {read}")
    return [*lines, f"identity {report['identity']}"]


def _quality_text(row: dict[str, Any]) -> str:
    """What is known of a source's duplicates, and of a held-out set's text in the sources."""
    counts = {
        "duplicates": row.get("duplicates"),
        "with text of a held-out set": row.get("overlapping_documents"),
        "excluded": row.get("excluded_documents"),
    }
    found = [f", {count:,} {what}" for what, count in counts.items() if count]
    shared = row.get("in_training", {})
    return "".join(found) + "".join(f", {fraction:.2%} of it in {name}" for name, fraction in shared.items())


def preview(config: RunConfig, num_documents: int = 10) -> Iterator[str]:
    """What `prepare` would read, and the first documents with the tokens at their borders; writes nothing.

    Raises:
        DataError: missing input, an unusable tokenizer or template, or a bad record under `error`.
    """
    config = with_commits(config)
    plan = plan_stores(config)
    for planned in [*plan.streamed, *plan.stores]:
        num_bytes = sum(file["bytes"] for file in planned.inputs)
        state = "prepared already" if is_there(planned.folder) else "to be prepared"
        state = "its text is gone, its store is there" if planned.gone is not None else state
        state = "read while training" if planned in plan.streamed else state
        on_hub = [str(path) for path in planned.files.files if isinstance(path, HubDataset)]
        size = "streamed" if on_hub else f"{len(planned.inputs):,} files, {num_bytes:,} bytes"
        yield f"{planned.name}: {size}, {state}: {(on_hub or [planned.source.place])[0]}"
    tokenizer: Any = load_run_tokenizer(config)
    sources = plan.streamed or plan.stores[: len(config.data.sources)]
    sources = [planned for planned in sources if planned.inputs]
    for planned in sources:
        tally = RecordTally(config.data.on_bad_record)
        records = read_records(planned.name, planned.files, plan.encoder.parser(planned.source), tally)
        encoded = plan.encoder(list(islice(records, -(-num_documents // len(sources)))))
        for ids in np.split(encoded.ids, np.cumsum(encoded.lengths)[:-1]):
            yield f"{planned.name}: {_ends(printable(tokenizer.decode(ids)))}"


def _ends(text: str, num_characters: int = 160) -> str:
    """A long text without its middle."""
    half = num_characters // 2
    return text if len(text) <= num_characters else f"{text[:half]} [...] {text[-half:]}"


def _source_report(source: PreparedSource) -> dict[str, Any]:
    assert source.blocks is not None  # of every source that prepare opened
    plan, manifest = source.blocks.plan, source.store.manifest
    return {
        "name": source.name,
        "role": source.role,
        "folder": str(source.store.folder),
        "files": len(manifest.inputs),
        "input_bytes": sum(file["bytes"] for file in manifest.inputs),
        "documents": source.store.num_documents,
        "tokens": source.store.num_tokens,
        "blocks": plan.num_blocks,
        "block_tokens": plan.num_tokens,
        "padding_fraction": plan.padding_fraction,
        **_quality_report(source.quality),
        **_label_report(source.store),
        **manifest.counts,
    }


def _stream_report(source: StreamedSource) -> dict[str, Any]:
    return {
        "name": source.name,
        "role": source.role,
        "files": len(source.inputs),
        "input_bytes": sum(file["bytes"] for file in source.inputs),
        "shards": len(source.text.units),
    }


def _quality_report(quality: SourceQuality | None) -> dict[str, Any]:
    if quality is None:
        return {}
    return {
        "duplicates": len(quality.duplicates),
        "overlapping_documents": len(quality.overlapping),
        "excluded_documents": len(quality.excluded),
    }


def _label_report(store: TokenStore) -> dict[str, Any]:
    if store.answers is not None:
        return {"answer_tokens": int(store.answers.sum(dtype=np.int64))}
    if store.classes is not None:
        return {"documents_by_class": np.bincount(store.classes).tolist()}
    return {}
