"""A run whose sequences are cut over ranks is the same run: it moves to another cut, and reads every block once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_cpt.checkpoint.verify import verify_run
from tests import tiny
from tests.contract.engines import ENGINES
from tests.run_ranks import RunningRanks
from tests.whole_run import rows, train

STEPS = 12
# (engine, ranks, ranks per sequence, the step before which the attempt is asked to stop)
SHORT = (("fsdp-full", 2, 2, 4), ("zero-2", 2, 1, 8), ("single", 1, 1, None))
LONG = (("zero-3", 2, 2, 4), ("single", 1, 1, 7), ("fsdp-hybrid", 4, 4, 10), ("zero-2", 4, 2, None))


def test_a_classifier_cut_over_ranks(made: tuple[Path, Path], tmp_path: Path) -> None:
    """The class of a text is predicted by the rank that has its last token."""
    words = ("one", "two", "three")
    texts = [f"Text {n} of {'many words ' * (12 * (n % 2))}is {words[n % 3]}" for n in range(60)]
    records = [{"text": text, "label": words[n % 3]} for n, text in enumerate(texts)]
    for name, some in (("train", records[12:]), ("held-out", records[:12])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in some))
    data = {
        "seq_len": 4 * tiny.SEQ_LEN,
        "sources": [{"path": str(tmp_path / "train.jsonl")}],
        "validation": [{"name": "held-out", "path": str(tmp_path / "held-out.jsonl")}],
    }
    changes = {
        "task": "classify",
        "classify": {"text_fields": ["text"], "label": "label", "labels": list(words)},
        "model": {"path": str(made[0]), "weights": "fp32"},
        "embeddings": {"train": []},
        "data": data,
        "batch": {"global_tokens": 16 * tiny.SEQ_LEN, "micro_batch": 1},
        "train": {"tokens": 6 * 16 * tiny.SEQ_LEN},
        "optim": {"lr": 1e-2, "head_lr": 3e-2},
    }
    assert train(tiny.recipe(*made, tmp_path / "alone", **changes)) == 0
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", tiny.recipe(*made, tmp_path, **changes))
    placed = ENGINES["fsdp-full"] | {"context_parallel": 2}
    with RunningRanks(recipe, 2, f"engine={json.dumps(placed)}", log=tmp_path / "log") as running:
        assert running.finish() == [0, 0], (tmp_path / "log").read_text()[-4000:]
    ours, alone = (rows(folder / "metrics.jsonl") for folder in (tmp_path / "tiny", tmp_path / "alone/tiny"))
    assert len(ours) == 6
    for mine, other in zip(ours, alone, strict=True):
        assert (mine["step"], mine["num_tokens"]) == (other["step"], other["num_tokens"])
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    for mine, other in zip(
        rows(tmp_path / "tiny/evaluations.jsonl"), rows(tmp_path / "alone/tiny/evaluations.jsonl"), strict=True
    ):
        assert (mine["accuracy"], mine["num_tokens"]) == (other["accuracy"], other["num_tokens"])
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)


@pytest.mark.parametrize("attempts", [SHORT, pytest.param(LONG, marks=pytest.mark.matrix)], ids=["short", "long"])
def test_a_run_moves_between_cuts(attempts, made: tuple[Path, Path], tmp_path: Path) -> None:
    model = {"path": str(made[0]), "weights": "fp32"}
    batch = {"global_tokens": 8 * tiny.SEQ_LEN, "micro_batch": 1}
    assert train(tiny.recipe(*made, tmp_path / "alone", model=model, batch=batch)) == 0
    recipe = tiny.write_recipe(
        tmp_path / "recipe.yaml", tiny.recipe(*made, tmp_path, model=model, batch=batch, evaluate={"every_steps": 5})
    )
    run = tmp_path / "tiny"
    for number, (engine, ranks, parts, stop) in enumerate(attempts):
        placed = ENGINES[engine] | ({} if parts == 1 else {"context_parallel": parts})
        fault = {} if stop is None else {"DIST_CPT_FAULT": f"step:rank0:step{stop}:term"}
        with RunningRanks(recipe, ranks, f"engine={json.dumps(placed)}", log=tmp_path / "log", **fault) as running:
            codes = running.finish()
        assert codes == [0 if stop is None else 75] * ranks, (tmp_path / "log").read_text()[-4000:]
        if number:
            assert json.loads((run / "certificate.json").read_text())["verdict"] == "pass"
    assert not any(verify_run(run).values())
    ours, alone = (rows(folder / "metrics.jsonl") for folder in (run, tmp_path / "alone/tiny"))
    assert len(ours) == STEPS
    for mine, other in zip(ours, alone, strict=True):
        _, ranks, parts, _ = attempts[mine["attempt"]]
        assert (mine.get("attention_max_over_mean", 0.0) >= 1.0) == (ranks > parts)  # blocks shared out over groups
        for exact in ("step", "position", "num_tokens", "tokens_by_source", "lr"):
            assert mine[exact] == other[exact]
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    evaluations = {row["step"]: row for row in rows(run / "evaluations.jsonl")}
    for row in rows(tmp_path / "alone/tiny/evaluations.jsonl"):
        assert evaluations[row["step"]]["num_tokens"] == row["num_tokens"]
        assert evaluations[row["step"]]["loss"] == pytest.approx(row["loss"], rel=1e-5)
        for mine, other in zip(evaluations[row["step"]]["loss_by_position"], row["loss_by_position"], strict=True):
            assert (mine[0], mine[2]) == (other[0], other[2])
            assert mine[1] == pytest.approx(other[1], rel=1e-5)
