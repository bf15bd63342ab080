"""The recipe with a real model: its data script on small text, its plan, and the figures of its page."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from dist_cpt.config.load import load_recipe
from dist_cpt.plan.devices import machine_of
from dist_cpt.plan.plan import make_plan

FOLDER = Path(__file__).parents[2] / "recipes/qwen3-8b_caselaw"
QWEN3_8B = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}


def script() -> Any:
    spec = importlib.util.spec_from_file_location("make_data", FOLDER / "make_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("gpu", ["h100", "a100"])
def test_the_page_has_the_figures_of_the_plan(gpu):
    config = load_recipe(FOLDER / "recipe.yaml")
    own = make_plan(config, QWEN3_8B, machine_of(gpu, 1, 8, "50GBps")).own
    assert own is not None
    tokens = config.train.tokens
    assert tokens is not None
    hours = tokens / own.tokens_per_second / 3600
    row = (
        f"| {gpu.upper()} 80 GB | {own.tokens_per_second:,.0f} | {own.peak_bytes / 1e9:.1f} GB "
        f"| {hours:.1f} h | {8 * hours:.0f} |"
    )
    assert row in (FOLDER / "README.md").read_text()


def test_the_data_script_puts_a_document_on_one_side_in_parts(tmp_path, monkeypatch):
    made = script()
    monkeypatch.setattr(made, "PART_BYTES", 20_000)
    texts = [f"opinion {number} " * 9 for number in range(3000)]
    train, held_out = made.write_parts([*texts, texts[0]], tmp_path, "", 60_000)

    def read(pattern: str) -> list[str]:
        files = sorted(tmp_path.glob(pattern))
        return [json.loads(line)["text"] for file in files for line in gzip.open(file, "rt").read().splitlines()]

    kept, aside = read("train-*.jsonl.gz"), read("held-out.jsonl.gz")
    assert len(list(tmp_path.glob("train-*"))) > 5
    assert sum(map(len, kept)) == train >= 60_000 * made.CHARACTERS_PER_TOKEN
    assert sum(map(len, aside)) == held_out > 0
    assert not set(kept) & set(aside)
    assert [*kept, *aside] != []
    assert sorted([*kept, *aside]) == sorted(texts[: len(kept) + len(aside)])
