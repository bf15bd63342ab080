"""Whole runs of hybrids, one type for each kind of recurrent layer: two ranks train as one, and a resume is exact."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dist_cpt.errors import ConfigError
from dist_cpt.export.merge import merge
from dist_cpt.run_folder.checkpoints import read_manifest
from tests import tiny
from tests.run_ranks import run_ranks
from tests.tiny_hybrids import write_hybrid
from tests.trained_checkpoint import IDS, plain_logits, trained
from tests.whole_run import StopAfter, rows, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer"),
]
LEFT_OUT = {
    "lfm2": {"conv.conv"},
    "qwen3_5_text": {f"linear_attn.{name}" for name in ("conv1d", "A_log", "dt_bias")},
    "bamba": {f"mamba.{name}" for name in ("conv1d", "A_log", "dt_bias", "D")},
}
ENGINES = {"fsdp-full": "{kind: fsdp, shard: full", "zero-3": "{kind: zero, stage: 3"}
FAST = ("bamba", "zero-3")
CELLS = [
    pytest.param(kind, engine, marks=() if (kind, engine) == FAST else pytest.mark.matrix)
    for kind in LEFT_OUT
    for engine in ENGINES
]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Any:
    """kind -> (its base, the corpus, one rank's run of four steps), each made when first asked for."""
    folder = tmp_path_factory.mktemp("hybrids")
    corpus = tiny.write_corpus(folder / "corpus")
    tokenizer = tiny.write_tokenizer(folder / "tokenizer", corpus)

    def make(kind: str) -> tuple[Path, Path, Path]:
        base = folder / kind
        if not base.exists():
            write_hybrid(base, kind)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copyfile(tokenizer / name, base / name)
            assert train(recipe(base, corpus, folder / f"{kind}-runs")) == 0
        return base, corpus, folder / f"{kind}-runs" / "tiny"

    return make


def recipe(base: Path, corpus: Path, output_dir: Path) -> dict[str, Any]:
    changes = {"model": {"path": str(base), "weights": "fp32"}, "checkpoint": {"every_steps": 2}}
    batch = {"global_tokens": 8 * tiny.SEQ_LEN, "micro_batch": 2}
    values = tiny.recipe(base, corpus, output_dir, batch=batch, train={"tokens": 4 * 8 * tiny.SEQ_LEN}, **changes)
    del values["data"]["validation"]
    return values


@pytest.mark.parametrize(("kind", "engine"), CELLS)
def test_two_ranks_train_as_one(kind: str, engine: str, made: Any, tmp_path: Path) -> None:
    """Their blocks have different numbers of documents, and backward runs every layer again."""
    base, corpus, single = made(kind)
    path = tiny.write_recipe(tmp_path / "recipe.yaml", recipe(base, corpus, tmp_path / "runs"))
    how = f"engine={ENGINES[engine]}, activation_checkpointing: full}}"
    assert run_ranks(path, 2, how, log=tmp_path / "log") == [0, 0], (tmp_path / "log").read_text()
    run = tmp_path / "runs" / "tiny"
    ours, theirs = ([row["loss"] for row in rows(folder / "metrics.jsonl")] for folder in (run, single))
    assert ours == pytest.approx(theirs, rel=2e-4)
    contract = json.loads((run / "contract.json").read_text())
    assert all(check["passed"] for check in contract["checks"]), contract["checks"]
    assert set(contract["left_out"]) == LEFT_OUT[kind]
    frozen = contract["frozen"]["num_parameters_per_rank"]
    assert engine != "fsdp-full" or max(frozen) < 0.55 * sum(frozen)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k == "bamba" else pytest.mark.matrix) for k in LEFT_OUT])
def test_a_resume_is_exact_and_the_merged_folder_is_vanilla_peft(kind: str, made: Any, tmp_path: Path) -> None:
    """Also where the config has a number that JSON lacks: Mamba's time step has no upper limit."""
    from peft import PeftModel

    base, corpus, unbroken = made(kind)
    values = recipe(base, corpus, tmp_path / "runs")
    assert train(values, StopAfter(2)) == 75
    assert train(values) == 0
    checkpoint = tmp_path / "runs" / "tiny" / "checkpoints" / "step-00000004"
    assert read_manifest(checkpoint).tensors == read_manifest(unbroken / "checkpoints" / checkpoint.name).tensors

    assert merge(checkpoint, tmp_path / "merged", "fp32") < 1e-4
    plain, merged = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (base, tmp_path / "merged"))
    before = plain_logits(plain, IDS)
    adapted = plain_logits(PeftModel.from_pretrained(plain, str(checkpoint)), IDS)
    assert float((adapted - before).abs().max()) > 1e-3
    torch.testing.assert_close(plain_logits(merged, IDS), adapted, rtol=0, atol=1e-5 * float(adapted.abs().max()))


def test_an_adapter_that_peft_would_not_open_is_refused(tmp_path: Path) -> None:
    base = write_hybrid(tmp_path / "base", "falcon_h1")
    model = trained({"path": str(base), "weights": "fp32"}, embeddings={})
    assert not any("out_proj" in name for name in model.trainable)
    assert any("in_proj" in name for name in model.trainable)
    assert {"mamba.out_proj", "mamba.conv1d", "mamba.A_log"} < set(model.left_out)
    with pytest.raises(ConfigError, match=r"adapter\.targets: out_proj: PEFT does not open"):
        trained({"path": str(base)}, adapter={"rank": 4, "targets": ["in_proj", "out_proj"]})
