"""The record of a run against its checkpoints: each contradiction is one problem that names file, step and values."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_cpt.config.load import build
from dist_cpt.config.resolve import fingerprint, resolve_paths, to_yaml
from dist_cpt.run_folder.audit import record_problems
from dist_cpt.run_folder.checkpoints import read_manifest
from dist_cpt.run_folder.train_state import TrainState
from tests import tiny
from tests.checkpoint_state import IDENTITY, save_step, train_state
from tests.command import command
from tests.whole_run import rows as read

Change = Callable[[Path], None]


def row(step: int, start: int) -> dict[str, Any]:
    return {
        "step": step,
        "position": [start, start + 8],
        "num_tokens": 1000,
        "tokens": 1000 * step,
        "tokens_by_source": {"law": 900, "web": 100},
        "skipped": False,
        "skipped_total": 0,
        "loss": 2.0,
        "attempt": 0,
    }


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def edit(name: str, key: str, value: Any, at: int = -1) -> Change:
    """Change one value in a JSON file, or in one row of a .jsonl file."""

    def change(run: Path) -> None:
        path = run / name
        if path.suffix == ".jsonl":
            rows = read(path)
            rows[at][key] = value
            write_rows(path, rows)
        else:
            path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

    return change


def drop(name: str, at: int) -> Change:
    def change(run: Path) -> None:
        rows = read(run / name)
        del rows[at]
        write_rows(run / name, rows)

    return change


def double(name: str, at: int) -> Change:
    def change(run: Path) -> None:
        rows = read(run / name)
        write_rows(run / name, [*rows[: at + 1], rows[at], *rows[at + 1 :]])

    return change


def write(name: str, text: str) -> Change:
    return lambda run: (run / name).write_text(text) and None


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Steps 1 to 8, checkpoints at 4 and 8, stopped at 4 and resumed there."""
    config = resolve_paths(build(tiny.recipe(tmp_path / "base", tmp_path / "corpus.jsonl", tmp_path), "recipe"))
    run = tmp_path / "tiny"
    identity = type(IDENTITY)(IDENTITY.base, IDENTITY.data, config.model_dump(mode="json"), IDENTITY.engine)
    parent = None
    for step, attempt in ((4, 0), (8, 1)):
        state = train_state(step, attempt).model_copy(update={"parent": parent})
        parent = save_step(run, step, state=state, identity=identity).state_sha256
        if step == 4:
            proof = {"verdict": "pass", "failed": [], "step": 4, "attempt": 1, "state_sha256": parent}
    (run / "certificate.json").write_text(json.dumps(proof))
    (run / "recipe.yaml").write_text(to_yaml(config))
    started = {"wandb_run_id": "run7", "attempts": 2, "fingerprint": fingerprint(config)}
    (run / "run.json").write_text(json.dumps(started))
    (run / "exit.json").write_text(json.dumps({"code": 0, "reason": "done", "step": 8}))
    write_rows(run / "metrics.jsonl", [row(step, 8 * (step - 1)) for step in range(1, 9)])
    write_rows(run / "evaluations.jsonl", [{"step": step, "name": "law", "loss": 2.0} for step in (0, 4, 8)])
    events = [{"kind": kind, "attempt": a, "wandb_run_id": "run7"} for a, kind in enumerate(("start", "resume"))]
    write_rows(run / "events.jsonl", [*events, {"kind": "message", "text": "hello"}])
    return run


