"""metrics.jsonl and its neighbours: complete, valid, repaired after a kill, rewound without loss."""

from __future__ import annotations

import json
import math
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dist_cpt.errors import DataError, WriteError
from dist_cpt.run_folder.json_files import read_rows
from dist_cpt.run_folder.metrics import MetricsFile
from dist_cpt.run_folder.records import CheckpointRecord, EvaluationRecord, RunEnd, RunStart, StepRecord
from tests.claimed import claimed, meanwhile
from tests.small_config import config


def start(folder: Path, **changes: object) -> RunStart:
    first = RunStart(config(), folder, "zero-3", 2, "cpu", 10, 0, None, "0a1b2c3d", {}, 0)
    return replace(first, **changes)  # type: ignore[arg-type]


def record(step: int, attempt: int = 0, **changes: object) -> StepRecord:
    row = StepRecord(
        step=step,
        loss=2.0,
        grad_norm=1.0,
        skipped=False,
        skipped_total=0,
        lr={"adapter": 1e-4, "embeddings": 1e-5},
        position=(2 * step - 2, 2 * step),
        num_tokens=120,
        tokens=120 * step,
        tokens_by_source={"law": 100, "general": 24},
        tokens_per_second=1000.0,
        step_seconds=0.12,
        memory_gib=1.5,
        attempt=attempt,
    )
    return replace(row, **changes)  # type: ignore[arg-type]


def evaluation(step: int) -> EvaluationRecord:
    return EvaluationRecord(step, "law", "domain", 2.0, math.exp(2.0), 1000, 0)


def test_one_flat_row_per_step_is_on_disk_at_once(tmp_path: Path) -> None:
    file = MetricsFile(claimed(tmp_path))
    file.on_start(start(tmp_path))
    file.on_step(record(1))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # before close: nothing is buffered
    assert json.loads(lines[0]) == {
        "step": 1,
        "loss": 2.0,
        "grad_norm": 1.0,
        "skipped": False,
        "skipped_total": 0,
        "lr": {"adapter": 1e-4, "embeddings": 1e-5},
        "position": [0, 2],
        "num_tokens": 120,
        "tokens": 120,
        "tokens_by_source": {"law": 100, "general": 24},
        "tokens_per_second": 1000.0,
        "step_seconds": 0.12,
        "memory_gib": 1.5,
        "attempt": 0,
        "spike": False,
        "batch_tokens": 0,
        "totals_by_source": {},
    }
    file.close()


def test_events_record_what_happened_and_when(tmp_path: Path) -> None:
    file = MetricsFile(claimed(tmp_path))
    file.on_message("before the start")
    file.on_start(start(tmp_path))
    file.on_checkpoint(CheckpointRecord(4, "step-00000004", 0.5, 1024, 0.5))
    file.on_end(RunEnd(75, "stopped by SIGTERM", 4))
    file = MetricsFile(claimed(tmp_path))
    resumed = {"first_step": 4, "resumed_from": "step-00000004", "attempt": 1}
    file.on_start(start(tmp_path, engine="fsdp-full", world_size=1, **resumed))
    file.on_end(RunEnd(0, "done", 10))
    rows = read_rows(tmp_path / "events.jsonl")
    assert [row["kind"] for row in rows] == ["message", "start", "checkpoint", "end", "resume", "end"]
    assert all(row["time"].endswith("+00:00") for row in rows)
    resume = rows[4]
    assert (resume["engine"], resume["world_size"], resume["first_step"]) == ("fsdp-full", 1, 4)
    assert (resume["resumed_from"], resume["attempt"]) == ("step-00000004", 1)


def test_non_finite_numbers_are_null_and_named(tmp_path: Path) -> None:
    file = MetricsFile(claimed(tmp_path))
    file.on_step(record(1, loss=math.nan, grad_norm=math.inf, lr={"adapter": -math.inf}))
    file.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert row["loss"] is None
    assert row["grad_norm"] is None
    assert row["lr"] == {"adapter": None}
    assert row["non_finite"] == {"loss": "nan", "grad_norm": "inf", "lr.adapter": "-inf"}


@pytest.mark.parametrize("torn", [b'{"step":3,"lo', b"\x00\x00\x00", '{"a":"é'.encode()[:-1]])
def test_a_torn_last_line_is_tolerated_and_repaired(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(claimed(tmp_path))
    file.on_step(record(1))
    file.on_step(record(2))
    file.close()
    path.write_bytes(path.read_bytes() + torn)
    assert [row["step"] for row in read_rows(path)] == [1, 2]
    file = MetricsFile(claimed(tmp_path))
    file.on_step(record(3))
    file.close()
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3]


