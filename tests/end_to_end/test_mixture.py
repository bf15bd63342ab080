"""Whole runs of a staged mixture: a length from epochs, one ledger over a stop and a resume, a changed corpus."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from dist_cpt_launch.status import read_status
from dist_cpt_launch.status_text import as_text

from dist_cpt.data.loader import BlockLoader
from dist_cpt.data.prepared import open_prepared
from dist_cpt.report.ledger import token_ledger
from dist_cpt.report.report import report_html
from dist_cpt.run_folder.audit import record_problems
from dist_cpt.run_folder.checkpoints import published, read_state
from dist_cpt.run_folder.contents import read_run
from dist_cpt.train.branch import branch
from tests import tiny
from tests.whole_run import StopAfter, built, rows, train


@pytest.fixture
def values(made: tuple[Path, Path], tmp_path: Path) -> dict[str, Any]:
    """A domain source and a replay source that is dropped after half an epoch, in two stages."""
    base, corpus = made
    lines = corpus.read_text().splitlines(keepends=True)
    (tmp_path / "web.jsonl").write_text("".join(lines[:8]))
    (tmp_path / "law.jsonl").write_text("".join(lines[8:24]))
    recipe = tiny.recipe(
        base, tmp_path / "law.jsonl", tmp_path, train={"epochs": 1.25}, checkpoint={"every_steps": 100}
    )
    web = {"path": str(tmp_path / "web.jsonl"), "role": "replay", "max_epochs": 0.5, "on_exhausted": "drop"}
    stages = [{"tokens": 20 * tiny.SEQ_LEN, "weights": {"law": 1, "web": 1}}, {"weights": {"law": 9, "web": 1}}]
    return recipe | {
        "data": {"seq_len": tiny.SEQ_LEN, "sources": [recipe["data"]["sources"][0], web], "stages": stages}
    }


def test_one_ledger_over_a_stop_and_a_resume(values, tmp_path, capfd):
    run = tmp_path / "tiny"
    assert train(values, StopAfter(4)) == 75
    state = read_state(published(run)[0])
    branched = branch(run, 4, "branched").config  # which has no data to resolve epochs by
    assert (branched.train.tokens, branched.train.epochs) == (state.schedule["num_steps"] * 8 * tiny.SEQ_LEN, None)
    assert train(values) == 0
    assert record_problems(run) == []
    metrics = rows(run / "metrics.jsonl")

    prepared = open_prepared(built(values))
    loader = BlockLoader(prepared, tiny.SEQ_LEN, 0, 0)
    available = dict(zip(loader.source_names, loader.available, strict=True))
    needed = next(p for p in range(10_000) if loader.blocks_read(p)["law"] >= 1.25 * available["law"])
    assert metrics[-1]["step"] == -(-needed // 8) == state.schedule["num_steps"]
    for row in metrics:
        blocks = {name: counts[0] for name, counts in row["totals_by_source"].items()}
        assert blocks == loader.blocks_read(row["position"][1])
        assert row["batch_tokens"] == sum(blocks.values()) * tiny.SEQ_LEN
        assert sum(counts[2] for counts in row["totals_by_source"].values()) == row["tokens"]
    assert blocks["web"] == available["web"] // 2
    at = metrics[state.step - 1]["totals_by_source"]
    assert (state.blocks_by_source, state.tokens_by_source, state.targets_by_source) == tuple(
        {name: counts[column] for name, counts in at.items()} for column in range(3)
    )

    law, web = token_ledger(read_run(run))
    assert (law.name, web.name, web.role) == ("law", "web", "replay")
    assert law.epochs == law.planned_epochs == blocks["law"] / available["law"]
    assert law.repeated == pytest.approx(1 - available["law"] / blocks["law"])
    assert (web.epochs, web.repeated) == (blocks["web"] / available["web"], 0.0)
    assert law.padding is not None
    assert law.padding + law.tokens == blocks["law"] * tiny.SEQ_LEN
    positions = metrics[-1]["position"][1]
    assert web.asked == pytest.approx((20 * 0.5 + (positions - 20) * 0.1) / positions)
    assert web.given == blocks["web"] / positions
    assert f"{web.given:.2%}" in report_html(read_run(run))
    assert f"{web.given:.2%} ({web.asked:.2%} asked), {web.epochs:.3g} of {web.epochs:.3g} epochs" in as_text(
        read_status(run)
    )
    assert json.loads(json.dumps(read_status(run).as_json()))["sources"][0]["targets"] == law.targets


def test_a_corpus_that_has_grown_is_named(values, tmp_path, capfd):
    assert train(values, StopAfter(2)) == 75
    with (tmp_path / "law.jsonl").open("a") as file:
        file.write(json.dumps({"text": "one more document"}) + "\n")
    assert train(values) == 74
    assert "law: " in capfd.readouterr().err.splitlines()[-1]


def test_a_source_that_may_not_repeat_ends_the_run_before_its_first_step(values, tmp_path, capfd):
    values["data"]["sources"][1] |= {"on_exhausted": "error"}
    assert train(values) == 65
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("dist-cpt: ")]
    assert "source web is used up at token " in line
    assert not (tmp_path / "tiny/metrics.jsonl").exists()
