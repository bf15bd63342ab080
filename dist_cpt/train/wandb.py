"""Weights & Biases as an observer whose failures never stop training; metrics.jsonl remains the record.

A resumed run continues the W&B run of the same id (`resume="allow"`). W&B's history only grows: rows that a resume
rewound stay, and the repeated steps are added behind them. Rows are therefore logged without W&B's own step counter,
which drops everything below its highest value; they carry `step`, the axis of every chart, and `attempt`. Offline,
each attempt is one folder, and `wandb sync <run folder>/wandb/offline-run-*` uploads them in order into the one run.

The recipe, the records and system metrics leave the machine. The command line, the environment, the code, its git
state and the console output do not.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import re
import secrets
import shlex
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_cpt.config.schema import WandbConfig
from dist_cpt.errors import EXIT_DONE, EXIT_STOPPED, EXIT_WORDS, ConfigError, MissingExtraError
from dist_cpt.run_folder.lineage import group_of
from dist_cpt.run_folder.names import CHECKPOINTS, WANDB
from dist_cpt.run_folder.records import CheckpointRecord, EvaluationRecord, RunEnd, RunStart, StepRecord
from dist_cpt.runtime.log import LOGGER
from dist_cpt.runtime.secret_values import secret_values

_ENV_MODES = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}
_GRACE_SECONDS = 15.0  # for wandb's own process to end after its own limit


def new_run_id() -> str:
    """A random W&B run id of 8 hex digits; made once per run and kept in its checkpoints."""
    return secrets.token_hex(4)


def wandb_observer(
    config: WandbConfig,
    run_folder: Path,
    run_id: str,
    report: Callable[[str], None],
    *,
    init_timeout_seconds: float = 30.0,
    finish_timeout_seconds: float = 60.0,
) -> WandbObserver | None:
    """The observer for `track.wandb`, or None where nothing is tracked; `report` receives problems, one line each.

    Mode auto follows WANDB_MODE, else it is online where wandb finds credentials for the server and offline where
    it does not.

    Raises:
        MissingExtraError: mode online or offline, and wandb is not installed.
        ConfigError: mode online without credentials for the server.
    """
    mode: str = config.mode
    if mode == "auto":
        mode = _ENV_MODES.get(os.environ.get("WANDB_MODE", "").lower(), "auto")
    if mode == "disabled":
        return None
    try:
        _wandb()
    except ModuleNotFoundError as error:
        if error.name != "wandb":
            raise
        if config.mode != "auto":
            raise MissingExtraError(f"track.wandb.mode {config.mode}", "wandb") from None
        report("W&B: not tracked, the extra 'wandb' is not installed (pip install 'dist-cpt[wandb]')")
        return None
    if mode == "auto":
        mode = "online" if _has_credentials() else "offline"
    elif mode == "online" and not _has_credentials():
        raise ConfigError(
            "track.wandb.mode is online, but W&B has no credentials for its server",
            remedy="export WANDB_API_KEY, run `wandb login`, or use mode auto or offline",
        )
    return WandbObserver(config, run_folder, run_id, mode, report, init_timeout_seconds, finish_timeout_seconds)


class WandbObserver:
    """Mirrors the records of a run to W&B; no method raises, but each may wait for wandb's own process."""

    def __init__(
        self,
        config: WandbConfig,
        run_folder: Path,
        run_id: str,
        mode: str,
        report: Callable[[str], None],
        init_timeout_seconds: float,
        finish_timeout_seconds: float,
    ) -> None:
        self.mode = mode  # online | offline; offline also after a failed init
        self._config = config
        self._folder = run_folder
        self._run_id = run_id
        self._report = report
        self._init_timeout_seconds = init_timeout_seconds
        self._finish_timeout_seconds = finish_timeout_seconds
        self._run: Any = None
        self._blocks: dict[str, int] = {}  # of each source
        self._alerted: set[str] = set()  # what this attempt has sent an alert of
        self._loss_rise = math.inf  # the limit of every retention set

    def on_start(self, start: RunStart) -> None:
        self._blocks = {source.name: source.blocks for source in start.sources}
        limit = start.config.evaluate.forgetting
        self._loss_rise = math.inf if limit is None else limit.loss_rise
        if self.mode == "online":
            try:
                self._run = self._init(start, "online")
            except Exception as error:
                self._report(f"W&B: {_one_line(error)}; the run continues offline")
                self.mode = "offline"
                _close_service()
        if self._run is None:
            try:
                self._run = self._init(start, "offline")
            except Exception as error:
                self._report(f"W&B: not tracked, {_one_line(error)}")
                _close_service()
                return
        atexit.register(_close_service)  # for an attempt that is not told of its end; wandb's own hook has no limit
        if self.mode == "offline":
            path = shlex.quote(str(self._folder / WANDB))
            self._report(f"W&B: offline, run {self._run_id}; upload with: wandb sync {path}/offline-run-*")
        else:
            self._report(f"W&B: run {self._run_id} at {self._run.url}")
        self._guarded(self._define_axes)

    def on_step(self, record: StepRecord) -> None:
        epochs = record.epochs_by_source
        if epochs is None:
            totals = record.totals_by_source.items()
            epochs = {name: counts.blocks / self._blocks[name] for name, counts in totals if counts.blocks}
        row = {
            "train/loss": record.loss,
            "train/grad_norm": record.grad_norm,
            "train/skipped_total": record.skipped_total,
            "train/tokens": record.tokens,
            "train/batch_tokens": record.batch_tokens,
            "train/tokens_per_second": record.tokens_per_second,
            "train/step_seconds": record.step_seconds,
            "train/memory_gib": record.memory_gib,
            **record.efficiency_by_chart(),
            **{f"memory/{part}": size / 2**30 for part, size in (record.memory_bytes or {}).items()},
            **record.experts_by_chart(),
            **{f"lr/{group}": value for group, value in record.lr.items()},
            **{f"tokens/{source}": value for source, value in record.tokens_by_source.items()},
            **{f"epochs/{source}": value for source, value in epochs.items()},
        }
        self._log(record.step, record.attempt, row)
        if record.skipped:
            norm = "not finite" if record.grad_norm is None else f"{record.grad_norm:.3g}"
            self._alert("step dropped", f"step {record.step}: loss {record.loss:.4g}, gradient norm {norm}", "WARN")

    def on_evaluation(self, record: EvaluationRecord) -> None:
        measured = {"loss": record.loss, "perplexity": record.perplexity}
        measured |= {"bits_per_byte": record.bits_per_byte, "loss_rise": record.loss_rise}
        row = {f"eval/{record.name}/{key}": value for key, value in measured.items() if value is not None}
        row |= {f"eval/{record.name}/{score}": value for score, value in record.scores.items()}
        self._log(record.step, record.attempt, row)
        rise = record.loss_rise
        if record.role == "retention" and rise is not None and rise > self._loss_rise:
            text = f"step {record.step}: the loss on {record.name} is {rise:.3f} nats above that under the base"
            self._alert(f"forgetting {record.name}", text, "WARN")

    def on_checkpoint(self, record: CheckpointRecord) -> None:
        self._guarded(lambda: self._run.summary.update({"last_checkpoint_step": record.step}))
        if self._config.checkpoints:
            self._guarded(lambda: self._refer_to(record))

    def _refer_to(self, record: CheckpointRecord) -> None:
        """An artifact whose content is the folder's address; pruning removes the folder and not the entry."""
        place = (self._folder / CHECKPOINTS / Path(record.path).name).absolute()
        artifact = _wandb().Artifact(f"{self._run_id}-checkpoint", type="model", metadata={"step": record.step})
        artifact.add_reference(place.as_uri(), name=place.name, checksum=False)
        self._run.log_artifact(artifact, aliases=[place.name])

    def on_message(self, text: str) -> None:
        """Messages stay in the run folder."""

    def on_end(self, end: RunEnd) -> None:
        """Close the W&B run; an upload that outlasts its limit stays on disk for `wandb sync`."""
        if self._run is None:
            return
        code = 0 if end.exit_code in (EXIT_DONE, EXIT_STOPPED) else end.exit_code
        if end.exit_code != EXIT_DONE:
            word = EXIT_WORDS.get(end.exit_code, f"exit code {end.exit_code}")
            level = "INFO" if end.exit_code == EXIT_STOPPED else "ERROR"
            self._alert(word, f"step {end.step}: {end.reason}", level)
        self._guarded(lambda: self._run.summary.update({"exit_code": end.exit_code, "exit_reason": end.reason}))
        run, self._run = self._run, None
        upload_seconds = self._finish_timeout_seconds if self.mode == "online" else 0.0
        if run is not None and not _ends_within(upload_seconds + _GRACE_SECONDS, lambda: run.finish(code)):
            self._report(f"W&B: the upload did not finish; run later: wandb sync {run.settings.sync_dir}")
        _close_service()

    def abandon(self) -> None:
        """Kill wandb's own process, for which a thread has waited too long; later errors are not reported."""
        self._report = lambda text: None
        _kill_service()
        _close_service()

    def _init(self, start: RunStart, mode: str) -> Any:
        wandb = _wandb()
        wandb.setup(settings=wandb.Settings(silent=True))  # before init, which prints where it found the key
        recipe = without_secrets(start.config.model_dump(mode="json"))
        placement = {"engine_used": start.engine, "world_size": start.world_size, "device": start.device}
        settings = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=self._init_timeout_seconds,
            finish_timeout=self._finish_timeout_seconds,
            disable_git=True,
            disable_code=True,
            x_disable_machine_info=True,  # it contains the command line
            x_save_requirements=False,
        )
        return wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            name=start.config.name,
            group=group_of(self._folder, start.config.name),
            id=self._run_id,
            resume="allow",
            dir=str(self._folder),
            mode=mode,
            config=recipe | placement,
            settings=settings,
        )

    def _define_axes(self) -> None:
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def _log(self, step: int, attempt: int, row: dict[str, Any]) -> None:
        finite = {key: value for key, value in row.items() if value is not None and math.isfinite(value)}
        self._guarded(lambda: self._run.log({"step": step, "attempt": attempt} | finite))

    def _alert(self, title: str, text: str, level: str) -> None:
        """Once per attempt and title."""
        if self._config.alerts and title not in self._alerted:
            self._alerted.add(title)
            self._guarded(lambda: self._run.alert(title=title, text=str(without_secrets(text)), level=level))

    def _guarded(self, call: Callable[[], Any]) -> None:
        if self._run is None:
            return
        try:
            call()
        except Exception as error:
            self._run = None
            self._report(f"W&B: tracking ends here, {_one_line(error)}; metrics.jsonl continues")
            _close_service()


