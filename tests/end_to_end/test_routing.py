"""Routers that train: transformers' own loss and gradients, names of PEFT, and where the tokens went."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dist_cpt.adapters.peft_folder import canonical_key
from dist_cpt.errors import ConfigError
from dist_cpt.export.formats import export_vllm
from dist_cpt.model.load import load_model
from dist_cpt.model.routing import Routing
from dist_cpt.report.report import write_report
from tests import tiny
from tests.tiny_mixtures import write_moe
from tests.trained_checkpoint import CPU, IDS, trained, write_checkpoint
from tests.wandb_session import record
from tests.whole_run import StopAfter, built, rows, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT 0.21.2 looks for the ranks of parameters among modules, and uses them all the same.
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),
]
KINDS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss")
DEFAULT = ("qwen2_moe", "gpt_oss")  # the first has a linear map whose name ends like the router's
Z = 0.01


def moe_with_loss(folder: Path, kind: str) -> Path:
    """A base whose config gives the balancing loss half the weight of a token's."""
    base = write_moe(folder, kind)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"router_aux_loss_coef": 0.5}))
    return base


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tokenizer")
    return tiny.write_tokenizer(root / "tokenizer", tiny.write_corpus(root / "corpus"))


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k in DEFAULT else pytest.mark.matrix) for k in KINDS])
def test_loss_and_gradients_are_those_of_transformers_under_peft(kind, tokenizer, tmp_path):
    """One document; its last token has no target and counts in neither."""
    from peft import PeftModel

    base = moe_with_loss(tmp_path / "base", kind)
    model = trained({"path": str(base), "weights": "fp32", "router": "train"})
    routers = [name for name in model.trainable if name.endswith((".gate.weight", ".router.weight"))]
    assert len(routers) == 2
    assert model.left_out == {}
    checkpoint = write_checkpoint(tmp_path / "step-1", model, tokenizer)
    length = IDS.shape[1]
    labels = torch.cat([IDS[:, 1:], torch.full((1, 1), -100)], dim=1)
    borders = torch.tensor([0, length], dtype=torch.int32)
    scaled, loss_sum = model.module.train()(IDS, torch.arange(length)[None], borders, length, labels, 1 / (length - 1))
    scaled.backward()

    vanilla = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), str(checkpoint), is_trainable=True
    ).train()
    mask = torch.ones_like(IDS)
    mask[0, -1] = 0
    out = vanilla(IDS, attention_mask=mask, labels=IDS, output_router_logits=True, use_cache=False)
    out.loss.backward()
    torch.testing.assert_close(scaled, out.loss, rtol=1e-5, atol=0)
    added = scaled.detach() - loss_sum / (length - 1)
    assert float(added) == pytest.approx(0.5 * float(out.aux_loss.detach()), rel=1e-4)
    theirs = {canonical_key(name): p.grad for name, p in vanilla.named_parameters() if p.requires_grad}
    assert theirs.keys() == model.trainable.keys()
    for name, parameter in model.trainable.items():
        assert parameter.grad is not None
        allowed = 1e-5 * max(1.0, float(theirs[name].abs().max()))
        torch.testing.assert_close(parameter.grad, theirs[name], rtol=0, atol=allowed)


