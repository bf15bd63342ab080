"""Self-generated replay: text sampled from the model that a recipe starts from, as a source for `role: replay`.

FOLDER/documents.jsonl appears when it is complete; until then the documents are in FOLDER/.replay, which no source
reads. That file is the only state: documents are numbered, and after a kill sampling continues with the next one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import math
import os
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_cpt.adapters.peft_folder import file_sha256
from dist_cpt.adapters.prior_adapter import open_prior_adapter
from dist_cpt.adapters.quantize import QUANTISED
from dist_cpt.config.schema import RunConfig
from dist_cpt.data.sources import find_files
from dist_cpt.data.tokenizer import load_run_tokenizer, tokenizer_hash
from dist_cpt.data.tokenizer_train import corpus_texts
from dist_cpt.errors import ConfigError, DataError, WriteError
from dist_cpt.export.checkpoint_model import fit_vocabulary
from dist_cpt.export.generate import prompt_ids, require_positions
from dist_cpt.export.sampled_text import Sampler
from dist_cpt.model.base_model import base_sha256s, load_base
from dist_cpt.run_folder.json_files import parse_row, read_object, write_object

DOCUMENTS = "documents.jsonl"
HIDDEN = ".replay"  # sources leave hidden entries out
UNFINISHED, SETTINGS, REPORT = f"{HIDDEN}/{DOCUMENTS}", f"{HIDDEN}/settings.json", f"{HIDDEN}/report.json"
_CHARACTERS_PER_TOKEN = 64  # of a seed text, read to get its first tokens

Progress = Callable[[int, int], object]  # (documents, tokens) so far


@dataclass(frozen=True)
class ReplayOptions:
    """How documents are sampled."""

    seed: int = 0
    temperature: float = 1.0  # with top_p 1, the loss on the samples is least at the base's own distribution
    top_p: float = 1.0
    max_document_tokens: int | None = None  # sampled ones; None: what fits into a sequence of the recipe
    seeds: tuple[str, ...] = ()  # files with texts, whose first `seed_tokens` begin the documents
    seed_tokens: int = 16

    @property
    def beginning_tokens(self) -> int:
        """What a document begins with, at most."""
        return 1 + (self.seed_tokens if self.seeds else 0)

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and 0 < self.top_p <= 1 and math.isfinite(self.temperature)):
            raise ConfigError(
                f"temperature {self.temperature:g} must be above 0, top_p {self.top_p:g} above 0 and at most 1",
                remedy="greedy text would be one document over and over; 1 and 1 sample the base's own distribution",
            )
        if self.max_document_tokens is not None and self.max_document_tokens < 1:
            raise ConfigError(
                f"no sampled token fits into a document beside the {self.beginning_tokens} that it begins with",
                remedy="use fewer --seed-tokens, or a longer data.seq_len",
            )


@dataclass(frozen=True)
class _Sampled:
    """What a folder contains so far."""

    documents: int = 0
    tokens: int = 0
    last: int = 0  # tokens of the last document


def replay(
    config: RunConfig, tokens: int, out: Path, options: ReplayOptions, batch: int, progress: Progress
) -> dict[str, Any]:
    """Sample documents into the folder `out` until they have `tokens` sampled tokens; returns the report.

    A folder begun with the same model and options is continued, also to more tokens than were asked for at first.

    Raises:
        ConfigError: no pretrained base, another task than cpt, or the folder has something else.
        DataError: no text in the seeds, or a line of the folder's documents is damaged.
        WriteError: the folder cannot be written.
    """
    _require_text(config)
    config = _with_own_tokenizer(config)
    if options.max_document_tokens is None:
        options = replace(options, max_document_tokens=config.data.seq_len - options.beginning_tokens)
    tokenizer = load_run_tokenizer(config)
    settings = _settings(config, tokenizer, options)
    finished, unfinished = out / DOCUMENTS, out / UNFINISHED
    try:
        with _folder(out, settings):
            so_far = _sampled_so_far(finished if finished.exists() else unfinished, tokens)
            if so_far.tokens < tokens:
                if finished.exists():
                    os.replace(finished, unfinished)
                sampler = _sampler(config, tokenizer, options, settings["base_sha256"])
                beginnings = _beginnings(tokenizer, options, so_far.documents // batch * batch)
                _sample(sampler, beginnings, unfinished, so_far, tokens, batch, progress)
            if unfinished.exists():
                write_object(out / REPORT, summary(unfinished) | {"settings": settings})
                os.replace(unfinished, finished)
    except OSError as error:
        raise WriteError(
            f"{out} cannot be written: {error.strerror}",
            remedy="free space, or give another --out; the same command continues after the documents that are there",
        ) from error
    return read_object(out / REPORT)


class ProgressLine:
    """Shows the progress on stderr: one line that is rewritten on a terminal, else one every `every_seconds`."""

    def __init__(self, tokens: int, every_seconds: float = 30.0) -> None:
        self._tokens, self._every_seconds = tokens, every_seconds
        self._first: tuple[float, int] | None = None
        self._printed_at = -math.inf

    def __call__(self, documents: int, done: int) -> None:
        """`done` tokens are on the disk."""
        now, live, last = time.monotonic(), sys.stderr.isatty(), done >= self._tokens
        since, before = self._first = self._first or (now, done)
        if not (live or last or now - self._printed_at >= self._every_seconds):
            return
        self._printed_at = now
        text = f"replay: {min(done / self._tokens, 1):.1%}, {documents:,} documents, {done:,} tokens"
        if done > before:
            rate = (done - before) / (now - since)
            text += f", {rate:,.0f} tokens/s, ETA {timedelta(seconds=round(max(self._tokens - done, 0) / rate))}"
        print(f"\r{text}\x1b[K" if live else text, end="\n" if last or not live else "", file=sys.stderr, flush=True)


def report_lines(report: dict[str, Any], out: Path) -> list[str]:
    """The report for people, and the folder as a source."""
    lengths, documents = report["length_tokens"], report["documents"]
    shown = ", ".join(f"{name} {lengths[name]:,}" for name in lengths)
    return [
        f"{documents:,} documents, {report['tokens']:,} sampled tokens; {report['ended']:,} ended by themselves",
        f"tokens of a document: {shown}",
        f"duplicates: {report['duplicates']:,} repeat an earlier document; {report['empty']:,} are empty",
        f"perplexity under the model that wrote them: {report['perplexity']:.4g}",
        f"as a source: {{path: {out}, role: replay, weight: 0.1}}; more in {out / REPORT}",
    ]


def summary(path: Path) -> dict[str, Any]:
    """What a file of documents contains: counts, lengths in tokens, duplicates, perplexity of the sampled tokens."""
    lengths, losses, hashes = array("q"), array("d"), array("q")  # 24 bytes a document
    ended = empty = 0
    for row in _rows(path):
        lengths.append(row["tokens"])
        losses.append(row["loss"])
        hashes.append(int.from_bytes(hashlib.sha256(row["text"].encode()).digest()[:8], signed=True))
        ended += row["ended"]
        empty += not row["text"].strip()
    of_length, tokens = np.frombuffer(lengths, dtype=np.int64), sum(lengths)
    points = dict(zip(("min", "p10", "median", "p90", "max"), (0, 10, 50, 90, 100), strict=True))
    spread = {name: int(np.percentile(of_length, point, method="nearest")) for name, point in points.items()}
    return {
        "documents": len(lengths),
        "tokens": tokens,
        "ended": ended,
        "empty": empty,
        "duplicates": len(hashes) - len(np.unique(np.frombuffer(hashes, dtype=np.int64))),
        "length_tokens": spread | {"mean": round(tokens / len(lengths), 1)},
        "perplexity": math.exp(float(of_length @ np.frombuffer(losses)) / tokens),
    }


def _require_text(config: RunConfig) -> None:
    if config.model.path is None:
        raise ConfigError("a model from scratch has nothing to replay", remedy="name a pretrained base in model.path")
    if config.task != "cpt":
        raise ConfigError(
            f"task: {config.task}: a base writes plain text, which is no record of this task",
            remedy="use task: cpt (--set task=cpt) to make replay for another recipe",
        )


def _with_own_tokenizer(config: RunConfig) -> RunConfig:
    """With the tokenizer of the model that is sampled: a new vocabulary has no rows before the run adds them."""
    if config.embeddings.new_tokens is None or config.adapter.continue_from is not None:
        return config
    return config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": None})})


def _settings(config: RunConfig, tokenizer: Any, options: ReplayOptions) -> dict[str, Any]:
    """What the documents are a function of; files by their sha256."""
    prior = config.adapter.continue_from
    found = [
        file for path in options.seeds for file in find_files(path, Path(path).name).files if isinstance(file, Path)
    ]
    files = [file for path in found for file in ([path] if path.is_file() else sorted(path.rglob("*.arrow")))]
    return asdict(options) | {
        "seeds": [file_sha256(file) for file in files],
        "model": config.model.path,
        "base_sha256": base_sha256s(config.model)[0],
        "adapter_sha256": None if prior is None else open_prior_adapter(Path(prior.path)).sha256,
        "tokenizer_sha256": tokenizer_hash(tokenizer),
    }


@contextlib.contextmanager
def _folder(out: Path, settings: dict[str, Any]) -> Iterator[None]:
    """The folder, for this process alone.

    Raises:
        ConfigError: another process samples into it, or it has something else.
    """
    (out / HIDDEN).mkdir(parents=True, exist_ok=True)
    with (out / HIDDEN / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another process samples into {out}", remedy="wait for it, or use another --out"
            ) from None
        recorded = read_object(out / SETTINGS)
        known = set(os.listdir(out)) <= {HIDDEN, DOCUMENTS} and (recorded or not (out / DOCUMENTS).exists())
        if not known:
            raise ConfigError(f"{out} has other files", remedy="give --out a new folder")
        for key in settings.keys() - {"model"} if recorded else ():
            if recorded.get(key) != settings[key]:
                raise ConfigError(
                    f"{out} was begun with {key} {recorded.get(key)}, not {settings[key]}",
                    remedy="use that again, or another --out",
                )
        if not recorded:
            write_object(out / SETTINGS, settings)
        yield


def _sampled_so_far(path: Path, tokens: int) -> _Sampled:
    """Cuts off a line that a kill has torn."""
    if not path.exists():
        return _Sampled()
    with path.open("r+b") as file:
        size = sum(len(line) for line in file if line.endswith(b"\n"))
        file.truncate(size)
    so_far = _Sampled()
    for row in _rows(path):
        so_far = _Sampled(so_far.documents + 1, so_far.tokens + row["tokens"], row["tokens"])
    if so_far.tokens - so_far.last >= tokens:
        raise ConfigError(
            f"{path} has {so_far.tokens:,} tokens already", remedy="ask for more with --tokens, or use another --out"
        )
    return so_far


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            row = parse_row(line)
            if row is None or not isinstance(row.get("text"), str) or not isinstance(row.get("tokens"), int):
                raise DataError(f"{path}, line {number}: not a sampled document", remedy="remove the folder")
            yield row


def _sampler(config: RunConfig, tokenizer: Any, options: ReplayOptions, base_sha256: str) -> Sampler:
    """The model that the run starts from: on a GPU as the run stores it, on the CPU in fp32 unless quantised."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and config.model.weights not in QUANTISED:
        config = config.model_copy(update={"model": config.model.model_copy(update={"weights": "fp32"})})
    model, identity = load_base(config, device, base_sha256)
    prior = config.adapter.continue_from
    if prior is not None:
        adapter = open_prior_adapter(Path(prior.path), identity, other_base=prior.other_base)
        fit_vocabulary(model, adapter.folder)
        adapter.require_fit(model)
        adapter.copy_vocabulary(model)
        adapter.fold(model)
    assert options.max_document_tokens is not None
    require_positions(model, options.beginning_tokens, options.max_document_tokens)
    trained_for = getattr(model.config, "max_position_embeddings", None)
    if trained_for is not None and options.beginning_tokens + options.max_document_tokens > trained_for:
        raise ConfigError(
            f"a document of {options.beginning_tokens} and {options.max_document_tokens} tokens is longer than the "
            f"{trained_for} positions of the model",
            remedy=f"use at most --max-document-tokens {trained_for - options.beginning_tokens}",
        )
    model.generation_config = type(model.generation_config)()  # the base's own may have penalties
    return Sampler(
        model.to(device).eval(),
        tokenizer,
        options.seed,
        options.temperature,
        options.top_p,
        options.max_document_tokens,
    )


