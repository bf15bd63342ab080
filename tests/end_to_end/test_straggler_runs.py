"""A slow rank of a whole run is named in the console, its log, the record and the status."""

from __future__ import annotations

import pytest
from dist_cpt_launch.status import read_status

from tests import tiny
from tests.run_ranks import run_ranks
from tests.whole_run import rows


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param({"kind": "fsdp", "shard": "full"}, id="fsdp"),
        pytest.param({"kind": "zero", "stage": 3}, id="zero", marks=pytest.mark.matrix),
    ],
)
def test_a_slow_rank_is_named(made, tmp_path, engine):
    # The median of three steps: a busy machine may hold up either rank for one. Two comparisons, at steps 4 and 7.
    values = tiny.recipe(
        *made, tmp_path, engine=engine, health={"straggler": {"window": 3}}, train={"tokens": 7 * 8 * tiny.SEQ_LEN}
    )
    path = tiny.write_recipe(tmp_path / "recipe.yaml", values)
    assert run_ranks(path, 2, log=tmp_path / "log", DIST_CPT_FAULT="step:rank1:step1:slow") == [0, 0]
    run = tmp_path / "tiny"
    messages = [row["text"] for row in rows(run / "events.jsonl") if row["kind"] == "message"]
    (line,) = [text for text in messages if text.startswith("straggler: ")]  # once, not every window
    assert line.startswith("straggler: rank 1 (host ")
    assert line in (tmp_path / "log").read_text()
    assert line in (run / "logs/rank-1.log").read_text()
    assert read_status(run).straggler == line