def test_a_complete_last_line_without_its_newline_stays(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1}')
    file = MetricsFile(claimed(tmp_path))
    file.on_step(record(2))
    file.close()
    assert [row["step"] for row in read_rows(path)] == [1, 2]


def test_a_damaged_line_in_the_middle_is_an_error_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1}\n{"st\n{"step":3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2"):
        read_rows(path)


def test_rewind_moves_later_rows_once_and_is_idempotent(tmp_path: Path) -> None:
    file = MetricsFile(claimed(tmp_path))
    for step in range(1, 8):
        file.on_step(record(step))
    for step in (0, 3, 6):
        file.on_evaluation(evaluation(step))
    file.close()
    assert MetricsFile(claimed(tmp_path)).rewind(4) == 4
    for _ in range(2):
        assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
        assert [row["step"] for row in read_rows(tmp_path / "metrics.rewound.jsonl")] == [5, 6, 7]
        assert [row["step"] for row in read_rows(tmp_path / "evaluations.jsonl")] == [0, 3]
        assert [row["step"] for row in read_rows(tmp_path / "evaluations.rewound.jsonl")] == [6]
        assert MetricsFile(claimed(tmp_path)).rewind(4) == 0
    file = MetricsFile(claimed(tmp_path))
    for step in range(5, 8):
        file.on_step(record(step, attempt=1))
    file.close()
    assert MetricsFile(claimed(tmp_path)).rewind(6) == 1
    rewound = [(row["step"], row["attempt"]) for row in read_rows(tmp_path / "metrics.rewound.jsonl")]
    assert rewound == [(5, 0), (6, 0), (7, 0), (7, 1)]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_rewind_killed_between_its_two_replacements_doubles_nothing(tmp_path: Path) -> None:
    file = MetricsFile(claimed(tmp_path))
    for step in range(1, 6):
        file.on_step(record(step))
    file.close()

    def killed() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        MetricsFile(meanwhile(claimed(tmp_path), "metrics.jsonl", killed)).rewind(3)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    MetricsFile(claimed(tmp_path)).rewind(2)  # and the second time to an earlier checkpoint
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2]
    assert [row["step"] for row in read_rows(tmp_path / "metrics.rewound.jsonl")] == [4, 5, 3]


def test_records_after_a_rewind_go_to_the_new_file(tmp_path: Path) -> None:
    file = MetricsFile(claimed(tmp_path))
    file.on_step(record(1))
    file.on_step(record(2))
    file.rewind(1)
    file.on_start(start(tmp_path, first_step=1, resumed_from="step-00000001", attempt=1))
    file.on_step(record(2, attempt=1))
    file.close()
    assert [(r["step"], r["attempt"]) for r in read_rows(tmp_path / "metrics.jsonl")] == [(1, 0), (2, 1)]


def test_a_disk_that_takes_half_a_line_is_a_write_error_and_leaves_whole_lines(tmp_path: Path) -> None:
    file = MetricsFile(claimed(tmp_path))
    file.on_step(record(1))
    size = (tmp_path / "metrics.jsonl").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, hard))  # the kernel takes 20 bytes, then refuses
    try:
        with pytest.raises(WriteError, match=r"metrics\.jsonl .*File too large"):
            file.on_step(record(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "metrics.jsonl").stat().st_size == size
    file.sync()  # the line has waited
    file.close()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_missing_folder_is_a_write_error(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="gone/metrics"):
        MetricsFile(claimed(tmp_path / "gone")).on_step(record(1))


def test_a_process_killed_while_writing_leaves_a_file_the_next_start_continues(tmp_path: Path) -> None:
    writer = (
        "import sys; from pathlib import Path\n"
        "from dist_cpt.run_folder.metrics import MetricsFile\n"
        "from dist_cpt.run_folder.claim import Claim\n"
        "file = MetricsFile(Claim(Path(sys.argv[1]), 0, 'run7', 'token of 0'))\n"
        "print('writing', flush=True)\n"
        "while True: file.on_message('x' * 5000)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", writer, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    path = tmp_path / "events.jsonl"
    while not path.exists() or path.stat().st_size < 50_000:
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    before = len(read_rows(path))
    file = MetricsFile(claimed(tmp_path))
    file.on_message("after the kill")
    file.close()
    assert len(read_rows(path)) == before + 1


def test_lines_wait_in_order_for_a_disk_that_refuses_and_give_up_in_the_end(tmp_path: Path) -> None:
    file = MetricsFile(claimed(tmp_path), patience_seconds=0.2)
    file.on_step(record(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size, hard))
    try:
        file.on_step(record(2))
        file.on_step(record(3))
        with pytest.raises(WriteError, match="File too large"):
            file.sync()
        time.sleep(0.25)
        with pytest.raises(WriteError, match="File too large"):
            file.on_step(record(4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    file.on_step(record(5))
    file.close()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
