"""What was asked of each source and what it gave, and the checkpoints that were saved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_cpt.report.values import clock, integer, mapping, mappings, real
from dist_cpt.run_folder.contents import RunFiles
from dist_cpt.run_folder.train_state import SourceCounts

Row = Mapping[str, Any]


@dataclass(frozen=True)
class SourceLedger:
    """One source up to the newest row; None: an earlier version did not record it."""

    name: str
    role: str
    asked: float | None  # share of the blocks (or tokens: data.share_of) by the recipe's weights up to here
    given: float | None  # share that was read
    epochs: float | None  # how often its text was read
    planned_epochs: float | None  # by the whole run
    repeated: float | None  # share of its blocks that had been read before
    batch_tokens: int | None  # padding included
    tokens: int  # padding aside
    targets: int | None  # labels

    @property
    def padding(self) -> int | None:
        """Tokens of padding."""
        return None if self.batch_tokens is None else self.batch_tokens - self.tokens


@dataclass(frozen=True)
class SavedCheckpoint:
    """One row of the checkpoint table; a folder without an event has only its name."""

    name: str
    place: str
    step: int | None = None
    size: str = ""
    took: str = ""
    time: str = ""


def token_ledger(run: RunFiles) -> list[SourceLedger]:
    """The ledger of a run at its newest row; of rows without totals only the tokens are known, as their sum."""
    newest = run.steps[-1] if run.steps else {}
    if not isinstance(newest.get("totals_by_source"), dict):
        tokens: Counter[str] = Counter()
        for row in run.steps:
            by_source = row.get("tokens_by_source")
            for name, count in (by_source if isinstance(by_source, dict) else {}).items():
                tokens[str(name)] += integer(count) or 0
        newest = {**newest, "totals_by_source": {name: [0, count, 0] for name, count in tokens.items()}}
    return source_ledger(run.recipe, run.events, newest)


def source_ledger(recipe: Row, events: Sequence[Row], newest: Row) -> list[SourceLedger]:
    """The ledger at one row of metrics.jsonl: the sources of the recipe, then those that only the row names."""
    data = mapping(recipe.get("data"))
    sources = {str(s.get("name") or s.get("path")): s for s in mappings(data.get("sources"))}
    counts = {str(name): SourceCounts(*map(int, c)) for name, c in mapping(newest.get("totals_by_source")).items()}
    seq_len, targets = integer(data.get("seq_len")) or 0, integer(newest.get("tokens"))
    sizes = {str(size.get("name")): size for size in _last_sizes(events)}
    streamed = mapping(newest.get("epochs_by_source"))
    asked = _asked(data, list(sources), newest, seq_len)
    has_blocks = any(c.blocks for c in counts.values())
    # Of a run that an earlier version began, the targets of its first part are not known by source.
    has_targets = targets is not None and sum(c.targets for c in counts.values()) == targets
    of_tokens = data.get("share_of") == "tokens" or not has_blocks
    whole = sum(c.tokens if of_tokens else c.blocks for c in counts.values())
    rows = []
    for name in dict.fromkeys([*sources, *counts]):
        count, size = counts.get(name, SourceCounts()), sizes.get(name, {})
        available = integer(size.get("blocks"))
        epochs = count.blocks / available if has_blocks and available else real(streamed.get(name))
        rows.append(
            SourceLedger(
                name,
                str(sources[name].get("role", "domain")) if name in sources else "",
                asked.get(name),
                (count.tokens if of_tokens else count.blocks) / whole if whole else None,
                epochs,
                real(size.get("epochs")),
                None if epochs is None or not count.blocks else max(0.0, 1.0 - 1.0 / max(epochs, 1.0)),
                count.blocks * seq_len if has_blocks else None,
                count.tokens,
                count.targets if has_targets else None,
            )
        )
    return rows


def _asked(data: Row, names: Sequence[str], newest: Row, seq_len: int) -> dict[str, float]:
    """Share by source of the stream up to the newest row, by the weights of the recipe or of its stages."""
    sources = mappings(data.get("sources"))
    weights = {str(source.get("name") or source.get("path")): source.get("weight", 1.0) for source in sources}
    position = newest.get("position")
    blocks = integer(position[1]) if isinstance(position, list | tuple) and len(position) == 2 else None
    shares = dict.fromkeys(names, 0.0)
    total = left = blocks or 1  # without a position: the first block's
    for stage in mappings(data.get("stages")) or [{"weights": weights}]:
        tokens = integer(stage.get("tokens"))
        length = left if tokens is None or not seq_len else min(left, -(-tokens // seq_len))
        of_stage = {name: real(mapping(stage.get("weights")).get(name)) or 0.0 for name in names}
        for name, weight in of_stage.items():
            shares[name] += length / total * weight / (sum(of_stage.values()) or 1.0)
        left -= length
    return shares


def _last_sizes(events: Sequence[Row]) -> list[dict[str, Any]]:
    sizes = (mappings(event.get("sources")) for event in reversed(events) if event.get("kind") in ("start", "resume"))
    return next((listed for listed in sizes if listed), [])


def saved_checkpoints(run: RunFiles) -> list[SavedCheckpoint]:
    """Every save, then the folders on disk of which the events know nothing."""
    saves = []
    for event in run.events:
        if event.get("kind") == "checkpoint":
            name = Path(str(event.get("path", ""))).name
            size, seconds = real(event.get("num_bytes")), real(event.get("seconds"))
            saves.append(
                SavedCheckpoint(
                    name,
                    "on disk" if name in run.checkpoints else "removed",
                    integer(event.get("step")),
                    "" if size is None else f"{size / 2**20:,.1f} MiB",
                    "" if seconds is None else f"{seconds:.1f} s",
                    clock(event.get("time")),
                )
            )
    known = {save.name for save in saves}
    return saves + [SavedCheckpoint(name, "on disk") for name in run.checkpoints if name not in known]
