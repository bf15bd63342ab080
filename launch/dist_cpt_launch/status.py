"""Where a run stands, from its folder alone: no torch, no scheduler needed, a few milliseconds.

What is read may be written at the same moment, torn by a kill or lost: every gap becomes one line under `problems`
or a value that is absent, never an error.
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from dist_cpt.checkpoint.quick_check import outline_problems
from dist_cpt.errors import EXIT_DONE, ConfigError, printable
from dist_cpt.health.heartbeats import Heartbeat, read_heartbeats
from dist_cpt.report.attempts import OUTCOMES
from dist_cpt.report.values import duration
from dist_cpt.run_folder.checkpoints import published
from dist_cpt_launch.attempts import Record

SILENT_SECONDS = 60.0  # no heartbeat for so long: nobody is there
PACE_STEPS = 50
TAIL_BYTES = 1 << 18  # of metrics.jsonl: more than PACE_STEPS rows
QUEUE_SECONDS = 3.0  # for squeue and sacct together
WATCH_SECONDS = 5.0

_STEP_SECONDS = re.compile(rb'"step_seconds":([0-9.eE+-]+)')


@dataclass(frozen=True)
class Ended:
    """One attempt that is over."""

    attempt: int
    code: int | None  # None: it could not say
    reason: str


@dataclass(frozen=True)
class Goodput:
    """Where the wall time went, in seconds; the rest is starting, evaluating, queueing and standing still."""

    productive: float  # steps that count
    redone: float  # steps that a resume threw away
    saving: float  # training waited for a checkpoint
    wall: float  # first start to the end, or to now

    @property
    def fraction(self) -> float:
        return self.productive / self.wall if self.wall > 0 else 0.0


@dataclass(frozen=True)
class Rank:
    """One rank of the current attempt, by its heartbeat."""

    rank: int
    host: str
    step: int
    phase: str
    age_seconds: float
    ended: bool


@dataclass
class Status:
    """All that a run folder tells."""

    folder: str
    name: str
    state: str  # not started | starting | running | silent | waiting (for the batch job's next start) | ended
    said: str  # the state in one line
    attempt: int | None = None
    step: int | None = None
    num_steps: int | None = None
    loss: float | None = None
    tokens: int | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    goodput: Goodput | None = None
    restarts: list[Ended] = field(default_factory=list)
    exit_code: int | None = None
    checkpoint: str | None = None
    checkpoint_verdict: str = "no checkpoint yet"
    certificate: str = "never resumed"
    straggler: str | None = None
    ranks: list[Rank] = field(default_factory=list)
    job: str | None = None
    scheduler: str | None = None  # what the batch job decided last
    bad_nodes: list[str] = field(default_factory=list)
    queue: str = "no batch job"
    problems: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """One JSON object; goodput with its fraction."""
        content = asdict(self)
        if self.goodput is not None:
            content["goodput"]["fraction"] = round(self.goodput.fraction, 4)
        return content


def find_run(run: Path | None, runs: Path = Path("runs")) -> Path:
    """The folder that was named, or the one under `runs` in which something happened last.

    Raises:
        ConfigError: there is no such folder.
    """
    if run is not None:
        if not run.is_dir():
            raise ConfigError(f"{run} is not a folder", remedy="give a run folder: <output_dir>/<name>")
        return run
    found = [path.parent for path in runs.glob("*/run.json")] if runs.is_dir() else []
    if not found:
        raise ConfigError(f"no run under {runs}/", remedy="give a run folder: <output_dir>/<name>")
    return max(found, key=_last_sign)


def read_status(folder: Path, now: float | None = None) -> Status:
    """Everything but the queue, read without waiting for anybody; `now` is unix seconds."""
    now = time.time() if now is None else now
    problems: list[str] = []
    run = _object(folder / "run.json", problems)
    ended = _object(folder / "exit.json", problems)
    events = _rows(folder / "events.jsonl", problems)
    last = _last_rows(folder / "metrics.jsonl", problems)
    beats = read_heartbeats(folder)
    attempt = run["attempts"] - 1 if isinstance(run.get("attempts"), int) else None
    beats = [beat for beat in beats if attempt is None or beat.attempt == attempt]
    starts = [event for event in events if event.get("kind") in ("start", "resume")]
    status = Status(str(folder), _name(folder, starts), "", "", attempt=attempt, problems=problems)
    status.ranks = [_rank(beat, now) for beat in beats]
    status.exit_code = ended["code"] if isinstance(ended.get("code"), int) else None
    status.num_steps = _last_of(starts, "num_steps", int)
    if last:
        status.step, status.loss = _as(last[-1].get("step"), int), _as(last[-1].get("loss"), float)
        status.tokens = _as(last[-1].get("tokens"), int)
    elif starts:
        status.step = 0
    status.state, status.said = _state(status, run, ended, now)
    launches = _rows(folder / "launches.jsonl", problems)
    if status.state == "ended" and _starts_again(folder, launches):
        status.state = "waiting"
    _pace(status, last)
    status.goodput = _goodput(folder, run, events, ended, now, status.state, problems)
    status.restarts = _restarts(run, events, attempt)
    status.checkpoint, status.checkpoint_verdict = _checkpoint(folder)
    status.certificate = _certificate(folder, problems)
    status.straggler = _straggler(events)
    status.job = _last_of(launches, "slurm_job", str) or (str(run["job"]) if run.get("job") else None)
    if launches and launches[-1].get("kind") == "end":
        status.scheduler = f"{launches[-1].get('action')}: {launches[-1].get('reason')}"
    status.bad_nodes = sorted(Record(folder, "").bad_nodes())
    return status


def queue_state(job: str | None, seconds: float = QUEUE_SECONDS) -> str:
    """What Slurm says of the job, in one line; what is in the way otherwise."""
    if job is None:
        return "no batch job"
    if not re.fullmatch(r"[0-9]+(_[0-9]+)?", job):
        return f"job {job!r}: not a Slurm job number"
    if shutil.which("squeue") is None:
        return f"job {job}: no squeue on this host"
    deadline = time.monotonic() + seconds
    listed = _ask(["squeue", "--noheader", "--jobs", job, "--format=%T|%r|%S|%N"], deadline)
    if listed:
        state, reason, start, nodes = (listed.splitlines()[0].split("|") + [""] * 4)[:4]
        more = f" on {nodes}" if nodes else f" ({reason}), expected start {start}" if start != "N/A" else f" ({reason})"
        return f"job {job}: {state}{more}"
    if listed is None:
        return f"job {job}: squeue gives no answer"
    if shutil.which("sacct") is not None:
        fields = "--format=State,ExitCode"
        kept = _ask(["sacct", "--noheader", "--allocations", "--parsable2", "--jobs", job, fields], deadline)
        if kept:
            return f"job {job}: {' '.join(kept.splitlines()[-1].split('|'))}, no longer queued"
    return f"job {job}: not in the queue"


def as_text(status: Status) -> str:
    """For a terminal; no control characters, whatever the files say."""
    rows = [("run", f"{status.name}  {status.folder}"), ("state", status.said), ("queue", status.queue)]
    if status.scheduler:
        rows.append(("scheduler", status.scheduler))
    if status.bad_nodes:
        rows.append(("left out", f"nodes {', '.join(status.bad_nodes)} (bad_nodes.json)"))
    if status.step is not None:
        of = f" of {status.num_steps}" if status.num_steps else ""
        loss = f", loss {status.loss:.4f}" if status.loss is not None else ""
        rows.append(("step", f"{status.step}{of}{loss}"))
    if status.tokens_per_second is not None:
        eta = f", {duration(status.eta_seconds)} of steps left" if status.eta_seconds is not None else ""
        rows.append(("speed", f"{status.tokens_per_second:,.0f} tokens/s{eta}"))
    if status.goodput is not None:
        parts = status.goodput
        rows.append(
            (
                "goodput",
                f"{parts.fraction:.1%}: {duration(parts.productive)} of steps in {duration(parts.wall)}"
                f" ({duration(parts.redone)} redone, {duration(parts.saving)} waiting for saves)",
            )
        )
    rows.append(("restarts", str(len(status.restarts))))
    rows += [("", f"attempt {one.attempt}: {_outcome(one.code)}{f', {one.reason}' if one.reason else ''}")
             for one in status.restarts[-5:]]  # fmt: skip
    rows.append(("checkpoint", f"{status.checkpoint or 'none'}: {status.checkpoint_verdict}"))
    rows.append(("certificate", status.certificate))
    if status.straggler:
        rows.append(("straggler", status.straggler.removeprefix("straggler: ")))
    rows += _rank_rows(status)
    rows += [("problem", problem) for problem in status.problems]
    width = max(len(head) for head, _ in rows)
    return "\n".join(f"{head:<{width}}  {printable(text)}" for head, text in rows)


def show_status(folder: Path, text: Callable[[Status], str], watch: bool = False) -> None:
    """Print the status; with `watch` again and again, on a cleared terminal, until the run has ended."""
    while True:
        status = read_status(folder)
        status.queue = queue_state(status.job)
        clear = "\x1b[H\x1b[2J" if watch and sys.stdout.isatty() else ""
        print(clear + text(status), flush=True)
        if not watch or status.state == "ended":
            return
        time.sleep(WATCH_SECONDS)


# -- the parts -----------------------------------------------------------------------------------------------------


def _state(status: Status, run: dict[str, Any], ended: dict[str, Any], now: float) -> tuple[str, str]:
    if not run and status.exit_code is None and not status.ranks:
        return "not started", "no start recorded: the folder has no run.json"
    if status.exit_code is not None:
        reason = str(ended.get("reason", ""))
        return "ended", _outcome(status.exit_code) + (f": {reason}" if reason not in ("", "done") else "")
    which = "" if status.attempt is None else f"attempt {status.attempt}, "
    alive = [rank for rank in status.ranks if not rank.ended]
    if not alive:
        started = run.get("started")
        since = now - started if isinstance(started, int | float) else None
        if since is not None and since < SILENT_SECONDS and not status.ranks:
            return "starting", f"{which}started {duration(since)} ago, no rank has reported yet"
        return "silent", f"{which}no rank is there any more, and none has said how it ended"
    youngest, oldest = min(rank.age_seconds for rank in alive), max(rank.age_seconds for rank in alive)
    if youngest > SILENT_SECONDS:
        return "silent", f"{which}no sign of life for {duration(youngest)}: killed, or its hosts are gone"
    phase = min(alive, key=lambda rank: rank.rank).phase
    quiet = [rank for rank in alive if rank.age_seconds > SILENT_SECONDS]
    if quiet:
        return "running", f"{which}{phase}, but {len(quiet)} ranks are silent, for up to {duration(oldest)}"
    return ("starting" if phase == "starting" else "running"), f"{which}{phase} on {len(alive)} ranks"


def _starts_again(folder: Path, launches: list[dict[str, Any]]) -> bool:
    """Whether the batch job has started the ranks again since the last ending, or said that it will."""
    if not launches or _modified(folder / "launches.jsonl") < _modified(folder / "exit.json"):
        return False  # that was another start, without a batch job
    return launches[-1].get("kind") == "start" or launches[-1].get("goes_on") is True


def _pace(status: Status, rows: list[dict[str, Any]]) -> None:
    """Tokens per second and the time of the remaining steps, by the last steps; without evaluations and saves."""
    recent = [row for row in rows[-PACE_STEPS:] if _as(row.get("step_seconds"), float)]
    if not recent or status.step is None:
        return
    status.tokens_per_second = sum(_as(row.get("num_tokens"), int) or 0 for row in recent) / sum(
        row["step_seconds"] for row in recent
    )
    if status.num_steps and status.exit_code not in (EXIT_DONE,):
        left = max(status.num_steps - status.step, 0)
        status.eta_seconds = left * statistics.median(row["step_seconds"] for row in recent)


def _goodput(
    folder: Path,
    run: dict[str, Any],
    events: list[dict[str, Any]],
    ended: dict[str, Any],
    now: float,
    state: str,
    problems: list[str],
) -> Goodput | None:
    times = [found for event in events if (found := _unix(event.get("time"))) is not None]
    begun = run.get("first_started")
    begun = begun if isinstance(begun, int | float) else min(times, default=None)
    if begun is None:
        return None
    until = now
    if state in ("ended", "silent"):  # what comes after it is not the run's
        signs = [*times, *(beat.written for beat in read_heartbeats(folder)), _modified(folder / "exit.json")]
        until = max(signs, default=now)
    productive, unapplied = _step_seconds(folder / "metrics.jsonl", problems)
    redone, _ = _step_seconds(folder / "metrics.rewound.jsonl", problems)
    saving = sum(_as(event.get("stall_seconds"), float) or 0.0 for event in events if event.get("kind") == "checkpoint")
    return Goodput(productive - unapplied, redone, saving, max(until - begun, 0.0))


def _step_seconds(path: Path, problems: list[str]) -> tuple[float, float]:
    """Sum over all rows, and over those whose update was dropped; a regular expression, since rows may be a million."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return 0.0, 0.0
    except OSError as error:
        problems.append(f"{path.name}: {error.strerror}")
        return 0.0, 0.0
    skipped = b""
    if b'"skipped":true' in content:
        skipped = b"\n".join(line for line in content.split(b"\n") if b'"skipped":true' in line)
    return _sum(content), _sum(skipped)


