"""The state of a run, read from its folder alone: no torch, no scheduler needed, a few milliseconds.

Files may be written at the same moment, cut off by a kill, or lost: each such gap becomes a line under `problems` or
an absent value, never an error.
"""

from __future__ import annotations

import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_cpt import storage
from dist_cpt.checkpoint.quick_check import quick_check
from dist_cpt.errors import EXIT_DONE, EXIT_WORDS, ConfigError, StorageError
from dist_cpt.health.heartbeats import Heartbeat, read_heartbeats
from dist_cpt.report.goodput import Goodput
from dist_cpt.report.ledger import SourceLedger, source_ledger
from dist_cpt.report.values import duration, integer, real, unix_time
from dist_cpt.run_folder.checkpoints import published
from dist_cpt.run_folder.contents import object_or_problem, recipe_or_problem
from dist_cpt.run_folder.json_files import rows_or_problem
from dist_cpt.run_folder.lineage import inherited_step
from dist_cpt.run_folder.names import CERTIFICATE, EVENTS, EXIT, LAUNCHES, LOGS, METRICS, METRICS_REWOUND, RECIPE, RUN
from dist_cpt_launch.attempts import LaunchRecord
from dist_cpt_launch.slurm_query import queue_state

SILENT_SECONDS = 60.0  # without a heartbeat: the rank is gone
PACE_STEPS = 50
TAIL_BYTES = 1 << 18  # of metrics.jsonl: more than PACE_STEPS rows
WATCH_SECONDS = 5.0

_STEP_SECONDS = re.compile(rb'"step_seconds":([0-9.eE+-]+)')
_STRAGGLER = "straggler: "

Row = dict[str, Any]


@dataclass(frozen=True)
class EndedAttempt:
    """One attempt that is over."""

    attempt: int
    code: int | None  # None: killed or crashed
    reason: str


@dataclass(frozen=True)
class Rank:
    """One rank of the current attempt, by its heartbeat."""

    rank: int
    host: str
    step: int
    phase: str
    age_seconds: float
    ended: bool


@dataclass(frozen=True)
class Status:
    """The state of one run."""

    folder: str
    name: str
    state: str  # not started | starting | running | silent | waiting (for the batch job's next start) | ended
    summary: str  # of the state, one line
    attempt: int | None
    step: int | None
    num_steps: int | None
    loss: float | None
    tokens: int | None  # target tokens
    batch_tokens: int | None
    sources: list[SourceLedger]
    tokens_per_second: float | None
    eta_seconds: float | None  # of the remaining steps
    goodput: Goodput | None
    restarts: list[EndedAttempt]
    exit_code: int | None
    checkpoint: str | None
    checkpoint_check: str
    certificate: str
    straggler: str | None
    ranks: list[Rank]
    job: str | None
    scheduler: str | None  # the batch job's last decision
    bad_nodes: list[str]
    queue: str | None  # None: Slurm was not asked
    problems: list[str]

    def as_json(self) -> Row:
        """One JSON object; goodput with its fraction. `said` and `checkpoint_verdict` are names that scripts read."""
        content = asdict(self)
        content["said"], content["checkpoint_verdict"] = content.pop("summary"), content.pop("checkpoint_check")
        if self.goodput is not None:
            content["goodput"]["fraction"] = round(self.goodput.fraction, 4)
        return content


def find_run(run: Path | None, runs: Path = Path("runs")) -> Path:
    """`run`, or the most recently active run folder under `runs`.

    Raises:
        ConfigError: there is no such folder.
    """
    if run is not None:
        if not run.is_dir():
            raise ConfigError(f"{run} is not a folder", remedy="give a run folder: <output_dir>/<name>")
        if not _looks_like_run(run):
            raise ConfigError(f"{run} is not a run folder: no {RUN} in it", remedy="give <output_dir>/<name>")
        return run
    folders = [path.parent for path in runs.glob(f"[!.]*/{RUN}")]  # hidden: a branch that is being made
    if not folders:
        raise ConfigError(f"no run under {runs}/", remedy="give a run folder: <output_dir>/<name>")
    return max(folders, key=lambda folder: max(_modified(folder / name) for name in (RUN, METRICS, EVENTS, EXIT)))


