"""Persistent buffers: weights that are no parameters, as DeepSeek's bias of a router. They are read with the base,
never train, and are written with all parameters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dist_cpt.checkpoint.verify import verify_checkpoint
from dist_cpt.errors import ConfigError
from dist_cpt.export.merge import merge
from dist_cpt.model.base_model import load_base, open_base
from dist_cpt.model.load import load_model
from tests import tiny
from tests.run_ranks import run_ranks
from tests.tiny_mixtures import write_moe
from tests.trained_checkpoint import CPU, IDS, plain_logits
from tests.whole_run import StopAfter, built, train

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    """(a base whose bias sends tokens elsewhere, a corpus)."""
    folder = tmp_path_factory.mktemp("made")
    corpus = tiny.write_corpus(folder / "corpus")
    base = write_moe(folder / "base", "deepseek_v3")
    tensors = load_file(base / "model.safetensors")
    tensors[BIAS] = torch.tensor([0.3, -0.2, 0.7, 0.1])  # not exact in bf16
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    tokenizer = tiny.write_tokenizer(folder / "tokenizer", corpus)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, base / name)
    return base, corpus


def _recipe(made: tuple[Path, Path], output_dir: Path, **changes: object) -> dict[str, object]:
    base, corpus = made
    values = tiny.recipe(base, corpus, output_dir, embeddings={}, train={"tokens": 4 * 8 * tiny.SEQ_LEN}, **changes)
    del values["data"]["validation"]
    return values | {"model": {"path": str(base), "weights": "fp32"}}


@pytest.mark.parametrize("weights", ["bf16", "fp32"])
def test_a_base_that_is_read_by_slices_has_them(weights, made):
    config = built(_recipe(made, Path("runs")) | {"model": {"path": str(made[0]), "weights": weights}})
    whole, by_slices = (dict(read(config, CPU)[0].named_buffers()) for read in (load_base, open_base))
    assert torch.equal(by_slices[BIAS], torch.tensor([0.3, -0.2, 0.7, 0.1]))
    assert by_slices.keys() == whole.keys()
    for name, buffer in whole.items():
        torch.testing.assert_close(by_slices[name], buffer, rtol=0, atol=0)


def test_a_folder_that_lacks_one_is_refused(made, tmp_path):
    base = shutil.copytree(made[0], tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    del tensors[BIAS]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    config = built(_recipe((base, made[1]), tmp_path))
    for read in (load_base, open_base):
        with pytest.raises(ConfigError, match=rf"lacks {BIAS}"):
            read(config, CPU)


def test_a_checkpoint_of_all_parameters_has_them(made, tmp_path):
    """Stopped and resumed, verified, opened by transformers and merged."""
    values = _recipe(made, tmp_path / "runs", adapter={"kind": "none"})
    assert train(values, StopAfter(2)) == 75
    assert train(values) == 0
    run = tmp_path / "runs" / "tiny"
    assert all(check["passed"] for check in json.loads((run / "certificate.json").read_text())["checks"])
    checkpoint = run / "checkpoints" / "step-00000004"
    assert verify_checkpoint(checkpoint) == []
    opened, info = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    state = opened.state_dict()
    assert torch.equal(state[BIAS], torch.tensor([0.3, -0.2, 0.7, 0.1]))
    masters = [load_file(file) for file in checkpoint.glob("model-0*.safetensors")]
    assert {name for file in masters for name in file} == state.keys() - {BIAS}
    assert all(torch.equal(state[name], value) for file in masters for name, value in file.items())
    merge(checkpoint, tmp_path / "merged", "fp32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(plain_logits(merged, IDS), plain_logits(opened, IDS), rtol=0, atol=1e-6)
    again = load_model(built(values | {"model": {"path": str(checkpoint), "weights": "fp32"}}), device=CPU)
    assert torch.equal(again.buffers[BIAS], state[BIAS])
    damaged = checkpoint / "model-buffers.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\1")
    assert verify_checkpoint(checkpoint) == [f"{damaged.name}: does not have the sha256 of the manifest"]


@pytest.mark.parametrize(
    ("engine", "adapter"),
    [
        ("kind: fsdp, shard: full", {"rank": 4, "alpha": 4}),
        pytest.param("kind: zero, stage: 3", {"kind": "none"}, marks=pytest.mark.matrix),
    ],
)
def test_two_ranks_train_with_them(engine, adapter, made, tmp_path):
    values = _recipe(made, tmp_path / "runs", adapter=adapter, batch={"global_tokens": 8 * tiny.SEQ_LEN})
    assert train(values | {"name": "alone"}) == 0
    path = tiny.write_recipe(tmp_path / "recipe.yaml", values)
    assert run_ranks(path, 2, f"engine={{{engine}}}", log=tmp_path / "log") == [0, 0], (tmp_path / "log").read_text()
    alone, together = (
        [json.loads(line)["loss"] for line in (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("alone", "tiny")
    )
    assert together == pytest.approx(alone, rel=2e-4)