def test_an_intact_run_is_valid(run: Path) -> None:
    assert record_problems(run) == []
    ended = command("verify", run)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.splitlines() == ["step-00000008: valid", "step-00000004: valid", "record: valid"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (drop("metrics.jsonl", 2), ("metrics.jsonl: step 3 ",)),
        (double("metrics.jsonl", 4), ("metrics.jsonl: step 5 ",)),
        (edit("metrics.jsonl", "step", 99, at=0), ("metrics.jsonl: step 1 ",)),
        (edit("metrics.jsonl", "position", [48, 60], at=6), ("step 8 ", "56 to 64", "60")),
        (edit("metrics.jsonl", "position", [12, 16], at=1), ("step 2 ", "12 to 16", "8")),
        (edit("metrics.jsonl", "tokens", 2001, at=1), ("step 2 ", "2001", "1000 + 1000", "1 more")),
        (edit("metrics.jsonl", "skipped_total", 1, at=3), ("step-00000004: skipped_total is 0", "metrics.jsonl 1")),
        (edit("metrics.jsonl", "skipped", True, at=3), ("metrics.jsonl: step 4 ", "skipped")),
        (
            edit("metrics.jsonl", "tokens_by_source", {"law": 901, "web": 99}, at=5),
            ("step-00000008: tokens_by_source ", "{'law': 7200, 'web': 800}", "{'law': 7201, 'web': 799}"),
        ),
        (drop("metrics.jsonl", 7), ("metrics.jsonl ", "step 8", "step-00000008")),
        (edit("metrics.jsonl", "position", "many"), ("metrics.jsonl, row 8: ", "position")),
        (write("metrics.jsonl", "\x80\x04\n{}\n"), ("metrics.jsonl, line 1: ",)),
        (double("evaluations.jsonl", 1), ("evaluations.jsonl: law ", "2", "step 4")),
        (edit("evaluations.jsonl", "step", None), ("evaluations.jsonl, row 3: ",)),
        (edit("exit.json", "step", 7), ("exit.json ", "step 7", "metrics.jsonl ", "step 8")),
        (
            edit("run.json", "wandb_run_id", "other"),
            ("other in run.json", "run7 in events.jsonl, attempt 0"),
        ),
        (edit("events.jsonl", "wandb_run_id", "other", at=1), ("other in events.jsonl, attempt 1",)),
        (edit("run.json", "fingerprint", "0" * 64), ("run.json ", "000000000000")),
        (edit("certificate.json", "verdict", "fail"), ("certificate.json: verdict fail",)),
        (edit("certificate.json", "attempt", 0), ("certificate.json ", "attempt 0", "attempt 1")),
        (edit("certificate.json", "state_sha256", "0" * 64), ("certificate.json ", "step 4")),
        (lambda run: (run / "certificate.json").unlink(), ("attempt 1 ", "certificate.json")),
        (write("certificate.json", "[1]"), ("certificate.json: ",)),
        (write("contract.json", "\x80\x04"), ("contract.json: ",)),
        (write("recipe.yaml", "name: [\n"), ("recipe.yaml",)),
        (lambda run: (run / "run.json").unlink(), ("run.json: ",)),
    ],
)
def test_each_contradiction_is_named(run: Path, change: Change, named: tuple[str, ...]) -> None:
    change(run)
    assert any(all(part in problem for part in named) for problem in record_problems(run)), record_problems(run)
    ended = command("verify", run)
    assert (ended.code, len(ended.err.splitlines())) == (74, 1)
    assert all(line.startswith("record: ") for line in ended.out.splitlines()[2:])


def test_another_recipe_is_named(run: Path) -> None:
    path = run / "recipe.yaml"
    path.write_text(path.read_text().replace("seed: 0", "seed: 1"))
    problems = record_problems(run)
    assert [problem.split()[0] for problem in problems] == ["step-00000008", "step-00000004", "run.json"]
    assert all("seed: 0 -> 1" in problem for problem in problems[:2])
    edit("run.json", "accepted_changes", ["seed"])(run)
    assert [problem.split()[0] for problem in record_problems(run)] == ["run.json"]


@pytest.mark.parametrize("ended", [None, {"code": 71, "reason": "NaN", "step": 10}, {"code": 65, "step": 0}])
def test_rows_after_the_newest_checkpoint_are_normal_unless_it_ended_well(run: Path, ended: Any) -> None:
    rows = read(run / "metrics.jsonl")
    write_rows(run / "metrics.jsonl", [*rows, row(9, 64), row(10, 72)])
    problems = record_problems(run)
    assert any(all(part in problem for part in ("exit.json ", "code 0", "10", "8")) for problem in problems), problems
    if ended is None:
        (run / "exit.json").unlink()
    else:
        (run / "exit.json").write_text(json.dumps(ended))
    assert record_problems(run) == []
    with (run / "metrics.jsonl").open("a") as file:  # a line that is being written
        file.write('{"step": 11, "pos')
    assert record_problems(run) == []


