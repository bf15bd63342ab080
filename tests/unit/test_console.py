"""Console output: a live line on a terminal, plain readable lines in a log file."""

from __future__ import annotations

import io
import os
import pty
import re
from dataclasses import replace
from pathlib import Path

import pytest

from dist_cpt.run_folder.records import CheckpointRecord, EvaluationRecord, RunEnd, RunStart, StepRecord
from dist_cpt.train import console
from dist_cpt.train.console import Console, duration
from tests.small_config import config

CONTRACT = {
    "groups": [
        {
            "name": "adapter",
            "num_tensors": 448,
            "num_parameters": 335544320,
            "compute_dtype": "bf16",
            "master_dtype": "fp32",
            "peak_lr": 1e-4,
            "weight_decay": 0.01,
            "sharding": "weights, masters and moments over 2 ranks",
            "tensors": [],
        },
        {
            "name": "embeddings",
            "num_tensors": 1,
            "num_parameters": 525336576,
            "compute_dtype": "bf16",
            "master_dtype": "fp32",
            "peak_lr": 1e-5,
            "weight_decay": 0.0,
            "sharding": "weights, masters and moments over 2 ranks",
            "tensors": [],
        },
    ],
    "frozen": {"num_tensors": 290, "num_parameters": 7504924672, "sha256": "ab", "dtype": "bf16"},
    "ties": [["lm_head.weight", "model.embed_tokens.weight"]],
    "checks": [],
}


def start(num_steps: int = 100, **changes: object) -> RunStart:
    first = RunStart(config(), Path("runs/run"), "zero-3", 2, "cuda", num_steps, 0, None, "0a1b2c3d", CONTRACT, 0)
    return replace(first, **changes)  # type: ignore[arg-type]


def record(step: int, **changes: object) -> StepRecord:
    row = StepRecord(
        step=step,
        loss=2.34567,
        grad_norm=1.0,
        skipped=False,
        skipped_total=0,
        lr={"adapter": 1e-4, "embeddings": 1e-5},
        position=(0, 2),
        num_tokens=120,
        tokens=120,
        tokens_by_source={"law": 124},
        tokens_per_second=12345.0,
        step_seconds=2.0,
        memory_gib=15.25,
        attempt=0,
    )
    return replace(row, **changes)  # type: ignore[arg-type]


def plain(every_seconds: float = 1e9) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(stream, every_seconds=every_seconds), stream


def test_a_log_file_gets_the_first_and_the_last_step_and_no_control_characters() -> None:
    observer, stream = plain()
    observer.on_start(start())
    for step in range(1, 101):
        observer.on_step(record(step))
    observer.on_end(RunEnd(0, "all tokens trained", 100))
    text = stream.getvalue()
    assert re.findall(r"^step (\d+)/100 ", text, re.MULTILINE) == ["1", "100"]
    assert "loss 2.3457 | lr 1.0e-04/1.0e-05 | 12.3k tokens/s | 15.25 GiB | ETA 0:03:18" in text  # 99 x 2 s
    assert text.endswith("done at step 100: all tokens trained\n")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)


def test_a_log_file_gets_a_line_every_n_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(console.time, "monotonic", lambda: float(next(clock)))
    observer, stream = plain(every_seconds=30)
    observer.on_start(start())
    for step in range(1, 71):
        observer.on_step(record(step))
    assert re.findall(r"^step (\d+)/", stream.getvalue(), re.MULTILINE) == ["1", "31", "61"]
    assert "ETA 0:00:39" in stream.getvalue()  # at step 61: 39 steps of one second, by the clock, not step_seconds


def test_an_early_end_prints_the_last_step_too() -> None:
    observer, stream = plain()
    observer.on_start(start())
    for step in range(1, 8):
        observer.on_step(record(step))
    observer.on_end(RunEnd(75, "stopped by SIGTERM", 7))
    assert "step 7/100 |" in stream.getvalue()
    assert "stopped and saved at step 7: stopped by SIGTERM" in stream.getvalue()


def test_the_contract_is_printed_before_training() -> None:
    observer, stream = plain()
    observer.on_start(start(resumed_from="step-00000040", first_step=40))
    text = stream.getvalue()
    assert "run: zero-3 on 2 ranks (cuda), resumed from step-00000040, step 40 of 100" in text
    lines = [line.split() for line in text.splitlines()]
    adapter = next(words for words in lines if words[:1] == ["adapter"])
    assert adapter[1:6] == ["448", "335,544,320", "bf16/fp32", "0.0001", "0.01"]
    assert ["frozen", "290", "7,504,924,672", "bf16"] in lines
    assert "tied: lm_head.weight = model.embed_tokens.weight" in text
    assert "over 2 ranks" in text  # not cut off


