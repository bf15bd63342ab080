"""The held-out numbers of a run for any model: a run's checkpoint, an adapter, a base, a merged folder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from dist_cpt.config.load import build, load_recipe
from dist_cpt.config.resolve import resolve_paths
from dist_cpt.config.schema import RunConfig
from dist_cpt.errors import ConfigError, say
from dist_cpt.export.checkpoint_model import base_of_language_model, plain_model
from dist_cpt.export.held_out_loss import HeldOutSets, held_out_sets, recipe_of_run, with_loss
from dist_cpt.export.merge import merged_model, untrained_model
from dist_cpt.export.model_folder import tokenizer_folder
from dist_cpt.export.needle import Haystack, NeedleOptions, haystack, needle_scores
from dist_cpt.model.base_model import locate_base
from dist_cpt.model.tasks import TaskOptions, task_scores
from dist_cpt.run_folder.checkpoints import read_state
from dist_cpt.run_folder.json_files import encode_row
from dist_cpt.run_folder.names import EVALUATED, MANIFEST, RECIPE, STATE
from dist_cpt.run_folder.records import HeldOut

_LONGEST = 2048  # tokens of a sequence where neither a run nor the user says


@dataclass(frozen=True)
class TextOptions:
    """Text to evaluate in place of the run's own held-out sets."""

    data: tuple[str, ...] = ()  # files, folders or patterns
    field: str = "text"
    seq_len: int | None = None  # None: the run's, else what the model has positions for, at most _LONGEST


def evaluate(
    model: Path,
    text: TextOptions,
    tasks: TaskOptions,
    needle: NeedleOptions,
    *,
    base: str | None = None,
    against_base: bool = False,
) -> list[dict[str, Any]]:
    """A row for each held-out set, task and length of `needle`, in fp32; also appended to the record of the run that
    `model` is part of.

    `model` is a checkpoint, a PEFT folder, a model folder or a hub id. Sets are measured if text is given, or nothing
    else is asked for; with `against_base` they have a `base_loss`. The needle is hidden in their text.

    Raises:
        ConfigError: no model, a classifier, no text, or no base to compare with; as `haystack` and `needle_scores`.
        CheckpointError: another base than the run had.
        DataError: a set cannot be read.
        MissingExtraError: `tasks` without the extra `eval`.
    """
    model = model if model.is_dir() else locate_base(str(model), None)
    base_folder = base_of_language_model(model, base)
    run = model.parent.parent if (model / MANIFEST).is_file() and (model.parent.parent / RECIPE).is_file() else None
    alone = not (tasks.names or needle.lengths)
    with _sets(model, base_folder, run, text, wanted=bool(text.data or needle.lengths) or alone) as sets:
        tokenizer = tokenizer_folder(model, base_folder)
        hay = _haystack(tokenizer, sets) if needle.lengths else None
        loaded = merged_model(model, base_folder)[0] if base_folder is not None else plain_model(model)
        found = [] if hay is None else list(needle_scores(loaded, hay, needle))
        scores = task_scores(loaded, tokenizer, tasks) if tasks.names else {}
        losses = sets.losses(with_loss(loaded)) if sets.loaders and (text.data or alone) else {}
        del loaded
        of_base: dict[str, HeldOut] = {}
        if against_base:
            if not (model / MANIFEST).is_file() and base_folder is None:
                raise ConfigError(f"--against-base: {model} does not record a base", remedy="evaluate the base as well")
            of_base = sets.losses(with_loss(untrained_model(model, base_folder, base)))
        roles = {loader.name: loader.role for loader in sets.loaders}
    about: dict[str, Any] = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "model": str(model)}
    if (model / STATE).is_file():
        about["step"] = read_state(model).step
    rows = [about | _row(name, roles[name], result, of_base.get(name)) for name, result in losses.items()]
    rows += [about | {"task": name, **values} for name, values in scores.items()] + [about | row for row in found]
    if run is not None:
        _record(run / EVALUATED, rows)
    return rows


def _haystack(tokenizer: Path, sets: HeldOutSets) -> Haystack:
    from transformers import AutoTokenizer

    filler = np.concatenate([loader.tokens for loader in sets.loaders])
    return haystack(AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False), filler)


def as_lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The rows for people."""
    for row in rows:
        if "task" in row:
            numbers = {key: value for key, value in row.items() if isinstance(value, float)}
            yield f"{row['task']}: " + ", ".join(f"{key} {value:.4f}" for key, value in numbers.items())
            continue
        bits = row["bits_per_byte"]
        line = f"{row['name']}: loss {row['loss']:.6f}, perplexity {row['perplexity']:.4g}"
        line += "" if bits is None else f", {bits:.4f} bits/byte"
        if (base := row.get("base_loss")) is not None:
            line += f", {row['loss'] - base:+.4f} against the base"
        yield f"{line} ({row['num_tokens']:,} tokens)"


def _row(name: str, role: str, result: HeldOut, base: HeldOut | None) -> dict[str, Any]:
    measured = asdict(result) | {"perplexity": result.perplexity, "bits_per_byte": result.bits_per_byte}
    return {"name": name, "role": role, **measured} | ({} if base is None else {"base_loss": base.loss})


@contextmanager
def _sets(
    model: Path, base_folder: Path | None, run: Path | None, text: TextOptions, *, wanted: bool
) -> Iterator[HeldOutSets]:
    """The text given, else the held-out sets of the run; token stores of text that no run has are temporary."""
    if not wanted:
        yield HeldOutSets([], None)
    elif not text.data:
        if run is None:
            raise ConfigError(f"{model} is in no run, which would have held-out sets", remedy="give text with --data")
        if text.seq_len is not None or text.field != "text":
            raise ConfigError("--seq-len and --text belong to --data: a run's own sets are packed as it packs them")
        yield held_out_sets(recipe_of_run(model, "evaluate"))
    else:
        with tempfile.TemporaryDirectory(prefix="dist-cpt-evaluate-") as work:
            yield held_out_sets(_recipe_of_text(model, base_folder, run, text, work), of_sources=True)


def _recipe_of_text(model: Path, base_folder: Path | None, run: Path | None, text: TextOptions, work: str) -> RunConfig:
    """A recipe whose sources are the given text."""
    seq_len = text.seq_len
    if seq_len is None:
        seq_len = _positions(base_folder or model) if run is None else load_recipe(run / RECIPE).data.seq_len
    tokenizer = str(tokenizer_folder(model, base_folder))
    sources = [{"path": path, "text": text.field} for path in text.data]
    values = {
        "name": "evaluate",
        "output_dir": work,
        "model": {"path": str(base_folder or model)},
        "data": {"tokenizer": tokenizer, "seq_len": seq_len, "sources": sources},
        "batch": {"global_tokens": seq_len},
        "train": {"tokens": seq_len},
    }
    return resolve_paths(build(values, where="--data"))


def _positions(folder: Path) -> int:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    return min(getattr(config, "max_position_embeddings", None) or _LONGEST, _LONGEST)


def _record(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Append `rows` with one system call each; a run folder that cannot be written is no reason to lose them."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            for row in rows:
                os.write(descriptor, encode_row(row))
        finally:
            os.close(descriptor)
    except OSError as error:
        say(f"dist-cpt: not recorded: {path} cannot be written: {error.strerror}")
