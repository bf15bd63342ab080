"""A whole run over an NF4 base: its contract holds, it resumes, and it takes no other base for its own."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from dist_cpt.checkpoint.load import require_fit
from dist_cpt.errors import CheckpointError
from dist_cpt.run_folder.checkpoints import read_manifest
from dist_cpt.run_folder.manifest import Identity
from dist_cpt.training_state import TensorSpec
from tests import tiny
from tests.whole_run import rows, train


def test_a_run_over_nf4_resumes_on_nf4_alone(tmp_path: Path) -> None:
    corpus = tiny.write_corpus(tmp_path / "corpus")
    base = tiny.write_base(tmp_path / "base", tiny.write_tokenizer(tmp_path / "tokenizer", corpus))
    values = tiny.recipe(base, corpus, tmp_path / "runs", model={"path": str(base), "weights": "nf4"})
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
    with pytest.raises(CheckpointError, match=r"base\.weights .*'nf4'.*None"):
        require_fit(manifest, specs, replace(here, base=plain))
