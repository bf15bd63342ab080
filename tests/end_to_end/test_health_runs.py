"""Bad steps and hangs of whole runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from dist_cpt.checkpoint.verify import verify_run
from dist_cpt.run_folder.audit import record_problems
from dist_cpt.run_folder.checkpoints import published, read_manifest, read_state
from tests import tiny
from tests.run_ranks import run_ranks
from tests.whole_run import StopAfter, rows, train

STEPS = 60


def recipe(made: tuple[Path, Path], folder: Path, policy: str, **spike: object) -> dict:
    """One block per step, so that losses vary; a loss 1.5 standard deviations above the mean counts as a spike."""
    spike = {"policy": policy, "sigmas": 1.5, "min_history": 8, "window": 16, "max_bad_steps": 1} | spike
    return tiny.recipe(
        *made,
        folder,
        batch={"global_tokens": tiny.SEQ_LEN, "micro_batch": 1},
        train={"tokens": STEPS * tiny.SEQ_LEN},
        optim={"lr": 1e-3, "embedding_lr": 1e-4},
        health={"spike": spike},
        checkpoint={"every_steps": 5, "keep": 20},
    )


@pytest.mark.matrix
def test_off_counts_spikes_and_changes_nothing(made, tmp_path):
    assert train(recipe(made, tmp_path / "a", "off")) == 0
    assert train(recipe(made, tmp_path / "b", "off", sigmas=1000.0)) == 0
    spiky, calm = (rows(tmp_path / which / "tiny/metrics.jsonl") for which in "ab")
    assert any(row["spike"] for row in spiky)
    assert not any(row["spike"] or row["skipped"] for row in calm)
    assert [row["loss"] for row in spiky] == [row["loss"] for row in calm]


def test_skip_applies_no_update_and_a_resume_remembers_the_window(made, tmp_path):
    options = {"max_bad_steps": 50}
    assert train(recipe(made, tmp_path / "a", "skip", **options)) == 0
    run = tmp_path / "b/tiny"
    assert train(recipe(made, tmp_path / "b", "skip", **options), StopAfter(23)) == 75
    assert train(recipe(made, tmp_path / "b", "skip", **options)) == 0
    metrics = rows(tmp_path / "a/tiny/metrics.jsonl")
    spikes = [row["step"] for row in metrics if row["spike"]]
    assert spikes
    assert [row["step"] for row in metrics if row["skipped"]] == spikes
    assert read_state(published(run)[0]).optimizer_steps == STEPS - len(spikes)
    assert [row["loss"] for row in rows(run / "metrics.jsonl")] == [row["loss"] for row in metrics]
    last = [read_manifest(published(tmp_path / which / "tiny")[0]).state_sha256 for which in "ab"]
    assert last[0] == last[1]


def test_stop_ends_with_71_and_names_the_blocks(made, tmp_path, capfd):
    assert train(recipe(made, tmp_path, "stop")) == 71
    metrics = rows(tmp_path / "tiny/metrics.jsonl")
    assert [row["spike"] for row in metrics].index(True) == len(metrics) - 1
    assert f" {metrics[-1]['position'][0]} to " in capfd.readouterr().err


def test_rollback_returns_to_a_checkpoint_and_skips_the_data_for_good(made, tmp_path):
    options = {"max_rollbacks": 50}
    assert train(recipe(made, tmp_path, "rollback", **options)) == 0
    run = tmp_path / "tiny"
    windows = json.loads((run / "rollbacks.json").read_text())["windows"]
    assert windows
    metrics = rows(run / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, STEPS + 1))
    assert not any(row["spike"] or row["skipped"] for row in metrics)
    trained = {position for row in metrics for position in range(*row["position"])}
    left_out = {position for start, stop in windows for position in range(start, stop)}
    assert len(trained) == STEPS
    assert not trained & left_out
    assert trained | left_out == set(range(STEPS + len(left_out)))
    assert read_state(published(run)[0]).skipped_windows == tuple(map(tuple, windows))
    assert json.loads((run / "certificate.json").read_text())["verdict"] == "pass"
    assert all(problems == [] for problems in verify_run(run).values())


@pytest.mark.matrix
def test_a_kill_after_a_rollback_does_not_bring_the_bad_data_back(made, tmp_path):
    options = {"max_rollbacks": 50}
    values = recipe(made, tmp_path / "a", "rollback", **options)
    assert train(values) == 0
    first = json.loads((tmp_path / "a/tiny/rollbacks.json").read_text())["windows"][0]
    run = tmp_path / "b/tiny"
    again = tiny.write_recipe(tmp_path / "b.yaml", recipe(made, tmp_path / "b", "rollback", **options))
    # A fresh run first restores when it first rolls back.
    assert run_ranks(again, 1, log=tmp_path / "log", DIST_CPT_FAULT="restore:kill") == [-9]
    assert run_ranks(again, 1, log=tmp_path / "log") == [0]
    windows = json.loads((run / "rollbacks.json").read_text())["windows"]
    assert windows[0] == first
    assert [row["loss"] for row in rows(run / "metrics.jsonl")] == [
        row["loss"] for row in rows(tmp_path / "a/tiny/metrics.jsonl")
    ]


def test_too_many_rollbacks_end_with_71(made, tmp_path):
    assert train(recipe(made, tmp_path, "rollback", sigmas=0.01, max_rollbacks=1)) == 71
    assert len(json.loads((tmp_path / "tiny/rollbacks.json").read_text())["windows"]) == 1
    assert json.loads((tmp_path / "tiny/exit.json").read_text())["code"] == 71


def test_diverged_weights_are_never_published(made, tmp_path):
    values = tiny.recipe(
        *made,
        tmp_path,
        optim={"lr": 1e30, "embedding_lr": 1e30},
        checkpoint={"every_steps": 1},
        schedule={"kind": "constant"},
    )
    assert train(values) == 71
    run = tmp_path / "tiny"
    assert json.loads((run / "exit.json").read_text())["code"] == 71
    for path in published(run):
        assert math.isfinite(read_state(path).probe.loss)
    assert not published(run) or all(problems == [] for problems in verify_run(run).values())


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param({"kind": "fsdp", "shard": "full"}, id="fsdp"),
        pytest.param({"kind": "zero", "stage": 3}, id="zero", marks=pytest.mark.matrix),
    ],
)
def test_a_frozen_rank_ends_all_with_72_and_the_run_resumes_later(made, tmp_path, engine):
    # The limit grows with the steps of a busy machine; what ends the run has three times the grace for it.
    hang = {"factor": 20.0, "min_seconds": 2.0, "grace_seconds": 3.0, "other_phase_seconds": 60.0}
    values = tiny.recipe(*made, tmp_path, engine=engine, health={"hang": hang})
    path = tiny.write_recipe(tmp_path / "recipe.yaml", values)
    codes = run_ranks(path, 2, log=tmp_path / "log", DIST_CPT_FAULT="step:rank1:step6:freeze")
    assert codes == [72, -9], (tmp_path / "log").read_text()[-2000:]
    run = tmp_path / "tiny"
    ended = json.loads((run / "exit.json").read_text())
    assert ended["code"] == 72
    assert "rank 1" in ended["reason"]
    assert "train_loop" in (run / "logs/hang-rank-0.txt").read_text()
    assert run_ranks(path, 2, "health.hang.min_seconds=60", log=tmp_path / "log") == [0, 0]
    assert [row["step"] for row in rows(run / "metrics.jsonl")] == list(range(1, 13))


def test_a_kill_in_the_last_evaluation_loses_nothing_and_doubles_no_row(made, tmp_path):
    held_out = [{"name": name, "path": str(made[1].parent / "held-out.jsonl")} for name in ("one", "two")]
    values = tiny.recipe(*made, tmp_path, evaluate={"max_blocks": 2})
    values["data"]["validation"] = held_out
    path = tiny.write_recipe(tmp_path / "recipe.yaml", values)
    run = tmp_path / "tiny"
    # The second time that the point is reached is in the second set.
    faults = "evaluate:step12:usr1,evaluate:step12:kill"
    assert run_ranks(path, 1, log=tmp_path / "log", DIST_CPT_FAULT=faults) == [-9], (tmp_path / "log").read_text()
    assert published(run)[0].name == "step-00000012"
    trained = (run / "metrics.jsonl").read_bytes()
    assert [row["name"] for row in rows(run / "evaluations.jsonl") if row["step"] == 12] == ["one"]
    assert run_ranks(path, 1, log=tmp_path / "log") == [0], (tmp_path / "log").read_text()
    assert (run / "metrics.jsonl").read_bytes() == trained
    evaluated = [(row["step"], row["name"]) for row in rows(run / "evaluations.jsonl")]
    assert evaluated == [(0, "one"), (0, "two"), (12, "one"), (12, "two")]
    assert json.loads((run / "exit.json").read_text())["code"] == 0
    assert record_problems(run) == []


@pytest.mark.matrix
@pytest.mark.parametrize("point", ["evaluate", "save.tensor"])
def test_slow_pieces_are_no_hang_and_a_stall_among_them_is_one(made, tmp_path, point):
    hang = {"min_seconds": 60.0, "grace_seconds": 2.0, "other_phase_seconds": 12.0}
    values = tiny.recipe(
        *made,
        tmp_path,
        engine={"kind": "fsdp", "shard": "full"},
        health={"hang": hang},
        batch={"global_tokens": 8 * tiny.SEQ_LEN, "micro_batch": 1},
        checkpoint={"every_steps": 100, "trial": False},
    )
    values["data"]["validation"] = [{"name": "long", "path": str(made[1])}]
    path = tiny.write_recipe(tmp_path / "recipe.yaml", values)
    run = tmp_path / "tiny"
    codes = run_ranks(path, 2, log=tmp_path / "log", DIST_CPT_FAULT=f"{point}:rank1:slow,{point}:rank1:step12:freeze")
    assert codes == [72, -9], (tmp_path / "log").read_text()[-2000:]
    ended = json.loads((run / "exit.json").read_text())
    assert ended["code"] == 72
    assert "rank 1" in ended["reason"]
    assert run_ranks(path, 2, log=tmp_path / "log", DIST_CPT_FAULT=f"{point}:rank1:slow") == [0, 0]
    assert [row["step"] for row in rows(run / "metrics.jsonl")] == list(range(1, 13))
