"""W&B: same run after a resume, offline without a key or a server, no secrets, no failure that stops training."""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb

from dist_cpt.config.schema import WandbConfig
from dist_cpt.errors import ConfigError, MissingExtraError
from dist_cpt.run_folder.records import RunEnd
from dist_cpt.train.queued import QueuedObserver
from dist_cpt.train.wandb import new_run_id, wandb_observer, without_secrets
from tests.wandb_session import record, services, start, train_a_little

KEY = "0123456789abcdef" * 2 + "deadbeef"
CLOSED = "http://127.0.0.1:9"
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setattr(wandb, "run", None)  # of an earlier test whose service was killed
    yield
    remaining = services()
    for pid in remaining:
        os.kill(pid, signal.SIGKILL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # wandb 0.31 does not wait for a service that was killed
        gc.collect()
    assert remaining == [], "a wandb process outlived the test"


def written(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_two_offline_sessions_share_one_run_id(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    run_id = new_run_id()
    messages: list[str] = []
    for first in (1, 3):
        observer = wandb_observer(WandbConfig(mode="auto", project="law"), folder, run_id, messages.append)
        assert observer is not None
        train_a_little(observer, folder, first)
        for session in (folder / "wandb").glob("offline-run-2*"):  # wandb names folders by the second
            session.rename(session.with_name(f"offline-run-session-{first}-{run_id}"))
    sessions = sorted(path.name for path in (folder / "wandb").glob("offline-run-*"))
    assert len(sessions) == 2
    assert all(name.endswith(f"-{run_id}") for name in sessions)
    assert all((folder / "wandb" / name / f"run-{run_id}.wandb").stat().st_size > 0 for name in sessions)
    assert b"train/tokens_per_second" in written(folder)
    assert b"eval/law/perplexity" in written(folder)
    assert b"epochs/law" in written(folder)
    assert [line.split(";")[0] for line in messages] == [f"W&B: offline, run {run_id}"] * 2
    assert capfd.readouterr() == ("", "")


def test_run_ids_are_short_and_differ() -> None:
    ids = {new_run_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(len(run_id) == 8 and int(run_id, 16) >= 0 for run_id in ids)


def test_unreachable_server_ends_offline_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", CLOSED)
    messages: list[str] = []
    observer = wandb_observer(WandbConfig(), tmp_path, "0a1b2c3d", messages.append, init_timeout_seconds=1.0)
    assert observer is not None
    assert observer.mode == "online"
    began = time.monotonic()
    train_a_little(observer, tmp_path)
    assert time.monotonic() - began < 15
    assert observer.mode == "offline"
    assert messages[0].startswith("W&B: CommError: ")
    assert "offline" in messages[0]
    assert len(messages) == 2
    assert list((tmp_path / "wandb").glob("offline-run-*-0a1b2c3d"))
    assert capfd.readouterr() == ("", "")
    assert KEY.encode() not in written(tmp_path)


def test_a_malformed_key_ends_offline_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "short-secret")
    monkeypatch.setenv("WANDB_BASE_URL", CLOSED)
    messages: list[str] = []
    observer = wandb_observer(WandbConfig(), tmp_path, "0a1b2c3d", messages.append, init_timeout_seconds=1.0)
    assert observer is not None
    train_a_little(observer, tmp_path)
    assert "offline" in messages[0]
    assert "short-secret" not in "".join(messages)


def test_a_service_that_dies_costs_one_line_and_no_step(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    messages: list[str] = []
    observer = wandb_observer(
        WandbConfig(mode="offline"), tmp_path, "0a1b2c3d", messages.append, finish_timeout_seconds=1.0
    )
    assert observer is not None
    observer.on_start(start(tmp_path))
    (service,) = services()
    os.kill(service, signal.SIGKILL)
    deadline = time.monotonic() + 10
    step = 0
    while len(messages) < 2 and time.monotonic() < deadline:
        step += 1
        observer.on_step(record(step))
        time.sleep(0.01)
    for _ in range(3):
        observer.on_step(record(step))
    observer.on_end(RunEnd(0, "done", step))
    assert len(messages) == 2, messages
    assert "metrics.jsonl" in messages[1]


def test_behind_the_queue_all_rows_arrive(tmp_path: Path) -> None:
    said: list[str] = []
    observer = wandb_observer(WandbConfig(mode="offline"), tmp_path, "0a1b2c3d", said.append)
    assert observer is not None
    behind = QueuedObserver("W&B", observer, observer.abandon, said.append)
    behind.on_start(start(tmp_path))
    for step in range(1, 101):
        behind.on_step(record(step, loss=1000.5 + step))
    behind.on_end(RunEnd(0, "done", 100))
    assert len(said) == 1, said
    (log,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    content = log.read_bytes()
    places = [content.find(f"{1000.5 + step}".encode()) for step in range(1, 101)]
    assert -1 not in places
    assert places == sorted(places)


FROZEN = """
import os, signal, sys, time
from pathlib import Path
from dist_cpt.config.schema import WandbConfig
from dist_cpt.run_folder.records import RunEnd
from dist_cpt.train.queued import QueuedObserver
from dist_cpt.train.wandb import wandb_observer
from tests.wandb_session import record, services, start
folder, told = Path(sys.argv[1]), sys.argv[2] == "told"
started = []
observer = wandb_observer(WandbConfig(mode="offline"), folder, "0a1b2c3d", started.append)
behind = QueuedObserver("W&B", observer, observer.abandon, print, max_waiting=20, stall_seconds=2.0)
behind.on_start(start(folder))
while not started:
    time.sleep(0.05)
os.kill(*services(), signal.SIGSTOP)
for step in range(1, 801):  # on this thread: one that waited would hold up the test for ever
    behind.on_step(record(step))
    time.sleep(0.002)  # so that the service's socket fills up
if told:
    behind.on_end(RunEnd(0, "done", 800))
"""


@pytest.mark.parametrize("end", ["told", pytest.param("untold", marks=pytest.mark.matrix)])
def test_a_frozen_service_holds_up_neither_a_step_nor_the_exit_and_what_it_missed_is_counted(
    tmp_path: Path, end: str
) -> None:
    # A service that is left behind would hold the pipe open.
    command = [sys.executable, "-c", FROZEN, str(tmp_path), end]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=120, check=True)
    if end == "told":
        assert 100 < int(re.findall(r"(\d+) records were dropped", ended.stdout)[0]) < 800


def test_an_observer_that_fails_behind_the_queue_is_named_by_the_next_record(tmp_path: Path) -> None:
    class Failing(QueuedObserver):
        def on_step(self, record: object) -> None:
            raise OSError("gone")

    said: list[str] = []
    behind = QueuedObserver("it", Failing("", None, print, print), print, said.append)  # type: ignore[arg-type]
    behind.on_step(record(1))
    time.sleep(0.5)
    with pytest.raises(OSError, match="gone"):
        behind.on_step(record(2))
    with pytest.raises(OSError, match="gone"):
        behind.on_end(RunEnd(0, "done", 1000))


def test_a_login_that_never_answers_does_not_hold_up_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_cpt.train.wandb._GRACE_SECONDS", 0.5)
    monkeypatch.setattr(wandb, "login", lambda **_: threading.Event().wait())
    observer = wandb_observer(WandbConfig(), tmp_path, "0a1b2c3d", print)
    assert observer is not None
    assert observer.mode == "online"


def test_no_secret_reaches_the_run_folder(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from dist_cpt.config.schema import WandbConfig
from dist_cpt.train.wandb import wandb_observer
from tests.wandb_session import train_a_little
sys.argv += ["--password", "argv-sentinel-1234"]
folder = Path(sys.argv[1])
train_a_little(wandb_observer(WandbConfig(), folder, "0a1b2c3d", print), folder)
"""
    environment = {
        "HF_TOKEN": "env-sentinel-1234",
        "WANDB_API_KEY": KEY,
        "WANDB_MODE": "offline",
        "PYTHONPATH": str(ROOT),
    }
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, env=os.environ | environment, timeout=60)
    content = written(tmp_path)
    assert b"micro_batch" in content  # the recipe is there
    for sentinel in (b"argv-sentinel-1234", b"env-sentinel-1234", KEY.encode()):
        assert sentinel not in content


def test_secret_values_are_removed_from_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "sesame-sesame")
    recipe = {"a": ["x-sesame-sesame-y", 3, None], "b": {"url": "https://me:pw@host/x"}}
    assert without_secrets(recipe) == {"a": ["x-[secret]-y", 3, None], "b": {"url": "https://[secret]@host/x"}}


def test_disabled_by_the_recipe_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert wandb_observer(WandbConfig(mode="disabled"), tmp_path, "0a1b2c3d", pytest.fail) is None
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_observer(WandbConfig(), tmp_path, "0a1b2c3d", pytest.fail) is None


def test_mode_auto_uses_a_key_in_netrc_for_its_host_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mode() -> str:
        observer = wandb_observer(WandbConfig(), tmp_path, "0a1b2c3d", pytest.fail)
        assert observer is not None
        return observer.mode

    (Path(os.environ["HOME"]) / ".netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    assert mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert mode() == "offline"
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_BASE_URL", CLOSED)
    assert mode() == "offline"
    monkeypatch.delenv("WANDB_BASE_URL")
    settings = Path(os.environ["HOME"]) / ".config" / "wandb" / "settings"
    settings.parent.mkdir(parents=True)
    settings.write_text("[default]\nbase_url = https://wandb.example.org\n")
    assert mode() == "offline"


def test_online_without_a_key_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"track\.wandb\.mode.*WANDB_API_KEY"):
        wandb_observer(WandbConfig(mode="online"), tmp_path, "0a1b2c3d", pytest.fail)


def test_the_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    messages: list[str] = []
    assert wandb_observer(WandbConfig(mode="auto"), tmp_path, "0a1b2c3d", messages.append) is None
    assert len(messages) == 1
    assert "extra 'wandb' is not installed" in messages[0]
    for mode in ("online", "offline"):
        with pytest.raises(MissingExtraError, match=r"dist-cpt\[wandb\]"):
            wandb_observer(WandbConfig(mode=mode), tmp_path, "0a1b2c3d", messages.append)  # type: ignore[arg-type]