def _beginnings(tokenizer: Any, options: ReplayOptions, first: int) -> Iterator[list[int]]:
    """What documents `first`, `first` + 1 ... begin with: the seed texts in turn, or what begins every document."""
    start = prompt_ids(tokenizer, "")
    if not options.seeds:
        return itertools.repeat(start)

    def texts() -> Iterator[str]:
        while True:
            some = False
            for text in corpus_texts(options.seeds):
                some = True
                yield text
            if not some:
                raise DataError(f"no text in {', '.join(options.seeds)}", remedy="give files with a field text")

    added = len(prompt_ids(tokenizer, "a")) - len(tokenizer("a", add_special_tokens=False)["input_ids"])  # a BOS
    cut = (text[: _CHARACTERS_PER_TOKEN * options.seed_tokens] for text in texts())
    return itertools.islice((prompt_ids(tokenizer, t)[: added + options.seed_tokens] for t in cut), first, None)


def _sample(
    sampler: Sampler,
    beginnings: Iterator[list[int]],
    path: Path,
    so_far: _Sampled,
    tokens: int,
    batch: int,
    progress: Progress,
) -> None:
    """Append documents after the first ones; after a kill in the same batches, for the same rounding."""
    documents, done = so_far.documents, so_far.tokens
    with path.open("ab") as file:
        while done < tokens:
            first = documents // batch * batch
            numbers = range(first, first + batch)
            sampled_batch = sampler(numbers, list(itertools.islice(beginnings, batch)))
            for number, sampled in zip(numbers, sampled_batch, strict=True):
                if number == documents and done < tokens:
                    row = asdict(sampled) | {"loss": round(sampled.loss, 6)}
                    file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                    documents, done = documents + 1, done + sampled.tokens
            file.flush()
            os.fsync(file.fileno())
            progress(documents, done)
