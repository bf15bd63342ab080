"""A run over quantised experts: it resumes on them alone, two ranks share the codes, and its adapter fits the base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dist_cpt.checkpoint.verify import verify_checkpoint
from dist_cpt.export.merge import merge, quantisation_gap
from dist_cpt.run_folder.checkpoints import read_manifest
from tests import tiny
from tests.run_ranks import run_ranks
from tests.tiny_mixtures import write_moe
from tests.trained_checkpoint import IDS, plain_logits
from tests.whole_run import StopAfter, rows, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a base, a corpus)."""
    folder = tmp_path_factory.mktemp("made")
    corpus = tiny.write_corpus(folder / "corpus")
    base, tokenizer = write_moe(folder / "base", "qwen3_moe"), tiny.write_tokenizer(folder / "tokenizer", corpus)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, base / name)
    return base, corpus


def _recipe(made: tuple[Path, Path], output_dir: Path, weights: str) -> dict[str, Any]:
    values = tiny.recipe(*made, output_dir, embeddings={}, train={"tokens": 5 * 8 * tiny.SEQ_LEN})
    del values["data"]["validation"]
    return values | {"model": {"path": str(made[0]), "weights": weights}}


@pytest.mark.parametrize("weights", ["nf4", *(pytest.param(w, marks=pytest.mark.matrix) for w in ("int8", "fp8"))])
def test_a_run_resumes_and_two_ranks_train_as_one(weights: str, made: tuple[Path, Path], tmp_path: Path) -> None:
    from peft import PeftModel

    values = _recipe(made, tmp_path / "runs", weights)
    assert train(values, StopAfter(3)) == 75
    assert train(values) == 0
    run = tmp_path / "runs" / "tiny"
    assert json.loads((run / "certificate.json").read_text())["verdict"] == "pass"
    assert all(check["passed"] for check in json.loads((run / "contract.json").read_text())["checks"])
    checkpoint = run / "checkpoints" / "step-00000005"
    assert verify_checkpoint(checkpoint) == []
    assert "gate_up_proj" in read_manifest(checkpoint).base["weights_quantisation"]["experts"]

    gap = quantisation_gap(checkpoint)
    assert gap is not None
    assert 0 < gap < 0.5
    merge(checkpoint, tmp_path / "merged", "fp32")
    merged, base = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
                    for path in (tmp_path / "merged", made[0]))  # fmt: skip
    adapted = plain_logits(PeftModel.from_pretrained(base, str(checkpoint)), IDS)
    torch.testing.assert_close(plain_logits(merged, IDS), adapted, rtol=0, atol=1e-5)

    path = tiny.write_recipe(tmp_path / "recipe.yaml", values | {"name": "two"})
    engine = {"nf4": "{kind: fsdp, shard: full, activation_checkpointing: full}"}.get(weights, "{kind: zero, stage: 3}")
    assert run_ranks(path, 2, f"engine={engine}", log=tmp_path / "log") == [0, 0], (tmp_path / "log").read_text()
    alone, together = (
        [row["loss"] for row in rows(tmp_path / "runs" / name / "metrics.jsonl")] for name in ("tiny", "two")
    )
    assert together == pytest.approx(alone, rel=2e-3)
    frozen = json.loads((tmp_path / "runs" / "two" / "contract.json").read_text())["frozen"]["num_parameters_per_rank"]
    assert max(frozen) < 0.55 * sum(frozen)
