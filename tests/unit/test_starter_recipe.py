"""`dist-cpt init`: a recipe that loads, divides and is the fastest of its own plan."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.scaling import LLAMA_8B, LLAMA_70B
from dist_cpt.cli import app
from dist_cpt.config.load import load_recipe
from dist_cpt.config.resolve import resolve_paths
from dist_cpt.errors import ConfigError, WriteError
from dist_cpt.plan.devices import machine_of
from dist_cpt.plan.plan import make_plan, model_config, recipe_patch
from tests import tiny
from tests.plan_cases import model_folder


def init(tmp_path: Any, *arguments: str, model: dict[str, Any] = LLAMA_8B) -> Any:
    """The recipe that the command writes; some text lies in corpus/."""
    corpus = tmp_path / "corpus"
    corpus.mkdir(exist_ok=True)
    (corpus / "a: b.jsonl").write_text('{"text": "some text"}\n' * 1000)
    command = ["init", "--model", model_folder(tmp_path / "Model 8B", model), "--out", str(tmp_path / "new.yaml")]
    if "--data" not in arguments:
        command += ["--data", str(corpus)]
    CliRunner().invoke(app, [*command, *arguments], catch_exceptions=False)
    return tmp_path / "new.yaml"


@pytest.mark.parametrize(
    ("machine", "model"),
    [
        (("h100", 1, 8), LLAMA_8B),
        (("l40s", 1, 1), LLAMA_8B),
        (("h200", 2, 4), LLAMA_70B),
        (("cpu", 1, 2), tiny.llama()),
    ],
)
def test_the_recipe_is_the_fastest_of_its_plan(tmp_path, machine, model):
    gpu, nodes, gpus = machine
    options = ["--gpu", gpu, "--nodes", str(nodes), "--gpus", str(gpus)]
    config = resolve_paths(load_recipe(init(tmp_path, *options, model=model)))
    assert config.name == "model-8b-cpt"
    plan = make_plan(config, model_config(config), machine_of(gpu, nodes, gpus, "50GBps"))
    assert plan.own is not None
    assert plan.own.fits
    assert recipe_patch(config, plan.ways[0]) == {}
    assert config.model.weights == ("fp32" if gpu == "cpu" else "bf16")
    assert config.data.seq_len <= model["max_position_embeddings"] if "max_position_embeddings" in model else True


def test_little_text_gets_short_steps(tmp_path):
    text = init(tmp_path, "--gpus", "1")
    assert load_recipe(text).batch.global_tokens == 4096


def test_a_hub_data_set_gets_the_usual_step(tmp_path):
    text = init(tmp_path, "--data", "hf://datasets/org/name", "--gpus", "1")
    assert load_recipe(text).batch.global_tokens == 262_144


def test_an_existing_file_is_not_overwritten(tmp_path):
    (tmp_path / "new.yaml").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        init(tmp_path)
    assert (tmp_path / "new.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (["--data", "nowhere/*.txt"], ConfigError, "--data nowhere"),
        (["--gpu", "l40s", "--gpus", "1"], ConfigError, "does not fit on 1 x L40S"),
        (["--out", "/proc/none/new.yaml", "--gpu", "h200"], WriteError, "cannot be written"),
    ],
)
def test_mistakes_are_one_line(tmp_path, arguments, error, said):
    model = LLAMA_70B | {"hidden_size": 131_072, "intermediate_size": 524_288} if "l40s" in arguments else LLAMA_8B
    with pytest.raises(error) as raised:
        init(tmp_path, *arguments, model=model)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
