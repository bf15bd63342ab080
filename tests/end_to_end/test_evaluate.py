"""`dist-cpt evaluate`, means of checkpoints and scales of layers, on one finished run."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dist_cpt.errors import EXIT_CONFIG
from dist_cpt.run_folder.audit import record_problems
from tests import tiny
from tests.command import command
from tests.whole_run import rows, train

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
STEPS = ("step-00000012", "step-00000008", "step-00000004")


@pytest.fixture(scope="module")
def run(made, tmp_path_factory) -> Path:
    """A finished run with three checkpoints."""
    out = tmp_path_factory.mktemp("evaluate")
    values = tiny.recipe(*made, out, model={"path": str(made[0]), "weights": "fp32"})
    assert train(values) == 0
    return out / "tiny"


def test_a_run_is_measured_as_it_measured_itself(run, made):
    before = rows(run / "evaluations.jsonl")
    ended = command("evaluate", run, "--against-base", "--json")
    assert ended.code == 0, ended.err
    (row,) = json.loads(ended.out)["results"]
    first, last = before
    for key in ("name", "role", "num_tokens"):
        assert row[key] == last[key]
    for key in ("loss", "perplexity", "bits_per_byte", "base_loss"):
        assert row[key] == pytest.approx(last[key], rel=1e-6), key
    assert rows(run / "evaluated.jsonl") == [row]
    assert row["step"] == 12
    assert rows(run / "evaluations.jsonl") == before
    assert record_problems(run) == []

    held_out = made[1].parent / "held-out.jsonl"
    ended = command("evaluate", made[0], "--data", held_out, "--seq-len", tiny.SEQ_LEN, "--json")
    (of_base,) = json.loads(ended.out)["results"]
    assert of_base["loss"] == pytest.approx(first["loss"], rel=1e-6)
    assert of_base["num_tokens"] == first["num_tokens"]
    longer = command("evaluate", run / "checkpoints" / STEPS[1], "--data", held_out, "--seq-len", 200)
    assert longer.out.startswith("held-out: loss ")
    assert f"({of_base['num_tokens']:,} tokens)" in longer.out  # every token has its target whatever the length
    assert [one["step"] for one in rows(run / "evaluated.jsonl")] == [12, 8]


def test_a_needle_is_looked_for_in_the_runs_own_text(run):
    before = rows(run / "evaluated.jsonl") if (run / "evaluated.jsonl").exists() else []
    ended = command("evaluate", run, "--needle", "160,240", "--limit", 2, "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)["results"]
    assert [row["task"] for row in found] == ["needle_160", "needle_240"]  # the sets are not measured
    for row in found:
        depths = [row[f"depth_{depth}"] for depth in ("0", "0.25", "0.5", "0.75", "1")]
        assert (row["samples"], row["step"], row["chance"]) == (10, 12, 0.125)
        assert row["accuracy"] == pytest.approx(sum(depths) / 5)
        assert row["accuracy"] <= 0.5  # a model of 12 steps finds nothing
    assert rows(run / "evaluated.jsonl") == before + found
    again = command("evaluate", run, "--needle", "160", "--limit", 2)
    assert again.out.startswith(f"needle_160: accuracy {found[0]['accuracy']:.4f}, chance 0.1250, depth_0 ")


def dense(checkpoint: Path, module: str) -> torch.Tensor:
    """The update B A of one layer in fp64; rank 4 and alpha 4 under rsLoRA."""
    tensors = load_file(checkpoint / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{module}.lora_{part}.weight"].double() for part in "AB")
    return b @ a * (4 / 4**0.5)


def weights(folder: Path) -> dict[str, Any]:
    return load_file(folder / "model.safetensors")


def test_the_mean_of_checkpoints_is_that_of_their_products(run, made, tmp_path):
    ended = command("merge", run, "--last", 3, "--out", tmp_path / "mean", "--dtype", "fp32")
    assert ended.code == 0, ended.err
    assert ended.out.startswith(f"the mean of {', '.join(STEPS)}")
    mean, base = weights(tmp_path / "mean"), weights(made[0])
    checkpoints = [run / "checkpoints" / step for step in STEPS]
    module = "model.layers.1.mlp.down_proj"
    expected = base[f"{module}.weight"].double() + sum(dense(one, module) for one in checkpoints) / 3
    torch.testing.assert_close(mean[f"{module}.weight"].double(), expected, rtol=0, atol=2e-7)
    adapters = [load_file(one / "adapter_model.safetensors") for one in checkpoints]
    names = [f"base_model.model.{module}.lora_{part}.weight" for part in "AB"]
    a, b = (sum(adapter[name].double() for adapter in adapters) / 3 for name in names)
    assert float((base[f"{module}.weight"].double() + b @ a * 2 - expected).abs().max()) > 1e-5  # A and B apart
    key = next(key for key in adapters[0] if key.endswith("embed_tokens.weight"))
    whole = sum(adapter[key].double() for adapter in adapters) / 3
    torch.testing.assert_close(mean["model.embed_tokens.weight"].double(), whole, rtol=0, atol=2e-7)
    assert torch.equal(mean["model.norm.weight"], base["model.norm.weight"])

    ended = command("merge", run, "--last", 4, "--out", tmp_path / "four")
    assert ended.code == EXIT_CONFIG
    assert "has 3 valid checkpoints" in ended.error_lines[0]


def test_a_scale_of_some_layers_leaves_the_others(run, made, tmp_path):
    assert command("merge", run, "--out", tmp_path / "whole", "--dtype", "fp32").code == 0
    options = ("--scale", 0, "--layers", "0:1", "--out", tmp_path / "part", "--dtype", "fp32")
    ended = command("merge", run, *options, "--sweep", "0,1")
    assert ended.code == 0, ended.err
    part, whole, base = (weights(folder) for folder in (tmp_path / "part", tmp_path / "whole", made[0]))
    for name, values in part.items():
        assert torch.equal(values, base[name] if ".layers.0." in name else whole[name]), name
    measured = [float(line.split()[-1]) for line in ended.out.splitlines()[:2]]
    assert measured[1] == pytest.approx(rows(run / "evaluations.jsonl")[-1]["loss"], rel=1e-6)
    held_out = made[1].parent / "held-out.jsonl"
    ended = command("evaluate", tmp_path / "part", "--data", held_out, "--seq-len", tiny.SEQ_LEN, "--json")
    assert json.loads(ended.out)["results"][0]["loss"] == pytest.approx(measured[0], abs=2e-6)


def test_options_that_would_do_nothing_are_refused(run, made, tmp_path):
    for arguments, named in (
        (("evaluate", run, "--limit", 5), "belongs to --tasks"),
        (("evaluate", run, "--needle", "8k"), "--needle 8k: give lengths"),
        (("evaluate", run, "--needle", "20"), "the sentences alone need"),
        (("evaluate", made[0], "--needle", "200"), "--data"),
        (("evaluate", made[0]), "--data"),
        (("evaluate", run, "--seq-len", 32), "belong to --data"),
        (("evaluate", made[0], "--data", made[1], "--against-base"), "does not record a base"),
        (("evaluate", made[1].parent), "config.json"),
        (("merge", run, "--layers", "0:1", "--out", tmp_path / "x"), "--layers belongs to"),
        (("merge", run, "--layers", "1", "--sweep", "1"), "give A:B"),
        (("merge", run, "--layers", "1:3", "--sweep", "1"), "the model has layers 0 to 1"),
        (("merge", run, "--last", 2, "--base-only", "--out", tmp_path / "x"), "--base-only"),
        *(
            [(("evaluate", run, "--tasks", "arc_easy"), "pip install 'dist-cpt[eval]'")]
            if importlib.util.find_spec("lm_eval") is None
            else []
        ),
    ):
        ended = command(*arguments)
        assert ended.code == EXIT_CONFIG, arguments
        assert named in ended.error_lines[0], arguments


def write_task(folder: Path, corpus: Path) -> tuple[str, Path]:
    """A task of these tests' own, and its folder: which of two continuations of a text is the real one."""
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()[:12]]
    rows_ = [{"question": text[:40], "choices": [text[40:60], text[40:60][::-1]], "answer": 0} for text in texts]
    (folder / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_))
    (folder / "which.yaml").write_text(
        f"""task: which_continuation
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "task.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}, {{metric: acc_norm}}]
"""
    )
    return "which_continuation", folder


