"""The NCCL settings of a run, precedence of the user's own, and the flight record of a hang."""

from __future__ import annotations

import json
from pathlib import Path

from dist_cpt.health.nccl import save_flight_record, set_nccl_defaults
from tests.ranks import RankPool

SET = {
    "TORCH_FR_BUFFER_SIZE": "2000",
    "TORCH_FR_DUMP_TEMP_FILE": "/runs/llama/logs/nccl-trace-rank-",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    "TORCH_NCCL_ENABLE_MONITORING": "1",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
}


def test_defaults_are_set():
    environ: dict[str, str] = {}
    set_nccl_defaults(Path("/runs/llama"), environ)
    assert environ == SET


def test_the_users_settings_are_kept_under_either_name():
    own = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "7", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0", "NCCL_ASYNC_ERROR_HANDLING": "1"}
    environ = dict(own)
    set_nccl_defaults(Path("/runs/llama"), environ)
    assert environ == own | {key: SET[key] for key in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_ENABLE_MONITORING")}


def record_case(folder: str) -> str | None:
    import torch
    import torch.distributed as dist

    dist.all_reduce(torch.ones(3))
    path = save_flight_record(Path(folder), 3)
    return None if path is None else str(path)


def test_the_ring_is_written_as_json(tmp_path):
    (tmp_path / "logs").mkdir()
    pool = RankPool(1)
    (written,) = pool.run("tests.unit.test_nccl:record_case", folder=str(tmp_path))
    pool.close()
    path = tmp_path / "logs/flight-rank-3.json"
    assert written == str(path)
    assert [entry["profiling_name"] for entry in json.loads(path.read_text())["entries"]] == ["gloo:all_reduce"]
