"""Sources that are read while training: where an attempt begins in them, and whether their files are still the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dist_cpt.data.prepared import Prepared
from dist_cpt.data.stream import SourceStream
from dist_cpt.data.stream_loader import StreamLoader
from dist_cpt.data.streamed import require_same_files
from dist_cpt.errors import CheckpointError
from dist_cpt.run_folder.checkpoints import published, read_state
from dist_cpt.run_folder.json_files import read_object
from dist_cpt.run_folder.names import STREAM
from dist_cpt.run_folder.train_state import Mark, past_windows
from dist_cpt.runtime.collectives import on_rank_zero
from dist_cpt.train.attempt import RunContext


def open_stream(context: RunContext, prepared: Prepared, pad_id: int) -> StreamLoader:
    """The stream, ready to begin at the position of the newest checkpoint. Collective.

    Raises:
        DataError: a file has other content than when the run began.
    """
    config, folder = context.config, context.folder
    assert config.data.cache_dir is not None  # resolve_paths fills it in
    on_rank_zero("data.streaming", lambda: _compare_files(context, prepared))
    position, marks = on_rank_zero("checkpoints", lambda: _newest(folder))
    kept = Path(config.data.cache_dir) / "quarantine" / config.name
    streams = {
        source.name: SourceStream(source, config.seed, kept / source.name if context.env.rank == 0 else None)
        for source in prepared.streamed
    }
    loader = StreamLoader(prepared, streams, pad_id, position)
    loader.learn({name: Mark(*mark) for name, mark in marks.items()})
    return loader


def _newest(folder: Path) -> tuple[int, dict[str, Any]]:
    """Position and marks of the newest checkpoint whose state can be read, which a restore may yet find invalid."""
    for path in published(folder):
        try:
            state = read_state(path)
        except CheckpointError:
            continue
        return past_windows(state.position, state.skipped_windows), dict(state.stream or {})
    return 0, {}


def _compare_files(context: RunContext, prepared: Prepared) -> None:
    """Compare the files of all sources with those at the start of the run, which its folder records."""
    recorded = read_object(context.folder / STREAM) if published(context.folder) else {}
    for source in prepared.streamed:
        if source.name in recorded:
            require_same_files(source.name, recorded[source.name], source.inputs)
    if recorded.keys() != {source.name for source in prepared.streamed}:
        context.claim.write(STREAM, {source.name: list(source.inputs) for source in prepared.streamed})