@pytest.mark.matrix
@pytest.mark.parametrize("ranks", [1, 2])
def test_tasks_during_a_run_have_the_scores_of_evaluate(made, tmp_path, ranks):
    pytest.importorskip("lm_eval", reason="needs the extra eval, which is not part of dev")
    name, folder = write_task(tmp_path, made[1])
    tasks = {"names": [name], "path": str(folder)}
    evaluate = {"every_steps": 4, "tasks": tasks, "best": {"of": f"{name}/acc,none", "patience": 9}}
    values = tiny.recipe(*made, tmp_path, model={"path": str(made[0]), "weights": "fp32"}, evaluate=evaluate)
    values["engine"] = "single" if ranks == 1 else {"kind": "fsdp", "shard": "full"}
    refused = copy.deepcopy(values)
    refused["evaluate"]["best"]["better"] = "lower"
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", refused)
    ended = command("launch", recipe, "--procs-per-node", ranks)
    assert ended.code == EXIT_CONFIG
    tiny.write_recipe(recipe, values)
    ended = command("launch", recipe, "--procs-per-node", ranks)
    assert ended.code == 0, ended.err
    during = {row["step"]: row for row in rows(tmp_path / "tiny/evaluations.jsonl") if row["role"] == "task"}
    assert list(during) == [0, 4, 8, 12]
    assert record_problems(tmp_path / "tiny") == []
    options = ("--tasks", name, "--tasks-path", folder, "--json")
    for step, model in ((0, made[0]), (12, tmp_path / "tiny")):
        ended = command("evaluate", model, *options)
        assert ended.code == 0, ended.err
        row = next(row for row in json.loads(ended.out[ended.out.index("{") :])["results"] if row.get("task") == name)
        for key in ("acc,none", "acc_norm,none"):
            assert during[step][key] == row[key], (step, key)
    ended = command("merge", tmp_path / "tiny", "--best", "--out", tmp_path / "best", "--dtype", "fp32")
    assert ended.code == 0, ended.err
    from dist_cpt.report.report import write_report

    assert "acc,none of which_continuation" in write_report(tmp_path / "tiny").read_text()


@pytest.mark.matrix
def test_tasks_of_lm_eval_from_local_files(run, made, tmp_path):
    pytest.importorskip("lm_eval", reason="needs the extra eval, which is not part of dev")
    write_task(tmp_path, made[1])
    options = ("--tasks", "which_continuation", "--tasks-path", tmp_path)
    ended = command("evaluate", run, *options, "--json")
    assert ended.code == 0, ended.err
    (row,) = json.loads(ended.out[ended.out.index("{") :])["results"]
    assert row["task"] == "which_continuation"
    assert 0.0 <= row["acc,none"] <= 1.0
    assert rows(run / "evaluated.jsonl")[-1] == row
    shutil.copytree(run / "checkpoints" / STEPS[0], tmp_path / STEPS[0])  # in no run
    ended = command("evaluate", tmp_path / STEPS[0], *options, "--limit", 3)
    assert ended.out.splitlines()[-1].startswith("which_continuation: ")
    ended = command("evaluate", run, "--tasks", "no_such_task")
    assert ended.code == EXIT_CONFIG
    assert "no_such_task" in ended.error_lines[0]
