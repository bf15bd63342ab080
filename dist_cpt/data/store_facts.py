"""What is in a token store, as `data inspect` and the store's page show it."""

from __future__ import annotations

from typing import Any

import numpy as np

from dist_cpt.data.block_plan import plan_folders, read_plan
from dist_cpt.data.documents import Decoder, Documents
from dist_cpt.data.store import TokenStore
from dist_cpt.errors import ConfigError, printable

SAMPLES = 10
_SHOWN_TOKENS = 24  # at either end of a sample
_UNKNOWN = ["tokenizer", "vocabulary", "source", "inputs", "hashes"]  # of a pair without our manifest


def store_facts(documents: Documents, tokenizer: str | None = None) -> dict[str, Any]:
    """JSON-able: counts, lengths, tokenizer, origin, files, plans, and samples whose borders are visible.

    Memory does not grow with the store.

    Raises:
        DataError: as `Decoder`.
    """
    lengths, num_tokens = _lengths(documents)
    facts: dict[str, Any] = {"store": str(documents.place), "documents": len(documents), "tokens": num_tokens}
    facts |= {"dtype": documents.dtype.name, "lengths": lengths, **_origin(documents)}
    facts["samples"] = samples(documents, tokenizer)
    return facts


def _origin(documents: Documents) -> dict[str, Any]:
    manifest = documents.manifest
    if manifest is None:
        return {"unknown": _UNKNOWN}
    assert isinstance(documents.source, TokenStore)
    files = {
        name: {"bytes": entry["bytes"], "sha256": entry["sha256"], "chunks": len(entry.get("chunks", [""]))}
        for name, entry in manifest.files.items()
    }
    plans = [
        {"seq_len": plan.seq_len, "stride": plan.seq_len - plan.overlap, "blocks": plan.num_blocks}
        | {"padding_fraction": plan.padding_fraction}
        for plan in (read_plan(folder).plan for folder in plan_folders(documents.source.folder))
    ]
    return {
        "format_version": manifest.format_version,
        "vocab_size": manifest.vocab_size,
        "max_token_id": manifest.max_token_id,
        "labels": manifest.label_kind,
        "tokenizer_hash": manifest.tokenizer_hash,
        "content_hash": manifest.content_hash,
        "source": manifest.source,
        "counts": manifest.counts,
        "inputs": manifest.inputs,
        "files": files,
        "plans": plans,
    }


def _lengths(documents: Documents) -> tuple[dict[str, Any], int]:
    """Smallest, mean and largest length and a histogram by powers of two; and the number of tokens."""
    counts, total, low, high = np.zeros(64, np.int64), 0, 2**63, 0
    for part in documents.lengths():
        bins = np.frexp(part.astype(np.float64))[1]  # n is in [2^(bin - 1), 2^bin)
        counts += np.bincount(bins, minlength=64)
        total, low, high = total + int(part.sum()), min(low, int(part.min())), max(high, int(part.max()))
    number = len(documents)
    bars = [
        [1 << exponent >> 1, (1 << exponent) - 1, int(counts[exponent])] for exponent in np.flatnonzero(counts).tolist()
    ]
    shown = {"min": low if number else 0, "mean": total / number if number else 0.0, "max": high}
    return shown | {"histogram": bars}, total


def samples(documents: Documents, tokenizer: str | None = None) -> list[dict[str, Any]]:
    """Documents from the first to the last, each with the text of its first and last tokens, or their ids where no
    tokenizer is known."""
    try:
        decoder = Decoder(documents, tokenizer)
    except ConfigError:
        decoder = None
    numbers = (
        sorted({round(at) for at in np.linspace(0, len(documents) - 1, SAMPLES).tolist()}) if len(documents) else []
    )
    return [_sample(documents, decoder, number) for number in numbers]


def _sample(documents: Documents, decoder: Decoder | None, number: int) -> dict[str, Any]:
    ids = documents.source.document(number)
    parts = [ids] if len(ids) <= 2 * _SHOWN_TOKENS else [ids[:_SHOWN_TOKENS], ids[-_SHOWN_TOKENS:]]
    shown = [part.tolist() if decoder is None else decoder.text(part) for part in parts]
    return {"document": number, "tokens": len(ids), "text" if decoder is not None else "ids": shown}


def facts_text(facts: dict[str, Any]) -> str:
    """The facts for people."""
    lengths = facts["lengths"]
    lines = [
        f"{facts['store']}: {facts['documents']:,} documents, {facts['tokens']:,} tokens ({facts['dtype']})",
        f"lengths: {lengths['min']:,} to {lengths['max']:,} tokens, mean {lengths['mean']:,.1f}",
    ]
    if "unknown" in facts:
        lines.append(f"a Megatron-LM pair without our manifest; unknown: {', '.join(facts['unknown'])}")
    else:
        source, counts = facts["source"], facts["counts"]
        bos = f"begin with token {source['bos']}" if source.get("bos") is not None else "begin without BOS"
        place = source.get("path") or ", ".join(part["name"] for part in source.get("merged", []))
        bad = sum(counts.get("bad", {}).values())
        lines += [
            f"tokenizer {facts['tokenizer_hash'][:12]}, vocabulary {facts['vocab_size']:,}, documents {bos}"
            + (f", labels {facts['labels']}" if facts["labels"] else ""),
            f"content {facts['content_hash']}",
            f"source {source.get('name')}: {place}; {len(facts['inputs']):,} files, "
            f"{counts.get('records', 0):,} records, {bad:,} bad",
        ]
        lines += [
            f"{name}: {entry['bytes']:,} bytes, sha256 {entry['sha256']}" for name, entry in facts["files"].items()
        ]
        lines += [
            f"blocks of {plan['seq_len']:,}, one every {plan['stride']:,}: {plan['blocks']:,}, "
            f"{plan['padding_fraction']:.1%} padding"
            for plan in facts["plans"]
        ]
    for sample in facts["samples"]:
        parts = sample.get("text") or sample["ids"]
        shown = " [...] ".join(part if isinstance(part, str) else " ".join(map(str, part)) for part in parts)
        lines.append(printable(f"document {sample['document']:,} ({sample['tokens']:,} tokens): |{shown}|"))
    return "\n".join(lines)