def _looks_like_run(folder: Path) -> bool:
    """Whether anything that a run writes is there; True also for a folder that does not answer."""
    try:
        return not {RECIPE, RUN, METRICS, EVENTS, EXIT, LAUNCHES, LOGS}.isdisjoint(os.listdir(folder))
    except OSError:
        return True


def read_status(folder: Path, now: float | None = None, *, ask_slurm: bool = False) -> Status:
    """The status at `now` (unix seconds); with `ask_slurm` also the batch job's place in the queue."""
    files = _read_files(folder, time.time() if now is None else now)
    ranks = [_rank(beat, files.now) for beat in files.beats]
    starts = [event for event in files.events if event.get("kind") in ("start", "resume")]
    newest = files.last_steps[-1] if files.last_steps else {"step": 0} if starts else {}
    state, summary = _state(files, ranks)
    num_steps, step = _last(starts, "num_steps", int), integer(newest.get("step"))
    tokens_per_second, step_seconds = _pace(files.last_steps)
    left = num_steps - step if num_steps and step is not None and files.exit_code != EXIT_DONE else None
    checkpoint, checkpoint_check, bad_nodes = _patient_parts(files)
    decision = files.launches[-1] if files.launches and files.launches[-1].get("kind") == "end" else None
    job = _last(files.launches, "slurm_job", str) or (str(files.run["job"]) if files.run.get("job") else None)
    return Status(
        folder=str(folder),
        name=str(_last(starts, "name", str) or folder.resolve().name),
        state=state,
        summary=summary,
        attempt=files.attempt,
        step=step,
        num_steps=num_steps,
        loss=real(newest.get("loss")),
        tokens=integer(newest.get("tokens")),
        batch_tokens=integer(newest.get("batch_tokens")),
        sources=source_ledger(files.recipe, files.events, newest) if newest.get("totals_by_source") else [],
        tokens_per_second=tokens_per_second,
        eta_seconds=None if left is None or step_seconds is None else max(left, 0) * step_seconds,
        goodput=_goodput(files, state),
        restarts=_restarts(files),
        exit_code=files.exit_code,
        checkpoint=checkpoint,
        checkpoint_check=checkpoint_check,
        certificate=_certificate(files),
        straggler=_straggler(files.events),
        ranks=ranks,
        job=job,
        scheduler=f"{decision.get('action')}: {decision.get('reason')}" if decision else None,
        bad_nodes=bad_nodes,
        queue=queue_state(job) if ask_slurm else None,
        problems=files.problems,
    )


def show_status(folder: Path, text: Callable[[Status], str], watch: bool = False) -> None:
    """Print the status; with `watch` repeatedly, on a cleared terminal, until the run has ended."""
    os.environ.setdefault(storage.VARIABLE, "1")  # a display does not wait for a minute
    while True:
        status = read_status(folder, ask_slurm=True)
        clear = "\x1b[H\x1b[2J" if watch and sys.stdout.isatty() else ""
        print(clear + text(status), flush=True)
        if not watch or status.state == "ended":
            return
        time.sleep(WATCH_SECONDS)


def outcome(code: int | None) -> str:
    """How an attempt ended, in words; None: it recorded no exit code."""
    if code is None:
        return "no end recorded (killed or crashed)"
    word = EXIT_WORDS.get(code, "ended")
    return word if code == EXIT_DONE else f"{word} (exit code {code})"


# -- the files -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Files:
    """The parsed files of a run folder."""

    folder: Path
    now: float
    run: Row
    exit: Row
    events: list[Row]
    launches: list[Row]
    last_steps: list[Row]
    beats: list[Heartbeat]  # of the current attempt
    recipe: Row
    problems: list[str]

    @property
    def attempt(self) -> int | None:
        attempts = integer(self.run.get("attempts"))
        return None if attempts is None else attempts - 1

    @property
    def exit_code(self) -> int | None:
        return integer(self.exit.get("code"))


