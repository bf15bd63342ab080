"""A run that hangs ends with its stacks and names the ranks at fault; loss spikes are detected."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from dist_cpt.config.load import build, parse_yaml
from dist_cpt.config.resolve import differences, fingerprint, to_yaml
from dist_cpt.config.schema import HangConfig, SpikeConfig
from dist_cpt.errors import ConfigError, HangError
from dist_cpt.health.culprits import culprits, frozen_ranks
from dist_cpt.health.heartbeats import (
    STACKS_SIGNAL,
    Heartbeat,
    process_start,
    process_state,
    read_heartbeats,
    send_signal,
    write_heartbeat,
)
from dist_cpt.health.spikes import SpikeWindow, limit_on_device, verdict
from dist_cpt.health.watchdog import Watchdog, collective_seconds, limit_seconds
from dist_cpt.run_folder.names import heartbeat_file
from dist_cpt.runtime.env import ProcessEnv

ROOT = Path(__file__).parents[2]

# -- ranks as processes: each runs one of these functions, which its stack must name ----------------------------

RANK = """
import os, re, resource, sys, threading, time
from datetime import timedelta
from pathlib import Path

from dist_cpt.config.schema import HangConfig
from dist_cpt.errors import HangError
from dist_cpt.health.watchdog import Watchdog
from dist_cpt.runtime.env import ProcessEnv
from dist_cpt.runtime.liveness import made_progress

LIMITS = HangConfig(factor=2.0, min_seconds=2.0, grace_seconds=1.5, other_phase_seconds=60.0)
IN_PIECES = HangConfig(min_seconds=4.0, grace_seconds=1.5, other_phase_seconds=4.0)


def sleeps(folder):
    time.sleep(600)


def is_superseded(folder):
    (folder / "run.json").write_text('{"attempts": 2}')
    time.sleep(600)


def holds_the_lock(folder):
    re.match(r"(a+)+$", "a" * 60 + "b")


def is_out_of_disk(folder):
    time.sleep(1.0)  # for a heartbeat
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    watchdog.tick("training", 6)
    time.sleep(600)


def cannot_write_heartbeats(folder):
    from dist_cpt.health import watchdog as health

    health.write_heartbeat = lambda folder, beat: time.sleep(600)  # as on a file server that is gone
    time.sleep(600)


def makes_progress(folder):
    for step in range(6, 81):
        time.sleep(0.05)
        watchdog.tick("training", step)


def reads_from_its_peer(folder):
    watchdog.tick("starting", 5)
    with open(folder / "fifo", "rb", buffering=0) as peer:
        for step in range(6, 10**6):
            peer.read(1)
            watchdog.tick("training", step)


def writes(folder, until=10**6):
    watchdog.tick("starting", 5)
    with open(folder / "fifo", "wb", buffering=0) as peer:
        for step in range(6, until):
            peer.write(b".")
            watchdog.tick("training", step)
            time.sleep(0.02)
        holds_the_lock(folder)


def writes_a_while(folder):
    writes(folder, until=30)