def _sum(content: bytes) -> float:
    total = 0.0
    for text in _STEP_SECONDS.findall(content):
        try:
            total += float(text)
        except ValueError:  # torn
            continue
    return total


def _restarts(run: dict[str, Any], events: list[dict[str, Any]], attempt: int | None) -> list[Ended]:
    """Every attempt but the current one, and how it ended, from run.json and the end events."""
    ends: dict[int, Ended] = {}
    current = -1
    for event in events:
        if event.get("kind") in ("start", "resume"):
            current = _as(event.get("attempt"), int) if _as(event.get("attempt"), int) is not None else current + 1
        elif event.get("kind") == "end":
            ends[current] = Ended(current, _as(event.get("exit_code"), int), str(event.get("reason", "")))
    kept = run.get("ends")
    for one in kept if isinstance(kept, list) else []:
        if isinstance(one, dict) and isinstance(one.get("attempt"), int):
            ends[one["attempt"]] = Ended(one["attempt"], _as(one.get("code"), int), str(one.get("reason") or ""))
    last = attempt if attempt is not None else current
    return [ends.get(number, Ended(number, None, "")) for number in range(max(last, 0))]


def _checkpoint(folder: Path) -> tuple[str | None, str]:
    """The newest published checkpoint, and whether it is whole by its manifest. Reads no tensor."""
    found = published(folder)
    if not found:
        return None, "no checkpoint yet"
    problems = outline_problems(found[0])
    return found[0].name, f"DOES NOT HOLD: {problems[0]}" if problems else "complete (every byte: dist-cpt verify)"