def _read_files(folder: Path, now: float) -> _Files:
    problems: list[str] = []
    run = object_or_problem(folder / RUN, problems)
    attempts = integer(run.get("attempts"))
    return _Files(
        folder=folder,
        now=now,
        run=run,
        exit=object_or_problem(folder / EXIT, problems),
        events=rows_or_problem(folder / EVENTS, problems),
        launches=rows_or_problem(folder / LAUNCHES, problems),
        last_steps=rows_or_problem(folder / METRICS, problems, TAIL_BYTES),
        recipe=recipe_or_problem(folder, problems)[1],
        beats=[beat for beat in read_heartbeats(folder) if attempts is None or beat.attempt == attempts - 1],
        problems=problems,
    )


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


# -- the parts -----------------------------------------------------------------------------------------------------


def _state(files: _Files, ranks: list[Rank]) -> tuple[str, str]:
    """(state, summary) from exit.json, else from the heartbeats."""
    if files.exit_code is not None:
        reason = str(files.exit.get("reason", ""))
        summary = outcome(files.exit_code) + (f": {reason}" if reason not in ("", "done") else "")
        return ("waiting" if _starts_again(files) else "ended"), summary
    if not files.run and not ranks:
        return "not started", f"no start recorded: the folder has no {RUN}"
    attempt = "" if files.attempt is None else f"attempt {files.attempt}, "
    alive = [rank for rank in ranks if not rank.ended]
    if not alive:
        started = real(files.run.get("started"))
        if started is not None and files.now - started < SILENT_SECONDS and not ranks:
            return "starting", f"{attempt}started {duration(files.now - started)} ago, no rank has reported yet"
        return "silent", f"{attempt}all ranks are gone and none recorded how it ended"
    ages = [rank.age_seconds for rank in alive]
    if min(ages) > SILENT_SECONDS:
        return "silent", f"{attempt}no heartbeat for {duration(min(ages))}: killed, or its hosts are gone"
    phase = min(alive, key=lambda rank: rank.rank).phase
    num_silent = sum(age > SILENT_SECONDS for age in ages)
    if num_silent:
        return "running", f"{attempt}{phase}, but {num_silent} ranks are silent, for up to {duration(max(ages))}"
    return ("starting" if phase == "starting" else "running"), f"{attempt}{phase} on {len(alive)} ranks"


def _starts_again(files: _Files) -> bool:
    """Whether the batch job has restarted the ranks since the last ending, or is going to."""
    if not files.launches or _modified(files.folder / LAUNCHES) < _modified(files.folder / EXIT):
        return False  # a later start without a batch job wrote exit.json
    return files.launches[-1].get("kind") == "start" or files.launches[-1].get("goes_on") is True


def _pace(last_steps: list[Row]) -> tuple[float | None, float | None]:
    """(tokens per second, median seconds per step) of the last steps, without evaluations and saves."""
    recent = [row for row in last_steps[-PACE_STEPS:] if real(row.get("step_seconds"))]
    if not recent:
        return None, None
    seconds = [float(row["step_seconds"]) for row in recent]
    return sum(integer(row.get("num_tokens")) or 0 for row in recent) / sum(seconds), statistics.median(seconds)


def _goodput(files: _Files, state: str) -> Goodput | None:
    event_times = [written for event in files.events if (written := unix_time(event.get("time"))) is not None]
    begun = real(files.run.get("first_started"))
    begun = min(event_times, default=None) if begun is None else begun
    if begun is None:
        return None
    end = files.now
    if state in ("ended", "silent"):  # the time after the last sign of life is not the run's
        beats = [beat.written for beat in read_heartbeats(files.folder)]
        end = max([*event_times, *beats, _modified(files.folder / EXIT)], default=end)
    productive, dropped = _step_seconds(files.folder / METRICS, files.problems, inherited_step(files.folder))
    redone, _ = _step_seconds(files.folder / METRICS_REWOUND, files.problems)
    saves = [event for event in files.events if event.get("kind") == "checkpoint"]
    saving = sum(real(event.get("stall_seconds")) or 0.0 for event in saves)
    return Goodput(productive - dropped, redone, saving, max(end - begun, 0.0))