def login_state() -> dict[str, Any]:
    """Whether wandb is installed and finds credentials, and for which server; asks no server."""
    try:
        server = _wandb().setup(settings=_wandb().Settings(silent=True, mode="offline")).settings.base_url
    except ModuleNotFoundError:
        return {"installed": False}
    return {"installed": True, "credentials": _has_credentials(), "server": str(server)}


def without_secrets(value: Any) -> Any:
    """A copy of nested values without the values of secret environment variables and without URL passwords."""
    if isinstance(value, dict):
        return {key: without_secrets(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(child) for child in value]
    if not isinstance(value, str):
        return value
    for text in secret_values().values():
        value = value.replace(text, "[secret]")
    return re.sub(r"://[^/@\s]+@", "://[secret]@", value)


def _wandb() -> Any:
    import wandb  # late: half a second, and an optional extra

    return wandb


def _has_credentials() -> bool:
    """Whether wandb finds a key or an identity token for its server, or cannot tell: on_start then reports why.

    It may start a process and asks no server.
    """
    wandb = _wandb()
    found: list[bool] = []

    def ask() -> None:
        wandb.setup(settings=wandb.Settings(silent=True, mode="online"))  # a WANDB_MODE of offline would find none
        found.append(wandb.login(prompt=False, verify=False))  # raises on malformed ones

    if not _ends_within(_GRACE_SECONDS, ask):
        _kill_service()
    _close_service()
    return found != [False]


def _close_service() -> None:
    """End wandb's own process, so that it does not outlive the run."""
    atexit.unregister(_close_service)
    if not _ends_within(_GRACE_SECONDS, lambda: _wandb().teardown(0)):
        LOGGER.warning("W&B: its process does not end and is killed")
        _kill_service()


def _kill_service() -> None:
    """Kill the wandb-core processes that this process has started, frozen or not. Source: proc(5)."""
    for listed in Path("/proc/self/task").glob("*/children"):
        for pid in listed.read_text().split():
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text().startswith("wandb"):
                    os.kill(int(pid), signal.SIGKILL)


def _ends_within(seconds: float, call: Callable[[], Any]) -> bool:
    """Whether `call`, on a thread that may be left behind, returned or raised within `seconds`."""

    def run() -> None:
        # wandb's own log has the details; it calls sys.exit when it finds its process killed.
        with contextlib.suppress(Exception, SystemExit):
            call()

    thread = threading.Thread(target=run, daemon=True, name="wandb-close")
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def _one_line(error: Exception) -> str:
    text = " ".join(str(without_secrets(str(error))).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
