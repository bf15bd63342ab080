"""LoRA+, DoRA and PiSSA: who trains at which rate, what is refused and why, and a PiSSA run to its end and beyond."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_cpt.adapters.peft_folder import canonical_key, canonical_name
from dist_cpt.adapters.pissa import principal_part
from dist_cpt.checkpoint.verify import verify_checkpoint
from dist_cpt.config.load import build
from dist_cpt.errors import EXIT_CONFIG, ConfigError
from dist_cpt.export.formats import export_peft
from dist_cpt.export.merge import merge
from dist_cpt.export.sweep import sweep
from dist_cpt.optim.groups import param_groups, state_dtype
from dist_cpt.optim.schedule import learning_rates
from dist_cpt.run_folder.checkpoints import read_manifest
from dist_cpt.run_folder.names import INITIAL_ADAPTER
from tests import tiny
from tests.command import command
from tests.whole_run import StopAfter, rows, train

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TRAINABLE = {
    "m.lora_A.weight": torch.zeros(2, 8),
    "m.lora_B.weight": torch.zeros(8, 2),
    "m.lora_magnitude_vector": torch.zeros(8),
    "lm_head.weight": torch.zeros(16, 8),
}


def config(**changes: Any):
    values = tiny.recipe(Path("base"), Path("corpus.jsonl"), Path("runs"))
    return build(values | changes, "recipe.yaml")


def test_lora_plus_has_a_group_of_its_own():
    recipe = config(
        adapter={"lora_plus_ratio": 16.0},
        optim={"lr": 1e-3, "embedding_lr": 1e-4, "weight_decay": 0.1, "state": "8bit"},
        schedule={"per_group": {"adapter": {"kind": "constant", "warmup_fraction": 0.5}}},
    )
    groups = {g.name: g for g in param_groups(TRAINABLE, recipe.optim, True, 0, recipe.adapter.lora_plus_ratio)}
    assert {name: g.names for name, g in groups.items()} == {
        "adapter": ("m.lora_A.weight",),
        "adapter_b": ("m.lora_B.weight",),
        "embeddings": ("lm_head.weight",),
        "no_decay": ("m.lora_magnitude_vector",),
    }
    assert {name: g.peak_lr for name, g in groups.items()} == {
        "adapter": 1e-3,
        "adapter_b": 16e-3,
        "embeddings": 1e-4,
        "no_decay": 1e-3,
    }
    assert groups["adapter_b"].weight_decay == 0.1
    assert groups["no_decay"].weight_decay == 0.0
    assert state_dtype(groups["adapter_b"], recipe.optim) == "8bit"
    assert state_dtype(groups["no_decay"], recipe.optim) == "fp32"
    for step in (1, 5, 10):  # B keeps its distance from A, whatever shape A was given
        rates = learning_rates(recipe.schedule, list(groups.values()), step, 10)
        assert rates["adapter_b"] == pytest.approx(16 * rates["adapter"])
    assert [g.name for g in param_groups(TRAINABLE, recipe.optim, True)] == ["adapter", "embeddings", "no_decay"]


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({"adapter": {"kind": "none", "dora": True}, "embeddings": {}}, "adapter.kind: none, adapter.dora: true"),
        ({"adapter": {"kind": "none", "init": "pissa"}, "embeddings": {}}, "adapter.kind: none, adapter.init: pissa"),
        (
            {"adapter": {"kind": "none", "lora_plus_ratio": 4.0}, "embeddings": {}},
            "adapter.kind: none, adapter.lora_plus_ratio: 4.0",
        ),
        ({"adapter": {"lora_plus_ratio": 1.0}}, "adapter.lora_plus_ratio"),
        ({"adapter": {"dora": True, "init": "pissa"}}, "adapter.dora: true, adapter.init: pissa"),
        ({"adapter": {"init": "pissa", "continue_from": "old"}}, "adapter.init: pissa, adapter.continue_from"),
        (
            {"adapter": {"dora": True, "continue_from": {"path": "old", "mode": "stack"}}},
            "adapter.dora: true, adapter.continue_from.mode: stack",
        ),
        (
            {"adapter": {"dora": True}, "model": {"path": "b", "weights": "nf4"}},
            "model.weights: nf4, adapter.dora: true",
        ),
        (
            {"adapter": {"dora": True}, "model": {"path": "b", "weights": "int8"}},
            "model.weights: int8, adapter.dora: true",
        ),
        (
            {"adapter": {"init": "pissa"}, "model": {"path": "b", "weights": "nf4"}},
            "model.weights: nf4, adapter.init: pissa",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(changes: dict[str, Any], settings: str):
    with pytest.raises(ConfigError, match=settings) as caught:
        config(**changes)
    assert caught.value.exit_code == EXIT_CONFIG
    assert "\n" not in str(caught.value)


def test_doras_lengths_have_pefts_names():
    peft = "base_model.model.h.0.q.lora_magnitude_vector"
    assert canonical_name("causal_lm.base_model.model.h.0.q.lora_magnitude_vector.default.weight") == peft
    for spelled in (peft, f"{peft}.weight", f"{peft}.default", f"{peft}.default.weight"):
        assert canonical_key(spelled) == peft


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
def test_the_beginning_is_the_best_approximation_of_its_rank(shape: tuple[int, int]):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    a, b = principal_part(weight, 5, 0.7)
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    best = (u[:, :5] * s[:5]) @ v[:5]
    torch.testing.assert_close((0.7 * b @ a).double(), best, rtol=0, atol=1e-5)
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))  # the scale is shared out evenly


@pytest.mark.parametrize("variant", [{"dora": True}, {"lora_plus_ratio": 4.0}], ids=["dora", "lora+"])
def test_they_resume_to_the_bit(tmp_path: Path, variant: dict[str, Any]):
    corpus = tiny.write_corpus(tmp_path / "corpus")
    base = tiny.write_base(tmp_path / "base", tiny.write_tokenizer(tmp_path / "tokenizer", corpus))
    ends = []
    for name in ("broken", "unbroken"):
        adapter = {"rank": 4, "alpha": 4} | variant
        values = tiny.recipe(base, corpus, tmp_path / name, adapter=adapter, train={"tokens": 8 * 8 * tiny.SEQ_LEN})
        folder = tmp_path / name / "tiny"
        if name == "broken":
            assert train(values, StopAfter(4)) == 75
        assert train(values) == 0
        ends.append(read_manifest(folder / "checkpoints" / "step-00000008"))
    assert ends[0].tensors == ends[1].tensors
    assert ends[0].state_sha256 == ends[1].state_sha256


def test_a_pissa_run_resumes_to_the_bit_and_leaves_as_plain_lora(tmp_path: Path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    corpus = tiny.write_corpus(tmp_path / "corpus")
    base = tiny.write_base(tmp_path / "base", tiny.write_tokenizer(tmp_path / "tokenizer", corpus))
    values = tiny.recipe(
        base,
        corpus,
        tmp_path / "runs",
        model={"path": str(base), "weights": "fp32"},
        adapter={"rank": 4, "alpha": 4, "init": "pissa", "lora_plus_ratio": 4.0},
        embeddings={"train": ["lm_head"]},
        evaluate={"max_blocks": 4},
    )
    assert train(values) == 0
    folder = tmp_path / "runs" / "tiny"
    losses = [row["loss"] for row in rows(folder / "metrics.jsonl")]
    assert {g["name"] for g in json.loads((folder / "contract.json").read_text())["groups"]} == {
        "adapter",
        "adapter_b",
        "embeddings",
    }
    assert all(
        row["lr"]["adapter_b"] == pytest.approx(4 * row["lr"]["adapter"]) for row in rows(folder / "metrics.jsonl")
    )
    began, ended = (row["loss"] for row in rows(folder / "evaluations.jsonl"))

    shutil.rmtree(folder / "checkpoints" / "step-00000012")
    (folder / INITIAL_ADAPTER).unlink()  # then a checkpoint's is taken
    assert train(values) == 0
    assert json.loads((folder / "certificate.json").read_text())["verdict"] == "pass"
    assert [row["loss"] for row in rows(folder / "metrics.jsonl")] == losses
    last = folder / "checkpoints" / "step-00000012"
    assert verify_checkpoint(last) == []

    measured = dict(sweep(last, [0.0, 0.5, 1.0]))
    assert measured[0.0]["held-out"] == pytest.approx(began, rel=1e-5)  # PiSSA begins as the base
    assert measured[1.0]["held-out"] == pytest.approx(ended, rel=1e-5)
    assert measured[0.5]["held-out"] not in (measured[0.0]["held-out"], measured[1.0]["held-out"])

    ended = command("merge", folder, "--sweep", "0,1")
    assert (ended.code, len(ended.out.splitlines())) == (0, 2), ended.err
    assert ended.out.startswith(f"scale 0: held-out {measured[0.0]['held-out']:.6f}")

    assert merge(last, tmp_path / "merged", "fp32") < 1e-5
    assert export_peft(last, tmp_path / "plain") < 1e-5
    ids = torch.arange(0, 96, 3)[None]
    load = AutoModelForCausalLM.from_pretrained
    with torch.no_grad():
        expected = load(tmp_path / "merged", dtype=torch.float32)(ids).logits
        plain = PeftModel.from_pretrained(load(base, dtype=torch.float32), str(tmp_path / "plain")).eval()(ids).logits
        again = PeftModel.from_pretrained(load(base, dtype=torch.float32), str(last)).eval()(ids).logits
        assert float((load(base, dtype=torch.float32)(ids).logits - expected).abs().max()) > 1e-2
    torch.testing.assert_close(plain, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-4)  # PEFT decomposes the base anew, in fp32
    assert json.loads((tmp_path / "plain" / "adapter_config.json").read_text())["r"] == 8

    (last / INITIAL_ADAPTER).write_bytes((last / INITIAL_ADAPTER).read_bytes()[:-1] + b"x")
    assert any(INITIAL_ADAPTER in problem for problem in verify_checkpoint(last))