def _step_seconds(path: Path, problems: list[str], first: int = 0) -> tuple[float, float]:
    """Sum over the rows from number `first` on, and over those whose update was dropped.

    By a regular expression, for millions of rows.
    """
    try:
        content = path.read_bytes().split(b"\n", first)[-1]
    except FileNotFoundError:
        return 0.0, 0.0
    except OSError as error:
        problems.append(f"{path.name}: {error.strerror}")
        return 0.0, 0.0
    skipped = (
        [line for line in content.split(b"\n") if b'"skipped":true' in line] if b'"skipped":true' in content else []
    )
    return _sum_of_seconds(content), _sum_of_seconds(b"\n".join(skipped))


def _sum_of_seconds(content: bytes) -> float:
    total = 0.0
    for text in _STEP_SECONDS.findall(content):
        try:
            total += float(text)
        except ValueError:  # a line that was cut off
            continue
    return total


def _restarts(files: _Files) -> list[EndedAttempt]:
    """Every attempt but the current one, from the end events and run.json."""
    ends: dict[int, EndedAttempt] = {}
    current = -1
    for event in files.events:
        if event.get("kind") in ("start", "resume"):
            number = integer(event.get("attempt"))
            current = current + 1 if number is None else number
        elif event.get("kind") == "end":
            ends[current] = EndedAttempt(current, integer(event.get("exit_code")), str(event.get("reason", "")))
    recorded = files.run.get("ends")
    for end in recorded if isinstance(recorded, list) else []:
        if isinstance(end, dict) and isinstance(end.get("attempt"), int):
            ends[end["attempt"]] = EndedAttempt(end["attempt"], integer(end.get("code")), str(end.get("reason") or ""))
    newest = current if files.attempt is None else files.attempt
    return [ends.get(number, EndedAttempt(number, None, "")) for number in range(max(newest, 0))]


def _patient_parts(files: _Files) -> tuple[str | None, str, list[str]]:
    """(newest checkpoint, its check, bad nodes): what is read for a run too, which waits for a file server."""
    try:
        return (*_checkpoint(files.folder), sorted(LaunchRecord(files.folder, "").bad_nodes()))
    except StorageError as error:
        files.problems.append(error.message)
        return None, "cannot be read", []


def _checkpoint(folder: Path) -> tuple[str | None, str]:
    """The newest published checkpoint, and whether it is complete by its manifest. Reads no tensor."""
    newest = next(iter(published(folder)), None)
    if newest is None:
        return None, "no checkpoint yet"
    problems = quick_check(newest)
    return newest.name, f"INVALID: {problems[0]}" if problems else "complete (every byte: dist-cpt verify)"


def _certificate(files: _Files) -> str:
    content = object_or_problem(files.folder / CERTIFICATE, files.problems)
    if not content:
        return "never resumed"
    failed = f" ({content['failed']})" if content.get("failed") else ""
    return f"{content.get('verdict')}{failed} at step {content.get('step')}, attempt {content.get('attempt')}"


def _straggler(events: list[Row]) -> str | None:
    """The latest message about slow ranks in the newest attempt."""
    message = None
    for event in events:
        if event.get("kind") in ("start", "resume"):
            message = None
        elif event.get("kind") == "message" and str(event.get("text", "")).startswith(_STRAGGLER):
            message = str(event["text"])
    return message


def _rank(beat: Heartbeat, now: float) -> Rank:
    return Rank(beat.rank, beat.host, beat.step, beat.phase, round(max(now - beat.written, 0.0), 1), beat.ended)


def _last(rows: Iterable[Row], key: str, kind: type) -> Any:
    return next((row[key] for row in reversed(list(rows)) if isinstance(row.get(key), kind)), None)