def test_the_losses_are_means_over_tokens_of_all_forwards():
    """Two forwards of unequal size; the z-loss and the balancing loss written out in fp64."""

    class TopKRouter(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(3, 5, dtype=torch.float64))

        def forward(self, hidden_TD: torch.Tensor) -> Any:
            logits_TE = hidden_TD @ self.weight.T
            weights, index = logits_TE.softmax(-1).topk(2)
            return logits_TE, weights, index

    torch.manual_seed(0)
    routers = [TopKRouter(), TopKRouter()]
    routing = Routing(routers, balance=0.5, z=Z)
    expected: list[torch.Tensor] = []
    actual, totals = torch.zeros((), dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    num_targets = 0
    for size in (7, 4):
        hidden = torch.randn(size, 5, dtype=torch.float64)
        labels = torch.arange(size).masked_fill(torch.arange(size) == 2, -100)
        with routing.watching(labels):
            outputs = [router(hidden) for router in routers]
        loss = routing.loss()
        assert loss is not None
        actual = actual + loss
        kept = [(logits[labels != -100], index[labels != -100]) for logits, _, index in outputs]
        logits_RE = torch.cat([logits for logits, _ in kept])
        share_E = torch.cat([index for _, index in kept]).flatten().bincount(minlength=3).double() / len(logits_RE)
        balance = 3 * (share_E * logits_RE.softmax(-1).mean(0)).sum()
        z = logits_RE.exp().sum(-1).log().square().mean()
        targets = size - 1
        expected.append(targets * (0.5 * balance + Z * z))
        totals += targets * torch.stack([balance, z]).detach()
        num_targets += targets
    whole = torch.stack(expected).sum()
    torch.testing.assert_close(actual, whole, rtol=1e-12, atol=0)
    weights = [router.weight for router in routers]
    gradients = (torch.autograd.grad(loss, weights, retain_graph=True) for loss in (actual, whole))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    taken = routing.take()
    assert taken[2:].sum() == 2 * 2 * num_targets  # two experts a token in two layers
    summary = routing.summary(taken, num_targets)
    torch.testing.assert_close(summary[:2], totals / num_targets, rtol=1e-12, atol=0)


def test_after_twenty_steps_every_expert_with_tokens_has_moved_and_no_other(tokenizer, tmp_path):
    """A bias keeps every token from the last expert; the routers train, and half way the run is stopped and resumed."""
    base = write_moe(tmp_path / "base", "gpt_oss")
    tensors = load_file(base / "model.safetensors")
    for name in [name for name in tensors if name.endswith("router.bias")]:
        tensors[name][3] = -100.0
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).write_bytes((tokenizer / name).read_bytes())
    corpus = tiny.write_corpus(tmp_path / "corpus")
    values = tiny.recipe(
        base,
        corpus,
        tmp_path / "runs",
        model={"path": str(base), "weights": "fp32", "router": "train", "router_z_loss": Z},
        embeddings={},
        batch={"global_tokens": 2 * tiny.SEQ_LEN, "micro_batch": 1},
        train={"tokens": 20 * 2 * tiny.SEQ_LEN},
        optim={"lr": 1.0e-2, "weight_decay": 0.0},
    )
    del values["data"]["validation"]
    initial = {name: p.detach().clone() for name, p in load_model(built(values), device=CPU).trainable.items()}
    assert train(values, StopAfter(10)) == 75
    assert train(values) == 0
    run = tmp_path / "runs" / "tiny"
    assert all(check["passed"] for check in json.loads((run / "certificate.json").read_text())["checks"])

    steps = rows(run / "metrics.jsonl")
    assert len(steps) == 20
    assert steps[0]["experts"]["unused"] == [0.25, 0.25]
    assert all(unused >= 0.25 for row in steps for unused in row["experts"]["unused"])
    assert all(4 / 3 <= load <= 2 for row in steps for load in row["experts"]["load"])  # of 4, with 2 a token
    assert all(row["experts"]["balance_loss"] > 0 < row["experts"]["z_loss"] for row in steps)
    assert steps[0]["lr"].keys() == {"adapter", "router"}
    assert "Busiest expert" in write_report(run).read_text()
    checkpoint = run / "checkpoints" / "step-00000020"
    continued = values | {"model": {"path": str(base)}, "adapter": {"continue_from": str(checkpoint)}}
    assert built(continued).model.router == "train"
    adapter = load_file(checkpoint / "adapter_model.safetensors")
    assert adapter.keys() == initial.keys()
    halves = 0
    for name, before in initial.items():
        moved = adapter[name] != before
        if ".experts." not in name:
            assert moved.any(), name
            continue
        by_expert = moved.view(4, -1) if "lora_A" in name else moved.view(-1, 4).T  # B has the expert as its last index
        assert by_expert.any(1).tolist() == [True, True, True, False], name
        halves += 1
    assert halves == 2 * 2 * 2  # A and B of two parameters in two layers


def test_vllms_base_has_the_bias_of_a_trained_router(tokenizer, tmp_path):
    base = write_moe(tmp_path / "base", "gpt_oss")
    frozen = {"rank": 4, "alpha": 4, "experts": "frozen"}
    model = trained({"path": str(base), "weights": "fp32", "router": "train"}, adapter=frozen, embeddings={})
    checkpoint = write_checkpoint(tmp_path / "step-1", model, tokenizer)
    assert export_vllm(checkpoint, tmp_path / "out", "fp32") < 1e-5
    name = "model.layers.0.mlp.router.bias"
    written = load_file(tmp_path / "out" / "base" / "model.safetensors")[name]
    assert torch.equal(written, load_file(checkpoint / "adapter_model.safetensors")[f"base_model.model.{name}"])


def test_trackers_get_the_worst_load_and_the_mean_share_without_tokens():
    experts = {"balance_loss": 2.1, "z_loss": 3.0, "load": [1.5, 1.25], "unused": [0.25, 0.0]}
    charted = replace(record(1, 2.0), experts=experts).experts_by_chart()
    losses = {"experts/balance_loss": 2.1, "experts/z_loss": 3.0}
    assert charted == {"experts/load": 1.5, "experts/unused": 0.125} | losses
    assert record(1, 2.0).experts_by_chart() == {}


@pytest.mark.parametrize(("kind", "changes"), [("deepseek_v3", {"router": "train"}), ("llama", {"router": "train"})])
def test_routers_without_a_balancing_loss_are_refused_by_name(kind, changes, tokenizer, tmp_path):
    folder = tmp_path / "base"
    base = tiny.write_base(folder, tokenizer) if kind == "llama" else write_moe(folder, kind)
    with pytest.raises(ConfigError, match=rf"^model\.router[^\n]*{kind}[^\n]*leave it out[^\n]*$"):
        trained({"path": str(base), **changes})
