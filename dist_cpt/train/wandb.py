"""Weights & Biases as an observer that may fail without touching the training.

The only file that imports wandb, and only when a run wants it. metrics.jsonl is the record; W&B is a view of it.

A resumed run continues the W&B run of the same id (`resume="allow"`). W&B's history only grows: rows that a
resume rewound stay in it, and the steps that are trained again are added behind them. Rows are therefore
logged without W&B's own step counter, which drops everything below its highest value, and carry `step` and
`attempt` as metrics, with `step` as the axis of every chart: a repeated step is two points at one abscissa,
told apart by `attempt`. Offline, each attempt is one folder; `wandb sync <run folder>/wandb/offline-run-*`
uploads them, in the order they were written, into the one run.

What leaves the machine: the recipe, the records, system metrics. Not the command line, the environment, the
code, its git state or the console output.
"""

from __future__ import annotations

import configparser
import contextlib
import math
import netrc
import os
import re
import secrets
import shlex
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dist_cpt.config.schema import WandbConfig
from dist_cpt.errors import EXIT_DONE, EXIT_STOPPED, ConfigError, MissingExtraError
from dist_cpt.run_folder.records import CheckpointRecord, EvaluationRecord, RunEnd, RunStart, StepRecord
from dist_cpt.runtime.secret_values import secret_values

_ENV_MODES = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}
_GRACE_SECONDS = 15.0  # for wandb's own process to end after its own limit


def new_run_id() -> str:
    """A random W&B run id, 8 hex digits; made once per run and kept in its checkpoints."""
    return secrets.token_hex(4)


def wandb_observer(
    config: WandbConfig,
    run_folder: Path,
    run_id: str,
    say: Callable[[str], None],
    *,
    init_timeout_seconds: float = 30.0,
    finish_timeout_seconds: float = 60.0,
) -> WandbObserver | None:
    """The observer that `track.wandb` asks for, or None; `say` takes the one line when W&B is not as hoped.

    Mode auto follows the environment's WANDB_MODE, else it is online with a key for the server and offline
    without one.

    Raises:
        MissingExtraError: mode online or offline, and wandb is not installed.
        ConfigError: mode online, and there is no key for the server.
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
        say("W&B: not tracked, the extra 'wandb' is not installed (pip install 'dist-cpt[wandb]')")
        return None
    hosts = _hosts()
    if mode == "auto":
        mode = "online" if _has_key(hosts) else "offline"
    elif mode == "online" and not _has_key(hosts):
        raise ConfigError(
            f"W&B is to be online, but there is no key for {hosts[0]}",
            remedy="export WANDB_API_KEY, run `wandb login`, or use track.wandb.mode auto or offline",
        )
    return WandbObserver(config, run_folder, run_id, mode, say, init_timeout_seconds, finish_timeout_seconds)


class WandbObserver:
    """Mirrors the records of a run to W&B; whatever W&B does, no method raises or stalls for long."""

    def __init__(
        self,
        config: WandbConfig,
        run_folder: Path,
        run_id: str,
        mode: str,  # online | offline
        say: Callable[[str], None],
        init_timeout_seconds: float,
        finish_timeout_seconds: float,
    ) -> None:
        self.mode = mode
        self._config = config
        self._folder = run_folder
        self._run_id = run_id
        self._say = say
        self._init_timeout_seconds = init_timeout_seconds
        self._finish_timeout_seconds = finish_timeout_seconds
        self._run: Any = None

    def on_start(self, start: RunStart) -> None:
        if self.mode == "online":
            try:
                self._run = self._init(start, "online")
            except Exception as error:
                self._say(f"W&B: {_one_line(error)}; the run goes on offline")
                self.mode = "offline"
                self._close_service()
        if self._run is None:
            try:
                self._run = self._init(start, "offline")
            except Exception as error:
                self._say(f"W&B: not tracked, {_one_line(error)}")
                self._close_service()
                return
        if self.mode == "offline":
            path = shlex.quote(f"{self._folder}/wandb")
            self._say(f"W&B: offline, run {self._run_id}; upload with: wandb sync {path}/offline-run-*")
        else:
            self._say(f"W&B: run {self._run_id} at {self._run.url}")
        self._guarded(self._define_axes)

    def on_step(self, record: StepRecord) -> None:
        row = {
            "train/loss": record.loss,
            "train/grad_norm": record.grad_norm,
            "train/skipped_total": record.skipped_total,
            "train/tokens": record.tokens,
            "train/tokens_per_second": record.tokens_per_second,
            "train/step_seconds": record.step_seconds,
            "train/memory_gib": record.memory_gib,
            **{f"lr/{group}": value for group, value in record.lr.items()},
            **{f"tokens/{source}": value for source, value in record.tokens_by_source.items()},
            **{f"train/{name}": value for name, value in record.extra.items()},
        }
        self._log(record.step, record.attempt, row)

    def on_evaluation(self, record: EvaluationRecord) -> None:
        row = {f"eval/{record.name}/loss": record.loss, f"eval/{record.name}/perplexity": record.perplexity}
        row |= {f"eval/{record.name}/{score}": value for score, value in record.scores.items()}
        self._log(record.step, record.attempt, row)

    def on_checkpoint(self, record: CheckpointRecord) -> None:
        self._guarded(lambda: self._run.summary.update({"last_checkpoint_step": record.step}))

    def on_message(self, text: str) -> None:
        """Messages stay in the run folder."""

    def on_end(self, end: RunEnd) -> None:
        """Close the W&B run; an upload that outlasts its limit stays on disk for `wandb sync`."""
        if self._run is None:
            return
        code = 0 if end.exit_code in (EXIT_DONE, EXIT_STOPPED) else end.exit_code
        self._guarded(lambda: self._run.summary.update({"exit_code": end.exit_code, "exit_reason": end.reason}))
        run, self._run = self._run, None
        if run is not None and not _within(self._finish_timeout_seconds + _GRACE_SECONDS, lambda: run.finish(code)):
            self._say(f"W&B: the upload did not finish; later: wandb sync {run.settings.sync_dir}")
        self._close_service()

    def _init(self, start: RunStart, mode: str) -> Any:
        wandb = _wandb()
        wandb.setup(settings=wandb.Settings(silent=True))  # before init, which announces where it found the key
        recipe = without_secrets(start.config.model_dump(mode="json"))
        placement = {"engine_used": start.engine, "world_size": start.world_size, "device": start.device}
        settings = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=self._init_timeout_seconds,
            finish_timeout=self._finish_timeout_seconds,
            disable_git=True,
            disable_code=True,
            x_disable_machine_info=True,  # it holds the command line
            x_save_requirements=False,
        )
        return wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            name=start.config.name,
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

    def _guarded(self, call: Callable[[], Any]) -> None:
        if self._run is None:
            return
        try:
            call()
        except Exception as error:
            self._run = None
            self._say(f"W&B: tracking ends here, {_one_line(error)}; metrics.jsonl goes on")
            self._close_service()

    def _close_service(self) -> None:
        """End wandb's own process, so that none outlives the run."""
        if not _within(_GRACE_SECONDS, lambda: _wandb().teardown(0)):
            self._say("W&B: its process does not end; it is left alone")


