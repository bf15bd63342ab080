"""The record of a run against its checkpoints: whole it passes, and each way to break it is one named finding."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_cpt.config.load import build
from dist_cpt.config.resolve import fingerprint, resolve_paths, to_yaml
from dist_cpt.run_folder.audit import record_problems
from dist_cpt.run_folder.train_state import TrainState
from tests import tiny
from tests.checkpoint_state import IDENTITY, save_step, train_state
from tests.command import command

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


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


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
    identity = type(IDENTITY)(IDENTITY.base, IDENTITY.data, fingerprint(config), IDENTITY.engine)
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


def test_a_whole_run_holds(run: Path) -> None:
    assert record_problems(run) == []
    ended = command("verify", run)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.splitlines() == ["step-00000008: holds", "step-00000004: holds", "record: holds"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop("metrics.jsonl", 2), "metrics.jsonl: step 3 is missing"),
        (double("metrics.jsonl", 4), "metrics.jsonl: step 5 stands more than once"),
        (edit("metrics.jsonl", "step", 99, at=0), "metrics.jsonl: step 1 is missing"),
        (edit("metrics.jsonl", "position", [48, 60], at=6), "step 8 took blocks 56 to 64, 60 was next"),
        (edit("metrics.jsonl", "position", [12, 16], at=1), "step 2 took blocks 12 to 16, 8 was next"),
        (edit("metrics.jsonl", "tokens", 2001, at=1), "step 2 has 2001 tokens, not 1000 + 1000 (and 1 more)"),
        (edit("metrics.jsonl", "skipped_total", 1, at=3), "step-00000004: skipped_total is 0, by metrics.jsonl 1"),
        (edit("metrics.jsonl", "skipped", True, at=3), "step 4 counts 0 skipped steps after 0"),
        (
            edit("metrics.jsonl", "tokens_by_source", {"law": 901, "web": 99}, at=5),
            "step-00000008: tokens_by_source is {'law': 7200, 'web': 800}, by metrics.jsonl {'law': 7201, 'web': 799}",
        ),
        (drop("metrics.jsonl", 7), "metrics.jsonl has no row of step 8, which step-00000008 holds"),
        (edit("metrics.jsonl", "position", "many"), "metrics.jsonl, row 8: ValidationError position"),
        (write("metrics.jsonl", "\x80\x04\n{}\n"), "line 1: not a JSON object"),
        (double("evaluations.jsonl", 1), "evaluations.jsonl: law stands 2 times at step 4"),
        (edit("evaluations.jsonl", "step", None), "evaluations.jsonl, row 3: TypeError"),
        (edit("exit.json", "step", 7), "exit.json is of step 7, metrics.jsonl ends at step 8"),
        (
            edit("run.json", "wandb_run_id", "other"),
            "not one W&B run: other in run.json; run7 in events.jsonl, attempt 0",
        ),
        (edit("events.jsonl", "wandb_run_id", "other", at=1), "other in events.jsonl, attempt 1"),
        (edit("run.json", "fingerprint", "0" * 64), "run.json is of the recipe 000000000000"),
        (edit("certificate.json", "verdict", "fail"), "certificate.json: verdict fail"),
        (edit("certificate.json", "attempt", 0), "certificate.json is of attempt 0, the latest resume was attempt 1"),
        (edit("certificate.json", "state_sha256", "0" * 64), "a state at step 4 that no checkpoint here holds"),
        (lambda run: (run / "certificate.json").unlink(), "attempt 1 was resumed, but there is no certificate.json"),
        (write("certificate.json", "[1]"), "certificate.json: not a JSON object"),
        (write("contract.json", "\x80\x04"), "contract.json: not a JSON object"),
        (write("recipe.yaml", "name: [\n"), "not valid YAML"),
        (lambda run: (run / "run.json").unlink(), "run.json: No such file"),
    ],
)
def test_each_way_to_break_it_is_named(run: Path, change: Change, said: str) -> None:
    change(run)
    assert any(said in problem for problem in record_problems(run)), record_problems(run)
    ended = command("verify", run)
    assert (ended.code, len(ended.err.splitlines())) == (74, 1)
    assert all(line.startswith("record: ") for line in ended.out.splitlines()[2:])


def test_another_recipe_is_named(run: Path) -> None:
    path = run / "recipe.yaml"
    path.write_text(path.read_text().replace("seed: 0", "seed: 1"))
    assert [problem[:42] for problem in record_problems(run)] == [
        "step-00000008 is of the recipe " + json.loads((run / "run.json").read_text())["fingerprint"][:11],
        "step-00000004 is of the recipe " + json.loads((run / "run.json").read_text())["fingerprint"][:11],
        "run.json is of the recipe " + json.loads((run / "run.json").read_text())["fingerprint"][:12] + ", re",
    ]


@pytest.mark.parametrize("ended", [None, {"code": 71, "reason": "NaN", "step": 10}, {"code": 65, "step": 0}])
def test_rows_after_the_newest_checkpoint_are_normal_unless_it_ended_well(run: Path, ended: Any) -> None:
    rows = read(run / "metrics.jsonl")
    write_rows(run / "metrics.jsonl", [*rows, row(9, 64), row(10, 72)])
    assert "exit.json says 0, but the last step is 10 and the newest checkpoint step 8" in record_problems(run)
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
    import shutil

    from dist_cpt.run_folder.checkpoints import read_manifest

    recipe = read_manifest(run / "checkpoints/step-00000008").recipe
    shutil.rmtree(run / "checkpoints/step-00000008")
    state = TrainState.model_validate(
        train_state(8, 1).model_dump() | {"position": 80, "skipped_windows": windows, "parent": "0" * 64}
    )
    save_step(run, 8, state=state, identity=type(IDENTITY)(IDENTITY.base, IDENTITY.data, recipe, IDENTITY.engine))
    starts = [0, 8, 16, 24, 48, 56, 64, 72]
    write_rows(run / "metrics.jsonl", [row(step, start) for step, start in enumerate(starts, start=1)])
    (run / "rollbacks.json").write_text(json.dumps({"windows": windows}))


def test_blocks_left_out_by_a_rollback_are_no_gap(run: Path) -> None:
    save_with_windows(run, (32, 40), (40, 48))
    assert record_problems(run) == []
    save_with_windows(run, (32, 40))
    assert record_problems(run) == ["metrics.jsonl: step 5 took blocks 48 to 56, 40 was next"]
    save_with_windows(run, (32, 48), (64, 72))
    assert record_problems(run) == ["metrics.jsonl: step 7 took blocks 64 to 72, 72 was next"]


def test_a_window_of_a_rollback_since_the_newest_checkpoint_counts_too(run: Path) -> None:
    (run / "exit.json").unlink()
    rows = read(run / "metrics.jsonl")
    write_rows(run / "metrics.jsonl", [*rows, row(9, 72)])
    assert record_problems(run) == ["metrics.jsonl: step 9 took blocks 72 to 80, 64 was next"]
    (run / "rollbacks.json").write_text(json.dumps({"windows": [[64, 72]]}))
    assert record_problems(run) == []


def test_a_kill_between_the_decision_to_roll_back_and_the_deed_is_normal(run: Path) -> None:
    (run / "rollbacks.json").write_text(json.dumps({"windows": [[48, 64]]}))
    (said,) = record_problems(run)  # it has ended well
    assert said == "metrics.jsonl: step 7 took blocks 48 to 56, 64 was next (and 1 more)"
    (run / "exit.json").unlink()
    assert record_problems(run) == []
    save_with_windows(run, (32, 48), (72, 80))
    assert record_problems(run) == ["metrics.jsonl: step 8 took blocks 72 to 80, 80 was next"]  # one it knew of


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "step-00000008 left out blocks 32 to 47, rollbacks.json does not say so"),
        ('{"windows": [[32, 40]]}', "step-00000008 left out blocks 32 to 47, rollbacks.json does not say so"),
        ('{"windows": 3}', "rollbacks.json: `windows` is no list of [start, stop]"),
        ("\x80\x04", "rollbacks.json: not a JSON object"),
    ],
)
def test_a_lost_rollback_is_named(run: Path, text: str | None, said: str) -> None:
    save_with_windows(run, (32, 48))
    assert record_problems(run) == []
    (run / "rollbacks.json").unlink()
    if text is not None:
        (run / "rollbacks.json").write_text(text)
    assert said in record_problems(run)


def test_what_a_second_look_does_not_see_was_a_run_at_work(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = [["rows are moving"], []]
    monkeypatch.setattr("dist_cpt.run_folder.audit._problems", lambda run: looks.pop(0))
    (run / "exit.json").unlink()
    assert record_problems(run) == []


def test_the_certificate_of_a_pruned_checkpoint_is_normal(run: Path) -> None:
    import shutil

    shutil.rmtree(run / "checkpoints/step-00000004")
    edit("certificate.json", "state_sha256", "0" * 64)(run)
    assert record_problems(run) == []


def test_a_stop_before_the_first_step_is_a_record_too(run: Path) -> None:
    import shutil

    from dist_cpt.run_folder.checkpoints import read_manifest

    recipe = read_manifest(run / "checkpoints/step-00000008").recipe
    shutil.rmtree(run / "checkpoints")
    state = train_state(0).model_copy(update={"tokens_by_source": {}})
    save_step(run, 0, state=state, identity=type(IDENTITY)(IDENTITY.base, IDENTITY.data, recipe, IDENTITY.engine))
    (run / "certificate.json").unlink()
    (run / "metrics.jsonl").unlink()
    write_rows(run / "events.jsonl", [{"kind": "start", "attempt": 0, "wandb_run_id": "run7"}])
    (run / "exit.json").write_text(json.dumps({"code": 75, "step": 0}))
    assert record_problems(run) == []
