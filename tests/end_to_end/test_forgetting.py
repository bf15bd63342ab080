"""The forgetting gauge in whole runs: its numbers against an independent computation, and every policy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_cpt.errors import ConfigError
from dist_cpt.export.merge import merge
from dist_cpt.run_folder.audit import record_problems
from tests import tiny
from tests.command import command
from tests.run_ranks import run_ranks
from tests.whole_run import StopAfter, built, rows, train

KEPT, LIMIT = "kept", 0.02


def recipe(made: tuple[Path, Path], out: Path, **changes: Any) -> dict[str, Any]:
    """A run that learns documentation, and forgets what it never sees: characters of other scripts."""
    strange = out / "strange.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    lines = [chr(0x400 + i % 64) * (1 + i % 7) + chr(0xAC00 + 3 * i) * 5 for i in range(200)]
    strange.write_text("".join(json.dumps({"text": " ".join(lines[i : i + 20])}) + "\n" for i in range(0, 200, 20)))
    values = tiny.recipe(*made, out, model={"path": str(made[0]), "weights": "fp32"}, **changes)
    values["data"]["validation"].append({"name": KEPT, "path": str(strange), "role": "retention"})
    return values


@torch.no_grad()
def loss_and_bytes(folder: Path, text_file: Path) -> tuple[float, int, int]:
    """Mean loss, targets and bytes of a jsonl file by a plain transformers model, one piece of a document at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total, targets, size = 0.0, 0, 0
    for line in text_file.read_text(encoding="utf-8").splitlines():
        text = json.loads(line)["text"]
        ids = torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
        first = tokenizer.convert_ids_to_tokens(int(ids[0]))
        size += len(text.encode()) - len(first)  # of a byte-level token one byte per character
        for start in range(0, len(ids) - 1, tiny.SEQ_LEN):
            inputs, labels = ids[start : start + tiny.SEQ_LEN], ids[start + 1 : start + tiny.SEQ_LEN + 1]
            logits = model(input_ids=inputs[None]).logits[0, : len(labels)].double()
            total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            targets += len(labels)
    return total / targets, targets, size


def by_set(run: Path, step: int) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in rows(run / "evaluations.jsonl") if row["step"] == step}


def test_the_gauge_equals_an_independent_computation_with_two_models(made, tmp_path):
    """Also after a resume that has to find the base's losses again, with trained matrices and adapter in the engine."""
    values = recipe(made, tmp_path)
    run = tmp_path / "tiny"
    assert train(values, StopAfter(4)) == 75
    first = json.loads((run / "base_losses.json").read_text())
    (run / "base_losses.json").unlink()
    assert train(values) == 0
    assert json.loads((run / "base_losses.json").read_text()) == first
    merge(run / "checkpoints/step-00000012", tmp_path / "merged", "fp32")
    files = {entry["name"]: Path(entry["path"]) for entry in values["data"]["validation"]}
    before, after = by_set(run, 0), by_set(run, 12)
    for name, file in files.items():
        base, num_tokens, num_bytes = loss_and_bytes(made[0], file)
        trained, _, _ = loss_and_bytes(tmp_path / "merged", file)
        assert before[name]["loss"] == before[name]["base_loss"] == after[name]["base_loss"]
        assert after[name]["base_loss"] == pytest.approx(base, abs=1e-6)
        assert after[name]["loss"] == pytest.approx(trained, abs=1e-6)
        assert after[name]["num_tokens"] == num_tokens
        bits = trained * num_tokens / math.log(2) / num_bytes
        assert after[name]["bits_per_byte"] == pytest.approx(bits, abs=1e-6)
    assert after[KEPT]["loss"] - after[KEPT]["base_loss"] > 0.05
    assert record_problems(run) == []


def messages(run: Path) -> list[str]:
    return [row["text"] for row in rows(run / "events.jsonl") if row["kind"] == "message"]


def test_a_run_that_forgets_stops_saved_and_stays_stopped(made, tmp_path):
    stop = {"every_steps": 2, "forgetting": {"policy": "stop", "loss_rise": LIMIT}}
    values = recipe(made, tmp_path, evaluate=stop)
    run = tmp_path / "tiny"
    for _ in range(2):  # the second time it is restored, and ends where it was
        assert train(values) == 0
        ended = json.loads((run / "exit.json").read_text())
        step = ended["step"]
        assert 0 < step < 12
        assert ended["code"] == 0
        assert ended["reason"].startswith(f"ended early: after step {step} the loss is above the base's by more than")
        assert (run / f"checkpoints/step-{step:08d}/manifest.json").is_file()
        assert rows(run / "metrics.jsonl")[-1]["step"] == step
    assert record_problems(run) == []
    from dist_cpt.checkpoint.finished import finished_step

    values["checkpoint"] = {"keep": 5}
    assert finished_step(run, built(values)) == step
    values["evaluate"] = {"every_steps": 2}
    assert finished_step(run, built(values)) is None
    assert train(values) == 0
    assert rows(run / "metrics.jsonl")[-1]["step"] == 12


