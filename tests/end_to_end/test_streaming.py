"""Whole runs whose text is read while they train: stopped, killed, moved to other ranks, and with changed text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from dist_cpt_launch.status import read_status
from dist_cpt_launch.status_text import as_text

from dist_cpt.data import streamed, windows
from dist_cpt.report.ledger import token_ledger
from dist_cpt.report.report import report_html
from dist_cpt.run_folder.audit import record_problems
from dist_cpt.run_folder.checkpoints import published, read_manifest, read_state
from dist_cpt.run_folder.contents import read_run
from tests import tiny
from tests.run_ranks import RunningRanks
from tests.whole_run import StopAfter, rows, train

KEYS = ("step", "loss", "grad_norm", "lr", "position", "tokens", "totals_by_source", "epochs_by_source")
FSDP = "engine={kind: fsdp, shard: full}"


def recipe(made: tuple[Path, Path], folder: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Two sources, of which the first is read more than once; 12 steps of 8 blocks."""
    base, corpus = made
    folder.mkdir(exist_ok=True)
    lines = corpus.read_text().splitlines(keepends=True)
    (folder / "law.jsonl").write_text("".join(lines[:14]))
    (folder / "web.jsonl").write_text("".join(lines[14:30]))
    values = tiny.recipe(base, corpus, output, **changes)
    sources = [{"path": str(folder / "law.jsonl"), "weight": 0.75}, {"path": str(folder / "web.jsonl"), "weight": 0.25}]
    return values | {"data": values["data"] | {"sources": sources, "streaming": True}}


def same_rows(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    return [{key: row[key] for key in KEYS} for row in one] == [{key: row[key] for key in KEYS} for row in other]


def test_a_resume_is_the_unbroken_run_and_reads_one_shard_again(made, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(streamed, "UNIT_BYTES", 2500)
    monkeypatch.setattr(windows, "WINDOW_TOKENS", 400)
    monkeypatch.setattr(windows, "WINDOW_BLOCKS", 1)
    assert train(recipe(made, tmp_path / "text", tmp_path / "unbroken")) == 0
    values = recipe(made, tmp_path / "text", tmp_path / "broken")
    whole, run = tmp_path / "unbroken/tiny", tmp_path / "broken/tiny"
    assert train(values, StopAfter(7)) == 75
    state = read_state(published(run)[0])
    assert state.stream is not None
    assert state.stream["law"].shard > 0 or state.stream["law"].epoch > 0
    assert train(values) == 0

    manifests = [read_manifest(folder / "checkpoints/step-00000012") for folder in (whole, run)]
    assert manifests[0].tensors == manifests[1].tensors
    assert manifests[0].state_sha256 == manifests[1].state_sha256
    assert same_rows(*(rows(folder / "metrics.jsonl") for folder in (whole, run)))
    certificate = json.loads((run / "certificate.json").read_text())
    assert certificate["verdict"] == "pass"
    assert "difference 0," in next(c for c in certificate["checks"] if c["name"] == "replayed_loss")["detail"]
    assert record_problems(run) == []
    log = (run / "logs/rank-0.log").read_text()
    again = re.findall(r"source (\w+): (\d+) tokens read again to block (\d+) in shard (\d+) of epoch (\d+)", log)
    assert [name for name, *_ in again] == ["law", "web"]
    # A shard of 2,500 bytes, and the end of the line that begins in it.
    assert all(int(tokens) < 3200 for _, tokens, *_ in again)
    assert {name: (int(e), int(s)) for name, _, _, s, e in again} == {n: m[:2] for n, m in state.stream.items()}

    law, web = token_ledger(read_run(run))
    final = read_state(published(run)[0])
    assert final.stream is not None
    mark = final.stream["law"]
    assert mark.epoch >= 1
    blocks = final.blocks_by_source or {}
    assert law.epochs == blocks["law"] * mark.epoch / mark.epoch_start
    assert law.repeated == pytest.approx(1 - mark.epoch_start / mark.epoch / blocks["law"])
    assert web.repeated is not None
    assert (law.given, law.planned_epochs) == (0.75, None)
    assert f"75% (75% asked), {law.epochs:.3g} epochs" in as_text(read_status(run)).replace(".00%", "%")
    assert f"{law.epochs:.3g}" in report_html(read_run(run))


@pytest.mark.matrix
def test_killed_stopped_and_moved_from_two_ranks_to_one(made, tmp_path):
    every = {"every_steps": 2}
    values = recipe(made, tmp_path / "text", tmp_path / "unbroken", checkpoint=every)
    whole = tiny.write_recipe(tmp_path / "whole.yaml", values)
    with RunningRanks(whole, 2, FSDP, log=tmp_path / "log") as ranks:
        assert ranks.finish() == [0, 0]
    values = recipe(made, tmp_path / "text", tmp_path / "broken", checkpoint=every)
    path, run = tiny.write_recipe(tmp_path / "broken.yaml", values), tmp_path / "broken/tiny"
    with RunningRanks(path, 2, FSDP, log=tmp_path / "log", DIST_CPT_FAULT="step:rank1:step6:kill") as ranks:
        assert -9 in ranks.finish()
    with RunningRanks(path, 2, FSDP, log=tmp_path / "log", DIST_CPT_FAULT="step:step10:term") as ranks:
        assert ranks.finish() == [75, 75]
    unbroken, broken = rows(tmp_path / "unbroken/tiny/metrics.jsonl"), rows(run / "metrics.jsonl")
    assert same_rows(unbroken[: len(broken)], broken)
    assert json.loads((run / "certificate.json").read_text())["verdict"] == "pass"
    assert train(values | {"engine": "single"}) == 0
    assert json.loads((run / "certificate.json").read_text())["verdict"] == "pass"
    assert record_problems(run) == []
    for one, other in zip(unbroken, rows(run / "metrics.jsonl"), strict=True):
        counted = ("position", "tokens", "totals_by_source", "epochs_by_source")
        assert {key: one[key] for key in counted} == {key: other[key] for key in counted}
        assert one["loss"] == pytest.approx(other["loss"], abs=2e-2)


def test_text_that_has_changed_is_refused_by_name(made, tmp_path, capfd):
    values = recipe(made, tmp_path / "text", tmp_path)
    run = tmp_path / "tiny"
    assert train(values, StopAfter(2)) == 75
    with (tmp_path / "text/web.jsonl").open("a") as file:
        file.write(json.dumps({"text": "one more document"}) + "\n")
    assert train(values) == 65
    last = [line for line in capfd.readouterr().err.splitlines() if line.startswith("dist-cpt: ")][-1]
    assert re.search(r"source 'web': .*web\.jsonl has changed since the run began: [\d,]+ bytes then, [\d,]+ now", last)
    assert json.loads((run / "exit.json").read_text())["code"] == 65
