"""The runtime in one process: signals, logs, seeds, collectives of one."""

from __future__ import annotations

import logging
import os
import random
import resource
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dist_cpt.errors import ConfigError, DistCptError, HangError, MissingExtraError, NumericsError
from dist_cpt.run_folder.names import log_file
from dist_cpt.runtime import collectives
from dist_cpt.runtime.env import ProcessEnv
from dist_cpt.runtime.log import LOGGER, close_log, open_log
from dist_cpt.runtime.mesh import init_distributed, shutdown
from dist_cpt.runtime.seed import seed_step
from dist_cpt.runtime.stop import SIGNALS, StopRequest


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_sets_the_flag_and_nothing_else(name: str) -> None:
    signal.signal(signal.Signals[name], signal.SIG_DFL if name != "SIGINT" else signal.default_int_handler)
    before = {other: signal.getsignal(signal.Signals[other]) for other in SIGNALS}
    with StopRequest() as stop:
        assert stop.requested is None
        os.kill(os.getpid(), signal.Signals[name])
        assert stop.requested == name
        for _ in range(2):  # an impatient second Ctrl-C
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested == name
    assert {other: signal.getsignal(signal.Signals[other]) for other in SIGNALS} == before


def test_light_modules_load_no_torch() -> None:
    code = (
        "import sys, dist_cpt.runtime.env, dist_cpt.runtime.stop, dist_cpt.runtime.log\n"
        "sys.exit(1 if {'torch', 'numpy'} & set(sys.modules) else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_log_lines_name_the_rank_and_warnings_are_caught(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        open_log(log_file(tmp_path, 1), 1)
        open_log(log_file(tmp_path, 3), 3)
        LOGGER.info("saved %d", 10)
        LOGGER.warning("slow disk")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("from a library", UserWarning, stacklevel=1)
    finally:
        close_log()
    text = (tmp_path / "logs" / "rank-3.log").read_text()
    assert "rank 3 INFO saved 10" in text
    assert "from a library" in text
    assert (tmp_path / "logs" / "rank-1.log").read_text() == ""
    shown = capsys.readouterr().err
    assert "rank 3 WARNING slow disk" in shown
    assert "saved 10" not in shown
    assert logging.getLogger("py.warnings").propagate


def draw() -> tuple[float, float, float]:
    return torch.rand(1).item(), float(np.random.rand()), random.random()


def test_randomness_is_a_function_of_three_integers() -> None:
    seen = {}
    for triple in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (2**63 - 1, 10**9, 4095)):
        seed_step(*triple)
        seen[triple] = draw()
    assert len(set(seen.values())) == len(seen)
    for triple, values in seen.items():
        seed_step(*triple)
        assert draw() == values


def test_a_world_of_one_binds_no_port() -> None:
    env = ProcessEnv(0, 0, 1, 1, "alone")
    device = init_distributed(env, timeout_seconds=10)
    try:
        assert dist.is_initialized()
        assert init_distributed(env, timeout_seconds=10) == device  # already there
        with pytest.raises(ConfigError, match="rank 0 of 1"):
            init_distributed(ProcessEnv(1, 0, 2, 1, "torchrun", ("localhost", 1)), timeout_seconds=10)
        listening = Path("/proc/net/tcp").read_text().splitlines()[1:]
        inodes = {line.split()[9] for line in listening if line.split()[3] == "0A"}
        own = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd)}
        # gloo itself listens on one ephemeral port for peers that a world of one has not got
        assert sum(f"socket:[{inode}]" in own for inode in inodes) <= 1
    finally:
        shutdown()
    assert not dist.is_initialized()


def test_every_open_file_that_the_system_grants_may_be_used() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        init_distributed(ProcessEnv(0, 0, 1, 1, "alone"), timeout_seconds=10)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        shutdown()
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def _is_open(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def test_collectives_of_one_without_a_group() -> None:
    assert (collectives.rank(), collectives.world_size()) == (0, 1)
    assert collectives.all_reduce_ints([1, 2**62]) == [1, 2**62]
    assert collectives.all_reduce_max_int(-3) == -3
    assert collectives.broadcast_json({"a": [1, None]}) == {"a": [1, None]}
    assert collectives.gather_json("é") == ["é"]
    collectives.barrier()
    collectives.agree(None, "nothing")


@pytest.mark.parametrize(
    ("error", "cls", "text"),
    [
        (NumericsError("loss is nan", remedy="lower lr"), NumericsError, "loss is nan -- lower lr"),
        (MissingExtraError("ZeRO", "zero"), MissingExtraError, "ZeRO needs the extra 'zero'"),
        (ValueError("odd"), DistCptError, "ValueError: odd"),
        (KeyboardInterrupt(), DistCptError, "KeyboardInterrupt"),
    ],
)
def test_agree_raises_the_same_kind_of_error(error: BaseException, cls: type, text: str) -> None:
    with pytest.raises(cls) as caught:
        collectives.agree(error, "save")
    assert type(caught.value) is cls
    assert str(caught.value).startswith(text)


def test_ranks_that_do_not_meet_get_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # srun's way in: the variables that torch reads are exported by us
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(key, "")
    with pytest.raises(HangError, match=rf"rank 1 .*{port}.* 1 s") as caught:
        init_distributed(ProcessEnv(1, 0, 2, 1, "srun", ("127.0.0.1", port)), timeout_seconds=1)
    assert "\n" not in str(caught.value)
    assert os.environ["WORLD_SIZE"] == "2"
    assert not dist.is_initialized()