def save_with_windows(run: Path, *windows: tuple[int, int]) -> None:
    """The same checkpoint of step 8, but of a run that left out blocks 32 to 47."""
    recipe = read_manifest(run / "checkpoints/step-00000008").recipe
    shutil.rmtree(run / "checkpoints/step-00000008")
    state = TrainState.model_validate(
        train_state(8, 1).model_dump() | {"position": 80, "skipped_windows": windows, "parent": "0" * 64}
    )
    save_step(run, 8, state=state, identity=type(IDENTITY)(IDENTITY.base, IDENTITY.data, recipe, IDENTITY.engine))
    starts = [0, 8, 16, 24, 48, 56, 64, 72]
    write_rows(run / "metrics.jsonl", [row(step, start) for step, start in enumerate(starts, start=1)])
    (run / "rollbacks.json").write_text(json.dumps({"windows": windows}))


def out_of_sequence(run: Path) -> list[int]:
    """[step, first block, end, expected first block] of the only problem, which is of metrics.jsonl."""
    (problem,) = record_problems(run)
    assert problem.startswith("metrics.jsonl: ")
    return [int(number) for number in re.findall(r"\b\d+\b", problem)]


def test_blocks_left_out_by_a_rollback_are_not_missing(run: Path) -> None:
    save_with_windows(run, (32, 40), (40, 48))
    assert record_problems(run) == []
    save_with_windows(run, (32, 40))
    assert out_of_sequence(run) == [5, 48, 56, 40]
    save_with_windows(run, (32, 48), (64, 72))
    assert out_of_sequence(run) == [7, 64, 72, 72]


def test_a_window_of_a_rollback_since_the_newest_checkpoint_counts_too(run: Path) -> None:
    (run / "exit.json").unlink()
    rows = read(run / "metrics.jsonl")
    write_rows(run / "metrics.jsonl", [*rows, row(9, 72)])
    assert out_of_sequence(run) == [9, 72, 80, 64]
    (run / "rollbacks.json").write_text(json.dumps({"windows": [[64, 72]]}))
    assert record_problems(run) == []


def test_a_kill_between_the_record_of_a_rollback_and_the_rollback_is_normal(run: Path) -> None:
    (run / "rollbacks.json").write_text(json.dumps({"windows": [[48, 64]]}))
    assert out_of_sequence(run) == [7, 48, 56, 64, 1]  # and 1 more: it has ended well
    (run / "exit.json").unlink()
    assert record_problems(run) == []
    save_with_windows(run, (32, 48), (72, 80))
    assert out_of_sequence(run) == [8, 72, 80, 80]  # a window that the checkpoint records


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (None, ("step-00000008 ", "32 to 47", "rollbacks.json")),
        ('{"windows": [[32, 40]]}', ("step-00000008 ", "32 to 47", "rollbacks.json")),
        ('{"windows": 3}', ("rollbacks.json: `windows` ",)),
        ("\x80\x04", ("rollbacks.json: ",)),
    ],
)
def test_a_lost_rollback_is_named(run: Path, text: str | None, named: tuple[str, ...]) -> None:
    save_with_windows(run, (32, 48))
    assert record_problems(run) == []
    (run / "rollbacks.json").unlink()
    if text is not None:
        (run / "rollbacks.json").write_text(text)
    assert any(all(part in problem for part in named) for problem in record_problems(run)), record_problems(run)


def test_a_problem_that_disappears_was_a_run_in_progress(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readings = [["rows are moving"], []]
    monkeypatch.setattr("dist_cpt.run_folder.audit._problems", lambda run: readings.pop(0))
    (run / "exit.json").unlink()
    assert record_problems(run) == []


def test_the_certificate_of_a_pruned_checkpoint_is_normal(run: Path) -> None:
    shutil.rmtree(run / "checkpoints/step-00000004")
    edit("certificate.json", "state_sha256", "0" * 64)(run)
    assert record_problems(run) == []


def test_a_stop_before_the_first_step_is_a_record_too(run: Path) -> None:
    recipe = read_manifest(run / "checkpoints/step-00000008").recipe
    shutil.rmtree(run / "checkpoints")
    state = train_state(0).model_copy(update={"tokens_by_source": {}})
    save_step(run, 0, state=state, identity=type(IDENTITY)(IDENTITY.base, IDENTITY.data, recipe, IDENTITY.engine))
    (run / "certificate.json").unlink()
    (run / "metrics.jsonl").unlink()
    write_rows(run / "events.jsonl", [{"kind": "start", "attempt": 0, "wandb_run_id": "run7"}])
    (run / "exit.json").write_text(json.dumps({"code": 75, "step": 0}))
    assert record_problems(run) == []