def reduces(folder, forever=True):
    watchdog.tick("starting", 5)
    import torch
    import torch.distributed as dist

    store = dist.FileStore(str(folder / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    for step in range(6, 10**6 if forever else 20):
        dist.all_reduce(torch.ones(8))
        watchdog.tick("training", step)
    sleeps(folder)


def stops_reducing(folder):
    reduces(folder, forever=False)


def meets_its_peer(folder):
    watchdog.tick("evaluating", 5)
    (folder / f"here-{rank}").touch()
    while len(list(folder.glob("here-*"))) < world_size:
        time.sleep(0.05)
        made_progress()


def works_in_pieces(folder):
    meets_its_peer(folder)
    for _ in range(80):
        time.sleep(0.1)
        made_progress()
    (folder / "worked").touch()


def works_in_pieces_and_stalls(folder):
    works_in_pieces(folder)
    sleeps(folder)


def waits_for_pieces_of_its_peer(folder):
    meets_its_peer(folder)
    while not (folder / "worked").exists():
        time.sleep(0.05)


def trains_beside_pieces(folder):
    def work():
        while True:
            time.sleep(0.1)
            made_progress()

    threading.Thread(target=work, daemon=True).start()
    sleeps(folder)


folder, rank, world_size, attempt = Path(sys.argv[1]), *map(int, sys.argv[2:5])
env = ProcessEnv(rank, rank, world_size, world_size, "environment")
try:
    limits = IN_PIECES if "pieces" in sys.argv[5] else LIMITS
    with Watchdog(folder, env, attempt, limits, (folder / f"reason-{rank}").write_text) as watchdog:
        for step in range(1, 6):
            watchdog.tick("training", step)
            time.sleep(0.01)
        globals()[sys.argv[5]](folder)
        watchdog.tick("ending", 100)
except HangError:  # a peer ended the run first
    sys.exit(72)
"""


class Ranks:
    """The processes of one small job."""

    def __init__(self, folder: Path, *functions: str, attempt: int = 0) -> None:
        self.folder = folder
        if "reads_from_its_peer" in functions:
            os.mkfifo(folder / "fifo")
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", RANK, str(folder), str(rank), str(len(functions)), str(attempt), function],
                env=environment,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank, function in enumerate(functions)
        ]

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.communicate()

    def wait_for_step(self, rank: int, step: int, seconds: float = 60.0) -> Heartbeat:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for beat in read_heartbeats(self.folder):
                if beat.rank == rank and beat.step >= step:
                    return beat
            time.sleep(0.05)
        raise AssertionError(f"rank {rank} did not reach step {step}")

    def end(self, seconds: float = 90.0) -> tuple[list[int], list[str]]:
        """(exit codes, stderr) by rank; all must have ended by themselves within `seconds`."""
        until = time.monotonic() + seconds
        errors = [process.communicate(timeout=max(0.1, until - time.monotonic()))[1] for process in self.processes]
        return [process.returncode for process in self.processes], errors

    def text(self, name: str) -> str:
        return (self.folder / name).read_text()

    def exit(self) -> dict:
        return json.loads(self.text("exit.json"))


@pytest.fixture(scope="module")
def unattended(tmp_path_factory):
    """Jobs without interaction, by the function of their last rank; all start at once, since they mostly wait."""
    jobs = [
        ("holds_the_lock",),
        ("is_superseded",),
        ("cannot_write_heartbeats",),
        ("reads_from_its_peer", "writes_a_while"),
        ("reduces", "stops_reducing"),
        ("works_in_pieces_and_stalls", "works_in_pieces_and_stalls"),
        ("works_in_pieces", "waits_for_pieces_of_its_peer"),
        ("waits_for_pieces_of_its_peer", "works_in_pieces"),
        ("trains_beside_pieces",),
    ]
    with ExitStack() as stack:
        ranks = {job[-1]: Ranks(tmp_path_factory.mktemp("job"), *job) for job in jobs}
        for started in ranks.values():
            stack.callback(started.close)
        yield ranks


@pytest.fixture
def start(tmp_path, unattended):
    """Start the ranks of one job; those that outlive the test are killed."""
    with ExitStack() as stack:

        def begin(*functions: str, attempt: int = 0) -> Ranks:
            ranks = Ranks(tmp_path, *functions, attempt=attempt)
            stack.callback(ranks.close)
            return ranks

        yield begin


def test_a_sleeping_main_thread_ends_with_72_and_its_stack(start):
    ranks = start("sleeps")
    ranks.wait_for_step(0, 5)
    began = time.monotonic()
    codes, errors = ranks.end()
    assert codes == [72]
    assert time.monotonic() - began < 2.0 + 1.5 + 15.0  # limit, grace, and a busy machine
    stacks = ranks.text("logs/hang-rank-0.txt")
    assert "in sleeps" in stacks
    assert f"rank 0 host {os.uname().nodename} pid {ranks.processes[0].pid} step 5 phase training" in stacks
    assert "1 more" not in errors[0]
    ended = ranks.exit()
    assert (ended["code"], ended["step"]) == (72, 5)
    assert "rank 0 made no progress for 2 s in training at step 5 (limit 2 s)" in ended["reason"]
    assert "<string>:" in ended["reason"]
    assert "sleeps" in ended["reason"]
    assert [line for line in errors[0].splitlines() if ended["reason"] in line], errors[0]
    assert "no progress" in ranks.text("reason-0")


def test_a_frozen_process_is_named_and_killed_by_its_peer(start):
    ranks = start("reads_from_its_peer", "writes")
    beat = ranks.wait_for_step(1, 10)
    os.kill(beat.pid, signal.SIGSTOP)
    codes, errors = ranks.end()
    assert codes == [72, -signal.SIGKILL]
    culprit = f"rank 1 (host {beat.host}, pid {ranks.processes[1].pid}) is frozen or dead (stopped by a signal)"
    assert culprit in errors[0]
    assert culprit in ranks.exit()["reason"]
    assert "in reads_from_its_peer" in ranks.text("logs/hang-rank-0.txt")


def test_a_peer_that_holds_the_interpreter_lock_leaves_its_stack(unattended):
    ranks = unattended["writes_a_while"]
    codes, errors = ranks.end()
    assert codes == [72, -signal.SIGKILL]
    assert "rank 1 (host" in errors[0]
    assert "interpreter lock" in errors[0]
    assert "in holds_the_lock" in ranks.text("logs/stack-rank-1.txt")


@pytest.mark.parametrize("function", ["holds_the_lock", "cannot_write_heartbeats"])
def test_where_the_thread_cannot_act_the_timer_does(unattended, function):
    ranks = unattended[function]
    codes, _ = ranks.end()
    assert codes == [1]
    stacks = ranks.text("logs/hang-rank-0.txt")
    assert "Timeout (0:00:05)" in stacks  # limit, grace, two periods; not the limit of an earlier phase
    assert f"in {function}" in stacks


def test_a_full_disk_hides_neither_the_stacks_nor_the_code(start, tmp_path):
    ranks = start("is_out_of_disk")
    ranks.wait_for_step(0, 5)
    before = heartbeat_file(tmp_path, 0).stat().st_mtime
    time.sleep(2.0)
    (beat,) = read_heartbeats(tmp_path)
    assert beat.step == 5
    assert beat.written > before + 0.4
    codes, errors = ranks.end()
    assert codes == [72]
    assert "in is_out_of_disk" in errors[0]


def test_no_alarm_while_steps_come_and_stacks_on_request(start, tmp_path):
    (tmp_path / "exit.json").write_text('{"code": 72, "reason": "an earlier attempt", "attempt": 0}')
    ranks = start("makes_progress", "makes_progress", attempt=1)
    ranks.wait_for_step(0, 10)
    ranks.wait_for_step(1, 10)
    assert [send_signal(beat, STACKS_SIGNAL) for beat in read_heartbeats(tmp_path)] == [True, True]
    codes, errors = ranks.end()
    assert (codes, errors) == ([0, 0], ["", ""])
    for rank in (0, 1):
        assert ranks.text(f"logs/hang-rank-{rank}.txt") == ""
        assert "in makes_progress" in ranks.text(f"logs/stack-rank-{rank}.txt")
    assert [(beat.step, beat.phase, beat.ended) for beat in read_heartbeats(tmp_path)] == [(100, "ending", True)] * 2
    assert not any(send_signal(beat, STACKS_SIGNAL) for beat in read_heartbeats(tmp_path))


def test_two_gloo_ranks_end_where_one_never_enters(unattended):
    ranks = unattended["stops_reducing"]
    codes, errors = ranks.end()
    assert codes == [72, 72]
    assert "all_reduce" in ranks.text("logs/hang-rank-0.txt")
    assert "in sleeps" in ranks.text("logs/hang-rank-1.txt")
    reason = ranks.exit()["reason"]
    assert "all ranks wait in the same step 19" in reason
    assert "sleeps" in reason
    assert "all_reduce" in reason
    assert [reason in error for error in errors if "hang: " in error] == [True]  # one rank writes for all


def test_slow_work_in_pieces_is_no_hang_and_a_stall_after_it_is_one(unattended):
    ranks = unattended["works_in_pieces_and_stalls"]
    codes, _ = ranks.end()
    assert codes == [72, 72]
    assert (ranks.folder / "worked").exists()
    assert " s in evaluating at step 5 (limit 4 s)" in ranks.exit()["reason"]
    assert "in sleeps" in ranks.text("logs/hang-rank-0.txt")


@pytest.mark.parametrize("last", ["works_in_pieces", "waits_for_pieces_of_its_peer"])
def test_a_rank_that_waits_for_one_that_makes_progress_has_not_stalled(unattended, last):
    ranks = unattended[last]
    assert ranks.end() == ([0, 0], ["", ""])


def test_in_training_steps_alone_count(unattended):
    ranks = unattended["trains_beside_pieces"]
    codes, _ = ranks.end()
    assert codes == [72]
    assert "in training at step 5" in ranks.exit()["reason"]


def test_an_attempt_that_was_superseded_ends_but_writes_no_exit_json(unattended):
    ranks = unattended["is_superseded"]
    codes, _ = ranks.end()
    assert codes == [76]
    assert "in is_superseded" in ranks.text("logs/hang-rank-0.txt")
    assert not (ranks.folder / "exit.json").exists()


def test_an_error_caused_by_a_hang_is_a_hang(tmp_path):
    def fails(attempt):
        with Watchdog(tmp_path, ProcessEnv(0, 0, 1, 1, "alone"), attempt, None):
            (tmp_path / "exit.json").write_text('{"code": 72, "reason": "rank 1 made no progress", "attempt": 3}')
            raise RuntimeError("connection closed by peer")

    with pytest.raises(HangError, match="rank 1 made no progress"):
        fails(attempt=3)
    with pytest.raises(RuntimeError, match="closed by peer"):
        fails(attempt=4)


# -- heartbeats -------------------------------------------------------------------------------------------------


def heartbeat(rank: int, **changes) -> Heartbeat:
    values = {"host": "node-1", "pid": 100 + rank, "started": 5, "attempt": 0, "step": 7, "phase": "training"}
    return Heartbeat(**values | {"at": "x.py:1 f", "time": 0.0, "seconds_in_phase": 1.0, "rank": rank} | changes)


def test_only_the_newest_attempt_counts_and_an_older_one_cannot_hide_it(tmp_path):
    (tmp_path / "logs").mkdir()
    for rank in range(3):
        write_heartbeat(tmp_path, heartbeat(rank, attempt=1 if rank == 2 else 2))
    write_heartbeat(tmp_path, heartbeat(0, attempt=1, step=99))
    (tmp_path / "logs/heartbeats-from-rank-8.jsonl").write_text("{")
    (tmp_path / "logs/heartbeats-from-rank-9.jsonl").write_text('{"rank": 9}')
    beats = read_heartbeats(tmp_path)
    assert [(beat.rank, beat.step) for beat in beats] == [(0, 7), (1, 7)]
    assert all(abs(beat.written - time.time()) < 60 for beat in beats)
    assert [beat.rank for beat in read_heartbeats(tmp_path, range(1, 9))] == [1]
    assert read_heartbeats(tmp_path / "nothing") == []


def test_ranks_of_a_node_share_a_file_in_which_each_has_its_own_date(tmp_path):
    """Also where the file server's clock is another one, and where the node had more ranks in an earlier attempt."""
    (tmp_path / "logs").mkdir()
    for local_rank, host_time in enumerate((5000.0, 5010.0, 4960.0)):
        changes = {"time": host_time, "attempt": 2, "at": "é" * 500 if local_rank == 2 else "x.py:1 f"}
        write_heartbeat(tmp_path, heartbeat(8 + local_rank, local_rank=local_rank, **changes))
    write_heartbeat(tmp_path, heartbeat(15, local_rank=7, time=9000.0, attempt=1))
    (file,) = (tmp_path / "logs").iterdir()
    os.utime(file, (1000.0, 1000.0))
    beats = read_heartbeats(tmp_path)
    assert [(beat.rank, beat.written) for beat in beats] == [(8, 990.0), (9, 1000.0), (10, 950.0)]
    assert [beat.rank for beat in frozen_ranks(beats, 30.0)] == [10]
    assert read_heartbeats(tmp_path, [8]) == beats
    assert read_heartbeats(tmp_path, [0, 9]) == []


def test_a_signal_reaches_only_the_process_that_wrote_the_heartbeat():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        me = heartbeat(0, host=os.uname().nodename, pid=child.pid, started=process_start(child.pid))
        assert not send_signal(replace(me, started=1), signal.SIGTERM)
        assert not send_signal(replace(me, host="elsewhere"), signal.SIGTERM)
        assert process_state(replace(me, started=1)) == "dead"
        assert process_state(replace(me, host="elsewhere")) is None
        assert child.poll() is None
        assert send_signal(me, signal.SIGTERM)
        assert child.wait(10) == -signal.SIGTERM
        assert not send_signal(me, signal.SIGTERM)
    finally:
        child.kill()
        child.wait()


def test_culprits_are_the_frozen_then_the_silent_then_those_behind_then_the_odd_ones_out():
    beats = [heartbeat(rank, written=1000.0) for rank in range(4)]
    late = [*beats[:3], heartbeat(3, written=900.0)]
    assert frozen_ranks(beats, 15.0) == []
    assert frozen_ranks(late, 15.0) == [late[3]]
    assert frozen_ranks([*beats[:3], replace(late[3], ended=True)], 15.0) == []
    assert culprits(late, late[3:], 4) == (
        "rank 3 (host node-1, pid 103) is frozen or dead at step 7 (training), silent for 100 s"
    )
    assert culprits(beats, [], 6) == "no heartbeat from rank 4; 5"
    slow = [*beats[:3], replace(beats[3], step=6, at="data.py:3 read")]
    assert culprits(slow, [], 4) == (
        "behind the others, which are at step 7: rank 3 (host node-1, pid 103) training at step 6, in data.py:3 read"
    )
    odd = [*beats[:3], replace(beats[3], at="data.py:3 read")]
    line = culprits(odd, [], 4)
    assert line.startswith(
        "all ranks wait in the same step 7: rank 3 (host node-1, pid 103) training at step 7, in data"
    )
    assert line.endswith(
        "rank 0 (host node-1, pid 100); 1 (host node-1, pid 101); 2 (host node-1, pid 102) "
        "training at step 7, in x.py:1 f"
    )
    assert "and 92 more" in culprits([heartbeat(rank) for rank in range(100)], [], 100)
    assert culprits([], [], 1) == "no heartbeat from rank 0"


def test_a_rank_without_network_is_named_first():
    beats = [heartbeat(0), replace(heartbeat(1), network="cannot reach n0:1 (Network is unreachable)")]
    assert culprits(beats, [], 2) == (
        "the network is cut: rank 1 (host node-1, pid 101) cannot reach n0:1 (Network is unreachable)"
    )


def test_the_watchdog_comes_before_the_collectives():
    limits = HangConfig(factor=50.0, min_seconds=10.0, grace_seconds=2.0, other_phase_seconds=100.0)
    assert limit_seconds(limits, "training", [60.0] * 5) == 100.0  # not 50 x 60
    assert 100.0 + 3 * limits.grace_seconds < collective_seconds(limits)
    assert collective_seconds(None) == 1800.0


# -- spikes -----------------------------------------------------------------------------------------------------

SPIKE = SpikeConfig(policy="skip", window=64, min_history=16, max_bad_steps=4)


def noisy(number: int, level: float = 2.0, seed: int = 0) -> list[float]:
    source = random.Random(seed)
    return [level + source.gauss(0.0, 0.02) for _ in range(number)]


def policy(name: str) -> SpikeConfig:
    return SPIKE.model_copy(update={"policy": name})


def observe_all(window: SpikeWindow, losses: list[float]) -> tuple[list[bool], SpikeWindow]:
    spikes, bad = [], 0
    for loss in losses:
        spike, window = window.observe(loss, bad, SPIKE)
        spikes.append(spike)
        bad = bad + 1 if spike or not math.isfinite(loss) else 0
    return spikes, window


def with_history(losses: list[float]) -> SpikeWindow:
    """After them, and one more step that changed nothing."""
    return SpikeWindow(tuple(losses), SpikeWindow(tuple(losses)).limit_after_next(SPIKE))


def test_a_spike_is_detected_after_enough_history_and_never_enters_the_window():
    spikes, window = observe_all(SpikeWindow(), noisy(15))
    assert not any(spikes)
    assert not window.observe(9.0, 0, SPIKE)[0]  # the 16th: no history yet
    spike, window = with_history(noisy(16)).observe(9.0, 0, SPIKE)
    assert spike
    spike, window = window.observe(1.0, 1, SPIKE)
    assert not spike  # a low loss is not one
    assert len(window.losses) == 17
    assert 9.0 not in window.losses


def test_a_limit_does_not_know_the_loss_of_the_step_before():
    """That one is read while the step is computed already."""
    losses = noisy(100)
    for at in (40, 41, 60):
        losses[at] = 4.0
    limits = [math.inf, math.inf]
    window = SpikeWindow()
    for number, loss in enumerate(losses):
        assert window.limit == limits[number]  # of this step, by what was known two steps before
        assert limit_on_device(window, 0, policy("skip")) == limits[number]
        assert limit_on_device(window, 1, policy("skip")) == window.limit_after_next(SPIKE)
        assert limit_on_device(window, 1, policy("stop")) == math.inf
        _, window = window.observe(loss, 0, SPIKE)
        limits.append(window.limit_after_next(SPIKE))
    assert any(math.isfinite(limit) for limit in limits)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_loss_never_poisons_the_window(value):
    before = with_history(noisy(64))
    spike, after = before.observe(value, 0, SPIKE)
    assert not spike
    assert after == before
    assert after.observe(2.5, 1, SPIKE)[0]
    assert not after.observe(2.0, 2, SPIKE)[0]


def test_the_threshold_is_mean_plus_sigmas_times_std_with_a_floor():
    even = with_history([1.0, 3.0] * 16)  # mean 2, std 1
    assert not even.observe(7.999, 0, SPIKE)[0]
    assert even.observe(8.001, 0, SPIKE)[0]
    assert not with_history([2.0] * 32).observe(2.029, 0, SPIKE)[0]  # 6 x 0.005
    assert with_history([2.0] * 32).observe(2.031, 0, SPIKE)[0]


def test_a_new_level_is_taken_after_max_bad_steps():
    spikes, window = observe_all(with_history(noisy(64)), noisy(40, level=5.0))
    assert spikes == [True] * 4 + [False] * 36
    assert min(window.losses) > 4.5
    assert len(window.losses) == 36
    assert window.observe(9.0, 0, SPIKE)[0]


def test_the_state_goes_through_json_and_the_rest_is_the_same():
    losses = noisy(300)
    for at in (50, 120, 121, 122, 199, 200, 260):
        losses[at] = 4.0
    expected, whole = observe_all(SpikeWindow(), losses)
    assert sum(expected) == 7
    for at in (199, 200, 201, 202):
        first, window = observe_all(SpikeWindow(), losses[:at])
        kept, limit = json.loads(json.dumps([window.losses, window.limit]))
        then, end = observe_all(SpikeWindow(tuple(kept), limit), losses[at:])
        assert first + then == expected
        assert end == whole


def test_a_tiny_run_and_a_falling_loss_have_no_spikes():
    assert not any(observe_all(SpikeWindow(), [*noisy(15), 50.0])[0])
    falling = [loss + 8.0 * math.exp(-step / 100) for step, loss in enumerate(noisy(2000))]
    assert not any(observe_all(SpikeWindow(), falling)[0])


@pytest.mark.parametrize(
    ("name", "bad_in_a_row", "rollbacks", "expected"),
    [
        ("off", 99, 0, "continue"),
        ("skip", 0, 0, "continue"),
        ("skip", 3, 0, "continue"),
        ("skip", 4, 0, "stop"),
        ("stop", 3, 0, "continue"),
        ("stop", 4, 0, "stop"),
        ("rollback", 3, 0, "continue"),
        ("rollback", 4, 1, "rollback"),
        ("rollback", 4, 2, "stop"),
    ],
)
def test_verdicts(name, bad_in_a_row, rollbacks, expected):
    assert verdict(bad_in_a_row, rollbacks, policy(name)) == expected


# -- the recipe -------------------------------------------------------------------------------------------------


def recipe(health: str = "", **changes):
    values = {
        "name": "run",
        "model": {"path": "base"},
        "data": {"seq_len": 128, "sources": [{"path": "corpus.jsonl"}]},
        "batch": {"global_tokens": 1024},
        "train": {"tokens": 10_000},
    }
    return build(values | changes | (parse_yaml(health, "x") or {}), "recipe.yaml")


def test_the_spike_policy_changes_the_fingerprint_and_the_hang_limits_do_not():
    plain = recipe()
    assert recipe("health: {spike: {policy: off}}") == plain  # YAML's bare off
    assert recipe(to_yaml(plain)) == plain
    assert recipe("health: {hang: null}").health.hang is None
    assert fingerprint(recipe("health: {hang: null}")) == fingerprint(plain)
    assert fingerprint(recipe("health: {hang: {min_seconds: 5}}")) == fingerprint(plain)
    assert differences(plain, recipe("health: {spike: {policy: skip}}")) == {"health.spike.policy": "off -> skip"}


@pytest.mark.parametrize(
    ("health", "expected"),
    [
        ("health: {spike: {polcy: skip}}", "did you mean health.spike.policy?"),
        ("health: {spike: {policy: on}}", "health.spike.policy"),
        ("health: {spike: {window: 16}}", "health.spike.min_history: 32, health.spike.window: 16"),
        ("health: {hang: {factor: 1}}", "health.hang.factor"),
        ("health: {hang: {grace_seconds: 0}}", "health.hang.grace_seconds"),
        (
            "health: {spike: {policy: rollback}}\ncheckpoint: {every_minutes: null}",
            "health.spike.policy: rollback, checkpoint.every_minutes: null",
        ),
    ],
)
def test_refusals(health, expected):
    with pytest.raises(ConfigError, match=expected.replace("?", r"\?")):
        recipe(health)