def test_a_run_that_forgets_says_so_once_and_keeps_its_best_checkpoint(made, tmp_path):
    best = {"every_steps": 2, "forgetting": {"policy": "keep_best", "loss_rise": LIMIT}}
    values = recipe(made, tmp_path, evaluate=best, checkpoint={"every_steps": 3, "keep": 1})
    run = tmp_path / "tiny"
    assert train(values, StopAfter(7)) == 75
    assert train(values) == 0
    domain = {row["step"]: row["loss"] for row in rows(run / "evaluations.jsonl") if row["role"] == "domain"}
    rise = {
        row["step"]: row["loss"] - row["base_loss"] for row in rows(run / "evaluations.jsonl") if row["name"] == KEPT
    }
    over = sorted(step for step in rise if rise[step] > LIMIT)
    (said,) = [text for text in messages(run) if text.startswith("forgetting: ")]
    assert said.startswith(f"forgetting: after step {over[0]} ")
    assert said.endswith(f": {KEPT} by {rise[over[0]]:.4f}")
    assert len(over) > 1
    expected = min((step for step in domain if step and step not in over), key=domain.__getitem__)
    assert expected % 3  # not saved by schedule
    kept = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert kept == [f"step-{expected:08d}", "step-00000012"]
    assert f"the best evaluation so far is that of step {expected}, whose checkpoint is kept" in messages(run)


def test_a_run_ends_once_its_best_is_past_and_merges_that(made, tmp_path):
    """Best is the least change of text that the run never reads: the first evaluation, as the loss rises from there."""
    best = {"of": KEPT, "patience": 2}
    evaluate = {"every_steps": 2, "best": best}
    values = recipe(made, tmp_path, evaluate=evaluate, checkpoint={"every_steps": 3, "keep": 1})
    run = tmp_path / "tiny"
    assert train(values, StopAfter(3)) == 75
    for _ in range(2):  # the second time it is restored, and ends where it was
        assert train(values) == 0
        losses = {row["step"]: row["loss"] for row in rows(run / "evaluations.jsonl") if row["name"] == KEPT}
        first = min(list(losses)[1:], key=losses.__getitem__)
        last = max(losses)
        assert last == first + 4 < 12
        reason = f"ended early: {KEPT} is best after step {first}, and no better in the 2 evaluations since"
        assert json.loads((run / "exit.json").read_text())["reason"] == reason
    names = [f"step-{step:08d}" for step in (first, last)]
    assert sorted(path.name for path in (run / "checkpoints").glob("step-*")) == names

    ended = command("merge", run, "--best", "--out", tmp_path / "best", "--dtype", "fp32")
    assert ended.code == 0, ended.err
    assert f"the best checkpoint is {names[0]}" in ended.err
    held_out = next(entry["path"] for entry in values["data"]["validation"] if entry["name"] == KEPT)
    assert loss_and_bytes(tmp_path / "best", Path(held_out))[0] == pytest.approx(losses[first], abs=1e-6)

    values["evaluate"] = evaluate | {"best": best | {"patience": 9}}
    assert train(values) == 0
    assert rows(run / "metrics.jsonl")[-1]["step"] == 12
    assert record_problems(run) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"evaluate.best": {"of": "no-set"}, "evaluate.every_steps": 2}, "nothing to compare"),
        ({"evaluate.best": {"of": KEPT}}, "only the last step would be evaluated"),
        ({"data.validation": []}, "nothing that could be forgotten"),
        ({"evaluate.against": None}, "no base to compare with"),
    ],
)
def test_a_limit_without_effect_is_refused(made, tmp_path, changes, problem):
    values = recipe(made, tmp_path, evaluate={"forgetting": {"policy": "stop"}})
    for key, value in changes.items():
        section, name = key.split(".")
        values[section] = values[section] | {name: value}
    with pytest.raises(ConfigError, match=problem):
        built(values)


def test_a_best_by_a_number_that_no_row_has_is_refused_before_the_first_step(made, tmp_path):
    values = recipe(made, tmp_path, evaluate={"every_steps": 2, "best": {"of": f"{KEPT}/accuracy"}})
    assert train(values) == 64
    reason = json.loads((tmp_path / "tiny/exit.json").read_text())["reason"]
    assert f"the evaluation of {KEPT} has no finite 'accuracy' -- use one of bits_per_byte, loss, perplexity" in reason
    assert not (tmp_path / "tiny/metrics.jsonl").exists()


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("engine", "ranks"),
    [({"kind": "fsdp", "shard": "full"}, 2), ({"kind": "zero", "stage": 3}, 2), ({"kind": "zero", "stage": 1}, 3)],
)
def test_the_gauge_is_exact_over_ranks_and_engines(made, tmp_path, engine, ranks):
    values = recipe(made, tmp_path, evaluate={"every_steps": 6}, batch={"global_tokens": 6 * tiny.SEQ_LEN})
    values["train"] = {"tokens": 6 * 6 * tiny.SEQ_LEN}
    assert train(values | {"name": "one"}) == 0
    path = tiny.write_recipe(tmp_path / "recipe.yaml", values | {"engine": engine})
    assert run_ranks(path, ranks, log=tmp_path / "log") == [0] * ranks, (tmp_path / "log").read_text()
    for step in (0, 6):
        alone, together = by_set(tmp_path / "one", step), by_set(tmp_path / "tiny", step)
        for name, row in alone.items():
            assert together[name]["num_tokens"] == row["num_tokens"]
            for key in ("base_loss", "loss", "bits_per_byte"):
                assert together[name][key] == pytest.approx(row[key], abs=1e-6 if key == "base_loss" else 1e-4), key