def test_evaluations_show_the_change_since_the_first() -> None:
    observer, stream = plain()
    observer.on_evaluation(EvaluationRecord(0, "law", "domain", 2.0, 7.389, 100, 0))
    observer.on_evaluation(EvaluationRecord(0, "general", "retention", 3.0, 20.0855, 100, 0))
    observer.on_evaluation(EvaluationRecord(50, "law", "domain", 1.0, 2.718, 100, 0))
    first, other, last = stream.getvalue().splitlines()
    assert first == "step 0 held-out law: loss 2.0000, perplexity 7.39"
    assert other == "step 0 held-out general [retention]: loss 3.0000, perplexity 20.09"
    assert last.startswith("step 50 held-out law: loss 1.0000, perplexity 2.72 (-63.2% ")


def test_after_a_resume_the_change_is_still_against_the_first_evaluation_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "evaluations.jsonl").write_text(
        '{"step":0,"name":"law","loss":2.0}\n{"step":5,"name":"law","loss":1.5}\n'
    )
    observer, stream = plain()
    observer.on_start(start(folder=tmp_path, first_step=5, resumed_from="step-00000005"))
    observer.on_evaluation(EvaluationRecord(10, "law", "domain", 1.0, 2.718, 100, 1))
    observer.on_evaluation(EvaluationRecord(11, "law", "domain", float("inf"), float("inf"), 100, 1))
    assert "(-63.2% " in stream.getvalue()
    assert "(not comparable " in stream.getvalue()


def test_skipped_steps_and_checkpoints_are_printed_at_once() -> None:
    observer, stream = plain()
    observer.on_start(start())
    observer.on_step(record(1))
    observer.on_step(record(2, grad_norm=None, skipped=True, skipped_total=1))
    observer.on_checkpoint(CheckpointRecord(2, "step-00000002", 1.25, 3 * 2**20, 1.25))
    assert "step 2 skipped: gradient not finite (1 skipped so far)" in stream.getvalue()
    assert "step 2 saved in 1.2 s, 3.0 MiB: step-00000002" in stream.getvalue()


def test_messages_print_as_they_are_on_one_long_line() -> None:
    observer, stream = plain()
    hostile = "[red]x[/] \x1b[31mred\x1b[0m :smile: " + "word " * 60 + "end"
    observer.on_message(hostile)
    assert stream.getvalue().count("\n") == 1
    assert stream.getvalue().startswith("[red]x[/] \\x1b[31mred\\x1b[0m :smile: word")


def test_a_stream_that_cannot_encode_does_not_stop_the_run() -> None:
    raw = io.BytesIO()
    observer = Console(io.TextIOWrapper(raw, encoding="ascii"))
    observer.on_start(start())
    observer.on_message("café → 東京")
    assert b"caf? ? ??" in raw.getvalue()


def test_on_a_terminal_one_live_line_and_messages_above_it() -> None:
    leader, follower = pty.openpty()
    with open(follower, "w", encoding="utf-8") as stream:
        observer = Console(stream)
        observer.on_start(start())
        observer.on_step(record(1))
        observer.on_message("saved [here]")
        observer.on_step(record(2))
        observer.on_end(RunEnd(0, "done", 2))
        stream.flush()
        output = b""
        while b"done at step 2" not in output:
            output += os.read(leader, 1 << 16)
    os.close(leader)
    text = output.decode()
    assert "saved [here]" in text
    assert "step 2/100" in text
    assert re.search(r"GiB ETA \d:\d\d:\d\d", text)  # 80 columns hold all of it
    assert text.index("saved [here]") < text.index("step 2/100")
    assert text.rstrip().endswith("done at step 2: done")
    assert text.rindex("\x1b[?25h") > text.index("\x1b[?25l")  # the cursor comes back
    assert "\x1b[2K" in text  # redrawn in place


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.4, "0:00:00"), (59.6, "0:01:00"), (3661, "1:01:01"), (90000, "1 d 1:00:00"), (float("inf"), "?")],
)
def test_duration(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown
