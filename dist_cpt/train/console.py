"""Progress of a run on the console.

On a terminal: one live line at the bottom, messages above it. Elsewhere: plain lines at intervals, without control
characters, so that a batch job's log stays readable.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, TextIO

import rich.console
from rich import box
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column, Table
from rich.text import Text

from dist_cpt.errors import EXIT_DONE, EXIT_STOPPED, EXIT_WORDS, printable
from dist_cpt.run_folder.json_files import read_rows
from dist_cpt.run_folder.names import EVALUATIONS
from dist_cpt.run_folder.records import CheckpointRecord, EvaluationRecord, RunEnd, RunStart, StepRecord

_PLAIN_WIDTH = 118
_BRIEF_WIDTH = 60  # of the text beside the bar, including an ETA of a few days
_ETA_STEPS = 50  # the ETA is based on these last steps, with the evaluations and saves between them


class _Console(rich.console.Console):
    """Rich's own reaction to a closed pipe is to end the process."""

    def on_broken_pipe(self) -> None:
        raise


class Console:
    """Observer that prints progress to `stream`; on rank 0 only."""

    def __init__(self, stream: TextIO | None = None, *, every_seconds: float = 30.0, live: bool | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._live = self._stream.isatty() if live is None else live
        self._every_seconds = every_seconds
        self._console = _Console(
            file=self._stream,
            force_terminal=self._live,
            no_color=not self._live,
            width=None if self._live else _PLAIN_WIDTH,
            highlight=False,
            markup=False,
            emoji=False,
            soft_wrap=not self._live,
        )
        self._progress: Progress | None = None
        self._task: Any = None
        self._num_steps = 0
        self._printed_at = -math.inf
        self._printed_step = 0
        self._last: StepRecord | None = None
        self._ticks: deque[tuple[int, float]] = deque(maxlen=_ETA_STEPS)
        self._first_loss: dict[str, float] = {}

    def on_start(self, start: RunStart) -> None:
        self._num_steps = start.num_steps
        for row in read_rows(start.folder / EVALUATIONS):  # of earlier attempts
            self._first_loss.setdefault(row["name"], row["loss"])
        ranks = "1 rank" if start.world_size == 1 else f"{start.world_size} ranks"
        begin = "from the start" if start.resumed_from is None else f"resumed from {start.resumed_from}"
        self._print(
            f"{start.config.name}: {start.engine} on {ranks} ({start.device}), {begin}, "
            f"step {start.first_step} of {start.num_steps}; {start.folder}"
        )
        self._console.print(contract_table(start.contract))
        for line in contract_notes(start.contract):
            self._print(line)
        if self._live:
            width = len(f"step {start.num_steps}/{start.num_steps}")  # never squeezed away on a narrow terminal
            self._progress = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}", table_column=Column(min_width=width)),
                BarColumn(bar_width=min(max(self._console.width - width - _BRIEF_WIDTH, 4), 30)),
                TextColumn("{task.fields[shown]}", markup=False),
                console=self._console,
                refresh_per_second=4,
            )
            self._task = self._progress.add_task("", total=start.num_steps, completed=start.first_step, shown="")
            self._progress.start()

    def on_step(self, record: StepRecord) -> None:
        now = time.monotonic()
        first = self._last is None
        self._ticks.append((record.step, now))
        self._last = record
        if record.skipped:
            reason = f"loss {record.loss:.4g} is a spike" if record.spike else "gradient not finite"
            self._print(f"step {record.step} skipped: {reason} ({record.skipped_total} skipped so far)")
        elif record.spike:
            self._print(f"step {record.step}: loss {record.loss:.4g} is a spike; the update was applied")
        if self._progress is not None:
            self._progress.update(self._task, completed=record.step, shown=self._summary(record, brief=True))
            return
        if first or record.step >= self._num_steps or now - self._printed_at >= self._every_seconds:
            self._step_line(record, now)

    def on_evaluation(self, record: EvaluationRecord) -> None:
        role = " [retention]" if record.role == "retention" else ""
        scores = ", ".join(f"{name} {value:.4f}" for name, value in record.scores.items())
        if record.loss is None or record.perplexity is None:
            self._print(f"step {record.step} task {record.name}: {scores}")
            return
        if record.scores:
            result = f"{scores}, log-loss {record.loss:.4f} ({record.num_tokens} texts)"
        else:
            first = self._first_loss.setdefault(record.name, record.loss)
            change = "" if record.loss == first else f" ({_change(first, record.loss)} since the first evaluation)"
            bits = "" if record.bits_per_byte is None else f", {record.bits_per_byte:.4f} bits/byte"
            result = f"loss {record.loss:.4f}, perplexity {_significant(record.perplexity)}{change}{bits}"
            if record.loss_rise is not None and record.step:
                result += f", {record.loss_rise:+.4f} against the base"
        self._print(f"step {record.step} held-out {record.name}{role}: {result}")

    def on_checkpoint(self, record: CheckpointRecord) -> None:
        in_background = record.stall_seconds < record.seconds
        how = f" in the background ({record.stall_seconds:.1f} s of stall)" if in_background else ""
        size = f"{record.num_bytes / 2**20:,.1f} MiB"
        self._print(f"step {record.step} saved in {record.seconds:.1f} s{how}, {size}: {record.path}")

    def on_message(self, text: str) -> None:
        self._print(text)

    def on_end(self, end: RunEnd) -> None:
        if self._last is not None and self._progress is None and self._printed_step != self._last.step:
            self._step_line(self._last, time.monotonic())
        self.close()
        word = EXIT_WORDS.get(end.exit_code, "unknown")
        outcome = word if end.exit_code in (EXIT_DONE, EXIT_STOPPED) else f"exit code {end.exit_code} ({word})"
        self._print(f"{outcome} at step {end.step}: {end.reason}")

    def close(self) -> None:
        """Remove the live line and restore the cursor; also for a run that ends by an exception."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _step_line(self, record: StepRecord, now: float) -> None:
        self._printed_at, self._printed_step = now, record.step
        self._print(f"step {record.step}/{self._num_steps} | {self._summary(record)}")

    def _summary(self, record: StepRecord, brief: bool = False) -> str:
        """Loss, learning rates, speed, memory and time left; `brief` fits beside a bar in 80 columns."""
        rates = list(dict.fromkeys(record.lr.values()))
        shown = "/".join(f"{rate:.1e}" for rate in ([max(rates)] if brief and rates else rates))
        parts = [
            f"loss {record.loss:.{3 if brief else 4}f}",
            f"lr {shown}",
            f"{_thousands(record.tokens_per_second)} {'tok/s' if brief else 'tokens/s'}",
            f"{record.memory_gib:.{1 if brief else 2}f} GiB",
            f"ETA {self._eta(record)}",
        ]
        return (" " if brief else " | ").join(parts)

    def _eta(self, record: StepRecord) -> str:
        (first_step, since), (last_step, until) = self._ticks[0], self._ticks[-1]
        pace = (until - since) / (last_step - first_step) if last_step > first_step else record.step_seconds
        return duration(pace * max(self._num_steps - record.step, 0))

    def _print(self, text: str) -> None:
        """Print one line without markup, control characters and characters that the stream cannot encode."""
        line = printable(text.replace("\n", " "))
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._console.print(Text(line.encode(encoding, errors="replace").decode(encoding, errors="replace")))
        if not self._live:
            self._stream.flush()


def contract_table(contract: dict[str, Any]) -> Table:
    """The parameter groups of contract.json: one row per group, one for the frozen parameters."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    for heading in ("group", "tensors", "parameters", "compute/master", "peak lr", "decay", "sharding"):
        table.add_column(heading, justify="right" if heading in ("tensors", "parameters") else "left")
    for group in contract.get("groups", []):
        table.add_row(
            Text(str(group["name"])),
            f"{group['num_tensors']:,}",
            f"{group['num_parameters']:,}",
            f"{group['compute_dtype']}/{group['master_dtype']}",
            f"{group['peak_lr']:g}",
            f"{group['weight_decay']:g}",
            Text(str(group["sharding"])),
        )
    frozen = contract.get("frozen") or {}
    if frozen.get("num_tensors"):
        dtype = frozen.get("dtype", "")
        shown = ", ".join(dtype) if isinstance(dtype, list) else str(dtype)
        per_rank = max(frozen.get("num_parameters_per_rank") or [0])
        count = f"{per_rank:,} per rank" if per_rank else f"{frozen.get('num_parameters', 0):,}"
        table.add_row("frozen", f"{frozen['num_tensors']:,}", count, shown, "", "", "")
    return table


