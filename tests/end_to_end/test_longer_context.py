"""The two recipes that make a context longer, at tiny scale: 64 tokens to 256 to 1,024."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

from dist_cpt.config.load import load_recipe
from dist_cpt.config.resolve import step_shape
from dist_cpt.errors import EXIT_CONFIG
from tests import tiny
from tests.command import command
from tests.published_recipes import RECIPES, recipe_file
from tests.whole_run import rows, train

# PEFT 0.21.2 still asks for a property that transformers 5.23 renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
NAMES = ("llama3-8b_context-1-32k_fsdp_8xH100", "llama3-8b_context-2-128k_fsdp_8xH100")


def test_the_second_stage_continues_the_first_under_another_rotation(made, tmp_path, capsys):
    base = tiny.write_base(tmp_path / "base", made[0], max_position_embeddings=64)
    checkpoint = ""
    for name, seq_len in zip(NAMES, (256, 1024), strict=True):
        data = {
            "seq_len": seq_len,
            "sources": [{"path": str(made[1]), "name": "long"}],
            "validation": [{"name": "long", "path": str(made[1].parent / "held-out.jsonl")}],
        }
        size = {"batch": {"global_tokens": 2 * seq_len, "micro_batch": 1}, "train": {"tokens": 6 * 2 * seq_len}}
        values = recipe_file(name, tmp_path, 0, data, **size, evaluate={"every_steps": 3})
        values["model"] |= {"path": str(base), "weights": "fp32"}
        values["adapter"] |= {"rank": 4, "alpha": 4}
        if checkpoint:
            values["adapter"]["continue_from"] = checkpoint
            plain = values | {"name": "plain", "model": values["model"] | {"rope_scaling": None}}
            assert train(plain) == EXIT_CONFIG
            refused = capsys.readouterr().err
            assert "was trained with model.rope_scaling {rope_type: yarn, factor: 4}, the recipe has none" in refused
        assert train(values) == 0
        run = tmp_path / values["name"]
        assert [row["step"] for row in rows(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
        before, checkpoint = checkpoint, str(run / "checkpoints/step-00000006")
        adapter = json.loads((Path(checkpoint) / "adapter_config.json").read_text())
        assert adapter["dist_cpt_rope"]["scaling"]["factor"] == seq_len / 64
    continued = json.loads((run / "continued.json").read_text())
    adapter_file = Path(before) / "adapter_model.safetensors"
    assert continued["sha256"] == hashlib.sha256(adapter_file.read_bytes()).hexdigest()
    assert continued["loss_with"] < continued["loss_without"]
    ended = command("evaluate", run, "--needle", 1000, "--limit", 1, "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["results"][0]["task"] == "needle_1000"
    assert command("merge", run, "--out", tmp_path / "merged", "--dtype", "fp32").code == 0
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["max_position_embeddings"] == 1024
    assert config["rope_parameters"].items() >= {"rope_type": "yarn", "factor": 16}.items()


def test_stages_agree_on_what_they_share() -> None:
    """Stage 2 continues stage 1's last checkpoint, same base, rank and vocabulary, at four times the length."""
    one, two = (load_recipe(RECIPES / f"{name}.yaml") for name in NAMES)
    assert two.adapter.continue_from is not None
    last = step_shape(one, 8).num_steps
    assert two.adapter.continue_from.path.endswith(f"runs/{one.name}/checkpoints/step-{last:08d}")
    assert (one.model.path, one.adapter.rank, one.embeddings) == (two.model.path, two.adapter.rank, two.embeddings)
    page = (RECIPES.parent / "docs/long-context.md").read_text()
    for name in NAMES:
        figures = re.search(r"not measured: (.*) each, (.*) tokens/s", (RECIPES / f"{name}.yaml").read_text())
        assert figures is not None
        assert all(f"| {figure} |" in page for figure in figures.groups())
    for config, factor in ((one, 4), (two, 16)):
        assert config.model.rope_scaling is not None
        assert config.model.rope_scaling.factor == factor
        assert config.data.seq_len == 8192 * factor