def _certificate(folder: Path, problems: list[str]) -> str:
    content = _object(folder / "certificate.json", problems)
    if not content:
        return "never resumed"
    failed = f" ({content.get('failed')})" if content.get("failed") else ""
    return f"{content.get('verdict')}{failed} at step {content.get('step')}, attempt {content.get('attempt')}"


def _straggler(events: list[dict[str, Any]]) -> str | None:
    """The latest line about slow ranks of the newest attempt."""
    said = None
    for event in events:
        if event.get("kind") in ("start", "resume"):
            said = None
        elif event.get("kind") == "message" and str(event.get("text", "")).startswith("straggler: "):
            said = str(event["text"])
    return said


def _rank(beat: Heartbeat, now: float) -> Rank:
    return Rank(beat.rank, beat.host, beat.step, beat.phase, round(max(now - beat.written, 0.0), 1), beat.ended)


def _rank_rows(status: Status) -> list[tuple[str, str]]:
    """All of a few ranks; of many, the oldest heartbeats."""
    shown = sorted(status.ranks, key=lambda rank: -rank.age_seconds)[:8] if len(status.ranks) > 8 else status.ranks
    rows = [
        (
            f"rank {rank.rank}",
            f"{rank.host}: step {rank.step}, {rank.phase}, "
            + ("ended" if rank.ended else f"heartbeat {rank.age_seconds:.0f} s ago"),
        )
        for rank in shown
    ]
    hidden = len(status.ranks) - len(shown)
    return [*rows, ("", f"and {hidden} ranks with younger heartbeats")] if hidden else rows


