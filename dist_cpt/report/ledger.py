"""Tokens by source, and the checkpoints that were saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dist_cpt.report.values import clock, integer, mappings, real
from dist_cpt.run_folder.contents import RunFiles


@dataclass(frozen=True)
class SourceTokens:
    """One source: its share in the recipe and its share of the tokens that were trained on."""

    name: str
    role: str
    target: str
    trained: str
    tokens: int


@dataclass(frozen=True)
class SavedCheckpoint:
    """One row of the checkpoint table; a folder without an event has only its name."""

    name: str
    place: str
    step: int | None = None
    size: str = ""
    took: str = ""
    time: str = ""


def token_ledger(run: RunFiles) -> list[SourceTokens]:
    """The sources of the recipe, then those that only the rows name."""
    trained: dict[str, int] = {}
    for row in run.steps:
        by_source = row.get("tokens_by_source")
        for name, count in (by_source if isinstance(by_source, dict) else {}).items():
            trained[str(name)] = trained.get(str(name), 0) + (integer(count) or 0)
    data = run.recipe.get("data")
    sources = {
        str(s.get("name") or s.get("path")): s
        for s in mappings(data.get("sources") if isinstance(data, dict) else None)
    }
    weights = {name: real(source.get("weight", 1.0)) or 0.0 for name, source in sources.items()}
    all_weights, all_tokens = sum(weights.values()), sum(trained.values())
    return [
        SourceTokens(
            name,
            str(sources[name].get("role", "domain")) if name in sources else "",
            f"{weights[name] / all_weights:.2%}" if name in sources and all_weights else "",
            f"{trained.get(name, 0) / all_tokens:.2%}" if all_tokens else "",
            trained.get(name, 0),
        )
        for name in dict.fromkeys([*sources, *trained])
    ]


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
