"""A whole run over a quantised base: its contract holds, it resumes, and it takes no other base for its own."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from dist_cpt.checkpoint.load import require_fit
from dist_cpt.errors import CheckpointError
from dist_cpt.export.merge import quantisation_gap
from dist_cpt.run_folder.checkpoints import read_manifest
from dist_cpt.run_folder.manifest import Identity
from dist_cpt.training_state import TensorSpec
from tests import tiny
from tests.whole_run import rows, train


@pytest.mark.parametrize("weights", ["nf4", "fp8"])
def test_a_run_over_codes_resumes_on_them_alone(weights: str, tmp_path: Path) -> None:
    corpus = tiny.write_corpus(tmp_path / "corpus")
    base = tiny.write_base(tmp_path / "base", tiny.write_tokenizer(tmp_path / "tokenizer", corpus))
    values = tiny.recipe(base, corpus, tmp_path / "runs", model={"path": str(base), "weights": weights})
    assert train(values) == 0
    folder = tmp_path / "runs" / "tiny"
    contract = json.loads((folder / "contract.json").read_text())
    assert all(check["passed"] for check in contract["checks"])
    assert "uint8" in contract["frozen"]["dtype"]
    losses = [row["loss"] for row in rows(folder / "metrics.jsonl")]

    shutil.rmtree(folder / "checkpoints" / "step-00000012")
    assert train(values) == 0
    certificate = json.loads((folder / "certificate.json").read_text())
    assert certificate["verdict"] == "pass"
    assert [row["loss"] for row in rows(folder / "metrics.jsonl")] == losses

    manifest = read_manifest(folder / "checkpoints" / "step-00000012")
    specs = [TensorSpec(tensor.name, tensor.shape, tensor.dtype, tensor.group) for tensor in manifest.tensors]
    here = Identity(manifest.base, manifest.data, manifest.recipe, manifest.engine)
    require_fit(manifest, specs, here)
    plain = {key: value for key, value in manifest.base.items() if not key.startswith("weights")}
    with pytest.raises(CheckpointError, match=rf"base\.weights .*'{weights}'.*None"):
        require_fit(manifest, specs, replace(here, base=plain))


@pytest.mark.matrix
def test_fp8_learns_what_bf16_learns(tmp_path: Path) -> None:
    """48 steps in which the perplexity halves: held-out loss within 1 %, and merged logits with their gap."""
    corpus = tiny.write_corpus(tmp_path / "corpus")
    base = tiny.write_base(tmp_path / "base", tiny.write_tokenizer(tmp_path / "tokenizer", corpus))
    losses = {}
    for weights in ("bf16", "fp8"):
        values = tiny.recipe(base, corpus, tmp_path / weights, model={"path": str(base), "weights": weights})
        values |= {"train": {"tokens": 48 * 8 * tiny.SEQ_LEN}, "checkpoint": {"every_steps": 48}}
        assert train(values) == 0
        evaluations = rows(tmp_path / weights / "tiny" / "evaluations.jsonl")
        losses[weights] = evaluations[0]["loss"], evaluations[-1]["loss"]
    assert losses["bf16"][1] < losses["bf16"][0] - math.log(2), losses
    assert abs(losses["fp8"][1] - losses["bf16"][1]) <= 0.01 * losses["bf16"][1], losses
    gap = quantisation_gap(next((tmp_path / "fp8" / "tiny" / "checkpoints").iterdir()))
    assert gap is not None
    assert 0 < gap < 1