def without_secrets(value: Any) -> Any:
    """A copy of nested values in which the values of secret environment variables and URL passwords are cut."""
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


def _hosts() -> list[str]:
    """Names under which the server's key may stand; asking wandb itself would start its process."""
    url = os.environ.get("WANDB_BASE_URL")
    if not url:
        folder = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
        settings = configparser.ConfigParser(interpolation=None)
        with contextlib.suppress(configparser.Error, OSError, UnicodeDecodeError):
            settings.read(folder / "settings")  # where `wandb login --host` notes it; may be absent
        url = settings.get("default", "base_url", fallback=None)
    # since 0.31 the default has a second name, and keys stand under the first
    return [urlsplit(url).netloc] if url else ["api.wandb.ai", urlsplit(_wandb().Settings().base_url).netloc]


def _has_key(hosts: list[str]) -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    named = os.environ.get("NETRC")
    files = [Path(name).expanduser() for name in ([named] if named else ["~/.netrc", "~/_netrc"])]
    path = next((path for path in files if path.exists()), None)  # like wandb, the first file there is
    if path is None:
        return False
    try:
        entries = [netrc.netrc(str(path)).authenticators(host) for host in hosts]
    except (OSError, netrc.NetrcParseError):
        return False
    return any(entry and entry[2] for entry in entries)


def _within(seconds: float, call: Callable[[], Any]) -> bool:
    """Run `call` in a thread that may be left behind; True if it ended in time, however it ended."""

    def quietly() -> None:
        try:
            call()
        except Exception:
            return  # the run is over for W&B either way; its own log has the details

    thread = threading.Thread(target=quietly, daemon=True, name="wandb-close")
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def _one_line(error: Exception) -> str:
    text = " ".join(str(without_secrets(str(error))).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