def _outcome(code: int | None) -> str:
    if code is None:
        return "no end recorded (killed or crashed)"
    word, _ = OUTCOMES.get(code, ("ended", ""))
    return word if code == EXIT_DONE else f"{word} (exit code {code})"


def _name(folder: Path, starts: list[dict[str, Any]]) -> str:
    return str(starts[-1].get("name") or folder.resolve().name) if starts else folder.resolve().name


# -- files ---------------------------------------------------------------------------------------------------------


def _object(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        problems.append(f"{path.name}: {error.strerror}")
        return {}
    except ValueError:
        content = None
    if not isinstance(content, dict):
        problems.append(f"{path.name}: not a JSON object")
        return {}
    return content


def _rows(path: Path, problems: list[str], tail_bytes: int | None = None) -> list[dict[str, Any]]:
    """The objects in a .jsonl file, or in its end; a torn last line is being written, any other is a problem."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            start = 0 if tail_bytes is None else max(size - tail_bytes, 0)
            file.seek(start)
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        problems.append(f"{path.name}: {error.strerror}")
        return []
    rows, torn = [], 0
    for number, line in enumerate(lines):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif line.strip() and number < len(lines) - 1 and (number > 0 or start == 0):  # neither cut nor being written
            torn += 1
    if torn:
        problems.append(f"{path.name}: {torn} lines cannot be read")
    return rows


def _last_rows(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    return _rows(path, problems, TAIL_BYTES)


def _last_sign(folder: Path) -> float:
    """When something last happened in a run folder."""
    return max(_modified(folder / name) for name in ("run.json", "metrics.jsonl", "events.jsonl", "exit.json"))


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _last_of(rows: list[dict[str, Any]], key: str, kind: type) -> Any:
    return next((row[key] for row in reversed(rows) if isinstance(row.get(key), kind)), None)


def _as(value: Any, kind: type) -> Any:
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return value if isinstance(value, kind) and not isinstance(value, bool) else None


def _unix(text: Any) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except (TypeError, ValueError):
        return None


def _ask(command: list[str], deadline: float) -> str | None:
    """What a Slurm command says; empty if it knows no such job, None if it does not answer."""
    try:
        left = max(deadline - time.monotonic(), 0.1)
        done = subprocess.run(command, capture_output=True, text=True, timeout=left, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    known = done.returncode == 0 or "Invalid job id" in done.stderr
    return done.stdout.strip() if known else None