def contract_notes(contract: dict[str, Any]) -> Sequence[str]:
    """Tied weights and the kernels in use, one line each."""
    notes = [f"tied: {' = '.join(map(str, pair))}" for pair in contract.get("ties", [])]
    kernels = contract.get("kernels") or {}
    if "attention" in kernels:
        notes.append(f"attention: {kernels['attention']}")
    if kernels.get("fused"):
        notes.append(f"fused: {', '.join(f'{name} x{count}' for name, count in kernels['fused'].items())}")
    reasons: dict[str, list[str]] = {}
    for operation, of_operation in kernels.get("left", {}).items():
        for reason in of_operation:
            reasons.setdefault(reason, []).append(operation)
    return [*notes, *(f"not fused: {', '.join(names)}: {reason}" for reason, names in reasons.items())]


def duration(seconds: float) -> str:
    """`h:mm:ss`, preceded by days if there are any."""
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days} d " if days else "") + f"{hour}:{minute:02d}:{second:02d}"


def _change(first: float, last: float) -> str:
    """Relative change of the perplexity, computed from the losses, whose exponentials may overflow."""
    if not math.isfinite(first + last) or last - first > 20:
        return "not comparable"
    return f"{math.expm1(last - first):+.1%}"


def _thousands(value: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _significant(value: float) -> str:
    return f"{value:,.2f}" if 0.1 <= abs(value) < 1e6 else f"{value:.3g}"
