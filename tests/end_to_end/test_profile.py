"""A profile of some steps: a trace that opens, and a summary."""

from __future__ import annotations

import gzip
import json

import pytest

from dist_cpt.train.time_by_kind import KINDS
from tests import tiny
from tests.command import command
from tests.whole_run import StopAfter, rows, train


def messages(run) -> str:
    return "\n".join(row["text"] for row in rows(run / "events.jsonl") if row["kind"] == "message")


def steps_of(trace) -> list[str]:
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "aten::mm" for event in events) > 10
    return [event["name"] for event in events if event.get("name", "").startswith("dist_cpt step")]


def test_a_run_that_resumes_among_the_steps_profiles_what_is_left(made, tmp_path):
    profiled = {"track": {"wandb": {"mode": "disabled"}, "profile": [3, 5]}}
    values = tiny.recipe(*made, tmp_path, train={"tokens": 6 * 8 * tiny.SEQ_LEN}) | profiled
    run = tmp_path / "tiny"
    assert train(values, StopAfter(3)) == 75
    assert not list(run.glob("logs/profile-*"))  # it ended among them
    assert train(values) == 0
    (trace,) = run.glob("logs/profile-*")
    assert trace.name == "profile-rank-0-steps-4-5.json.gz"
    assert steps_of(trace) == ["dist_cpt step 4", "dist_cpt step 5"]
    said = messages(run)
    assert str(trace) in said
    assert all(kind in said for kind in KINDS)


@pytest.mark.parametrize(
    ("asked", "named"),
    [("5", "--profile"), ("5:4", "track.profile"), ("1:30", "track.profile"), ("0:1", "track.profile")],
)
def test_what_is_no_range_of_steps_is_one_line(made, tmp_path, asked, named):
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", tiny.recipe(*made, tmp_path))
    done = command("train", recipe, "--dry-run", "--profile", asked)
    assert done.code == 64
    assert named in done.err
    assert len(done.err.splitlines()) == 1
