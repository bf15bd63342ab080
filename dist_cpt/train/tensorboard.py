"""TensorBoard as an observer: event files in the run folder, which `tensorboard --logdir` shows."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

from dist_cpt.errors import MissingExtraError
from dist_cpt.run_folder.names import TENSORBOARD
from dist_cpt.run_folder.records import CheckpointRecord, EvaluationRecord, RunEnd, RunStart, StepRecord


def tensorboard_observer(run_folder: Path) -> TensorBoardObserver:
    """The observer for `track.tensorboard`.

    Raises:
        MissingExtraError: tensorboard is not installed.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise MissingExtraError("track.tensorboard", "tensorboard")
    return TensorBoardObserver(run_folder)


class TensorBoardObserver:
    """Mirrors the records of a run; a resume hides what was recorded past its checkpoint."""

    def __init__(self, run_folder: Path) -> None:
        self._folder = run_folder
        self._writer: Any = None

    def on_start(self, start: RunStart) -> None:
        from torch.utils.tensorboard import SummaryWriter  # late: a second, and an optional extra

        resumed = start.resumed_from is not None
        self._writer = SummaryWriter(
            str(self._folder / TENSORBOARD), purge_step=start.first_step + 1 if resumed else None
        )

    def on_step(self, record: StepRecord) -> None:
        row = {
            "train/loss": record.loss,
            "train/grad_norm": record.grad_norm,
            "train/tokens_per_second": record.tokens_per_second,
            "train/memory_gib": record.memory_gib,
            **record.efficiency_by_chart(),
            **{f"memory/{part}": size / 2**30 for part, size in (record.memory_bytes or {}).items()},
            **record.experts_by_chart(),
            **{f"lr/{group}": rate for group, rate in record.lr.items()},
        }
        self._add(row, record.step)

    def on_evaluation(self, record: EvaluationRecord) -> None:
        scores = {"loss": record.loss, "perplexity": record.perplexity, **record.scores}
        self._add({f"eval/{record.name}/{score}": value for score, value in scores.items()}, record.step)
        self._writer.flush()

    def on_checkpoint(self, record: CheckpointRecord) -> None:
        """Checkpoints are in the run folder."""

    def on_message(self, text: str) -> None:
        """Messages stay in the run folder."""

    def on_end(self, end: RunEnd) -> None:
        if self._writer is not None:
            self._writer.close()

    def _add(self, row: dict[str, float | None], step: int) -> None:
        for name, value in row.items():
            if value is not None and math.isfinite(value):
                self._writer.add_scalar(name, value, step)
