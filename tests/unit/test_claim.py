"""Who may train in a run folder: locks, tokens, heartbeats, and waiting for an attempt that is ending."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dist_cpt.config.load import build
from dist_cpt.config.resolve import resolve_paths
from dist_cpt.config.schema import RunConfig
from dist_cpt.errors import Superseded
from dist_cpt.health import rivals
from dist_cpt.health.heartbeats import Heartbeat, process_start, write_heartbeat
from dist_cpt.health.rivals import living, when_ended
from dist_cpt.run_folder.claim import Claim, Occupied, claim
from tests import tiny


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    for name in ("SLURM_JOB_ID", "DIST_CPT_JOB", "DIST_CPT_PREDECESSOR"):
        monkeypatch.delenv(name, raising=False)
    return resolve_paths(build(tiny.recipe(tmp_path / "b", tmp_path / "c", tmp_path / "r"), "x"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run/logs").mkdir(parents=True)
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "SIGN_SECONDS", 0.5)
    monkeypatch.setattr(rivals, "ENDING_SECONDS", 20.0)
    monkeypatch.setattr(rivals, "POLL_SECONDS", 0.02)


def heartbeat(**changes: object) -> Heartbeat:
    """Of a rank on another host, now."""
    beat = Heartbeat(0, "elsewhere", 7, 1, 0, 3, "training", "", time.time(), 0.0)
    return replace(beat, **changes)  # type: ignore[arg-type]


@pytest.fixture
def beating(folder: Path) -> Iterator[None]:
    """A rank that lives on another host."""
    leave = threading.Event()

    def beat() -> None:
        while not leave.wait(0.05):
            write_heartbeat(folder, heartbeat())

    write_heartbeat(folder, heartbeat())
    thread = threading.Thread(target=beat)
    thread.start()
    yield
    leave.set()
    thread.join()


# -- a file system without locks -------------------------------------------------------------------------------


@pytest.fixture(params=["ENOSYS", "EOPNOTSUPP", "ENOLCK"])
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    number = getattr(errno, request.param)

    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_without_locks_the_token_decides(no_locks, config: RunConfig, folder: Path) -> None:
    first = claim(folder, config, "id", living)
    second = claim(folder, config, "id", living)
    assert (first.lock, second.attempt) == (None, 1)
    assert second.is_current()
    with pytest.raises(Superseded, match="attempt 1"):
        first.write("certificate.json", {})
    second.close()


def test_without_locks_a_living_attempt_is_refused(no_locks, beating, config, folder, monkeypatch) -> None:
    monkeypatch.setattr(rivals, "SIGN_SECONDS", 60.0)
    with pytest.raises(Occupied) as refused:
        claim(folder, config, "id", living)
    assert refused.value.exit_code == 64


def test_without_locks_a_living_attempt_of_the_same_job_is_overtaken(
    no_locks, beating, config: RunConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    first = claim(folder, config, "id")
    assert claim(folder, config, "id", living).is_current()
    assert not first.is_current()


def test_without_locks_a_dead_attempt_is_no_obstacle(no_locks, config: RunConfig, folder: Path) -> None:
    write_heartbeat(folder, heartbeat())  # a moment ago, and no more
    assert claim(folder, config, "id", living).is_current()


def test_a_process_of_this_host_is_found_at_once_and_one_that_is_gone_is_not(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(rivals, "SIGN_SECONDS", 60.0)
    here = {"host": socket.gethostname(), "pid": os.getpid(), "started": process_start(os.getpid())}
    write_heartbeat(folder, heartbeat(**here))
    assert living(folder) is not None
    write_heartbeat(folder, heartbeat(**here, ended=True))
    assert living(folder) is None


def test_a_lock_that_cannot_be_asked_for_is_no_other_process(config: RunConfig, folder: Path, monkeypatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(Exception, match=os.strerror(errno.EIO)) as refused:
        claim(folder, config, "id")
    assert getattr(refused.value, "exit_code", None) == 73


# -- an attempt that is ending ---------------------------------------------------------------------------------


def test_an_attempt_that_was_told_to_stop_is_waited_for(config: RunConfig, folder: Path, capfd) -> None:
    ending = claim(folder, config, "id")
    write_heartbeat(folder, heartbeat(stopping="SIGTERM"))
    saved = threading.Timer(1.0, ending.close)  # longer than a living one would be watched
    saved.start()
    taken: Claim = when_ended(folder, lambda: claim(folder, config, "id"))
    assert taken.attempt == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert str(folder) in line
    saved.join()
    taken.close()


def test_an_attempt_that_goes_on_training_is_refused_after_two_heartbeats(beating, config, folder, monkeypatch) -> None:
    monkeypatch.setattr(rivals, "SIGN_SECONDS", 60.0)
    held = claim(folder, config, "id")
    with pytest.raises(Occupied):
        when_ended(folder, lambda: claim(folder, config, "id"))
    held.close()


def test_one_that_is_frozen_is_refused_at_once(config: RunConfig, folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(rivals, "SIGN_SECONDS", 60.0)
    held = claim(folder, config, "id")
    with subprocess.Popen(["sleep", "60"]) as process:
        process.send_signal(signal.SIGSTOP)
        here = {"host": socket.gethostname(), "pid": process.pid, "started": process_start(process.pid)}
        write_heartbeat(folder, heartbeat(**here))
        with pytest.raises(Occupied):
            when_ended(folder, lambda: claim(folder, config, "id"))
        process.kill()
    held.close()


def test_an_end_that_does_not_come_is_not_waited_for_for_ever(config: RunConfig, folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(rivals, "ENDING_SECONDS", 0.3)
    held = claim(folder, config, "id")
    write_heartbeat(folder, heartbeat(stopping="SIGTERM"))
    with pytest.raises(Occupied):
        when_ended(folder, lambda: claim(folder, config, "id"))
    held.close()


# -- a launcher that is killed ---------------------------------------------------------------------------------


def test_a_rank_whose_launcher_is_killed_is_told_to_stop(tmp_path: Path) -> None:
    received, ready = tmp_path / "received", tmp_path / "ready"
    rank = (
        "import sys, time, pathlib; from dist_cpt.runtime.stop import StopRequest; stop = StopRequest().install()\n"
        "pathlib.Path(sys.argv[2]).touch()\n"
        "while not stop.requested: time.sleep(0.01)\n"
        "open(sys.argv[1], 'w').write(stop.requested)"
    )
    launcher = (
        "import sys; from pathlib import Path; from dist_cpt_launch.local import run_local\n"
        "from dist_cpt_launch.launch_plan import LaunchPlan\n"
        "run_local(LaunchPlan((sys.executable, '-c', *sys.argv[1:]), {}, Path(sys.argv[-1]).parent))"
    )
    with subprocess.Popen([sys.executable, "-c", launcher, rank, str(received), str(ready)]) as process:
        until = time.monotonic() + 30.0
        while not ready.exists() and time.monotonic() < until:
            time.sleep(0.02)
        process.kill()
    until = time.monotonic() + 10.0
    while not (received.exists() and received.read_text()) and time.monotonic() < until:
        time.sleep(0.02)
    assert received.read_text() == "SIGTERM"
