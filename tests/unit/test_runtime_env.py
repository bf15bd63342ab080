from __future__ import annotations

import pytest

from dist_cpt.errors import ConfigError
from dist_cpt.runtime.env import ProcessEnv, process_env

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "x",
}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_STEP_ID": "3",
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_NODELIST": "gpu[003-004,7]",
}


def without(values: dict[str, str], *keys: str) -> dict[str, str]:
    return {key: value for key, value in values.items() if key not in keys}


def test_nothing_set_is_alone() -> None:
    assert process_env({}) == ProcessEnv(0, 0, 1, 1, "alone")
    assert process_env({"MASTER_ADDR": "left over"}).launcher == "alone"


@pytest.mark.parametrize(
    ("changes", "launcher"),
    [
        ({}, "torchrun"),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, "accelerate"),
        ({"CROSS_RANK": "1", "TORCHELASTIC_RUN_ID": None, "LOCAL_SIZE": "4", "LOCAL_WORLD_SIZE": None}, "deepspeed"),
        ({"TORCHELASTIC_RUN_ID": None}, "environment"),
    ],
)
def test_launchers_that_set_torchruns_variables(changes: dict[str, str | None], launcher: str) -> None:
    merged = TORCHRUN | {key: value for key, value in changes.items() if value is not None}
    environ = without(merged, *(key for key, value in changes.items() if value is None))
    assert process_env(environ) == ProcessEnv(5, 1, 8, 4, launcher, ("node1", 29500))


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE, LOCAL_RANK"),
        ({"LOCAL_RANK": "0"}, "RANK, WORLD_SIZE"),
        (without(TORCHRUN, "MASTER_PORT"), "MASTER_PORT"),
        (without(TORCHRUN, "LOCAL_WORLD_SIZE"), "LOCAL_WORLD_SIZE"),
        (TORCHRUN | {"RANK": "eight"}, "RANK is 'eight'"),
        (TORCHRUN | {"RANK": "8"}, "rank 8 .* 8"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "local rank 4 of 4"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "16"}, "16 .* 8"),
    ],
)
def test_half_set_or_contradicting_variables_are_refused(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        process_env(environ)


def test_srun_places_the_rank_and_derives_the_meeting_point() -> None:
    assert process_env(SRUN) == ProcessEnv(5, 1, 6, 2, "srun", ("gpu003", 20000 + 1234 * 7 + 3))
    assert process_env(SRUN | {"MASTER_ADDR": "head", "MASTER_PORT": "7"}).master == ("head", 7)
    # torchrun inside a step: its own variables decide
    assert process_env(SRUN | TORCHRUN).launcher == "torchrun"


@pytest.mark.parametrize(
    ("hosts", "first"), [("login1", "login1"), ("n[1-4]", "n1"), ("a[07,9]-x,b", "a07-x"), ("n1,n2", "n1")]
)
def test_the_first_host_of_a_slurm_list(hosts: str, first: str) -> None:
    master = process_env(SRUN | {"SLURM_STEP_NODELIST": hosts}).master
    assert master is not None
    assert master[0] == first


def test_a_batch_script_or_a_one_task_step_is_alone() -> None:
    assert process_env(without(SRUN, "SLURM_STEP_ID")).launcher == "alone"
    assert process_env(SRUN | {"SLURM_STEP_ID": str(2**32 - 5)}).launcher == "alone"
    assert process_env(SRUN | {"SLURM_STEP_NUM_TASKS": "1"}).launcher == "alone"


def test_an_srun_step_that_cannot_be_placed_is_refused() -> None:
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        process_env(SRUN | {"SLURM_STEP_NODELIST": ""})
    with pytest.raises(ConfigError, match="ntasks-per-node"):
        process_env(without(SRUN, "SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"))
    assert process_env(without(SRUN, "SLURM_STEP_TASKS_PER_NODE")).local_world_size == 4
