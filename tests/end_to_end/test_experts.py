"""LoRA on experts: gradients of a plain loop, names and numbers of PEFT, and what is refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dist_cpt.adapters.experts import LowRank, adapted_experts, experts_of, grouped_linear
from dist_cpt.errors import ConfigError
from dist_cpt.export.merge import merge
from tests import tiny
from tests.contract.model import block
from tests.run_ranks import run_ranks
from tests.tiny_mixtures import KINDS, write_moe
from tests.trained_checkpoint import IDS, plain_logits, trained, trainer_logits, write_checkpoint
from tests.whole_run import rows, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT 0.21.2 looks for the ranks of parameters among modules, and uses them all the same.
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),
]
DEFAULT = ("qwen3_moe", "gpt_oss")
ALL = [pytest.param(kind, marks=() if kind in DEFAULT else pytest.mark.matrix) for kind in KINDS]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tokenizer")
    return tiny.write_tokenizer(root / "tokenizer", tiny.write_corpus(root / "corpus"))


@pytest.mark.parametrize("kind", ALL)
def test_vanilla_peft_and_the_merged_folder_give_the_trainers_logits(kind, tokenizer, tmp_path):
    from peft import PeftModel

    base = write_moe(tmp_path / "base", kind)
    model = trained({"path": str(base), "weights": "fp32"})
    assert model.adapter_config is not None
    assert set(model.adapter_config["rank_pattern"].values()) == {2}  # rank 4 over two experts per token
    assert set(model.left_out) in ({"mlp.gate"}, {"mlp.router"}, {"block_sparse_moe.router"})
    for name in ("experts.lora_A.weight", "experts.base_layer.lora_B.weight"):  # down_proj, and gate_up_proj within
        assert any(trainable.endswith(name) for trainable in model.trainable)
    checkpoint = write_checkpoint(tmp_path / "step-1", model, tokenizer)
    expected = trainer_logits(model, IDS)
    allowed = 1e-5 * max(1.0, float(expected.abs().max()))

    vanilla = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(checkpoint))
    torch.testing.assert_close(plain_logits(vanilla, IDS), expected, rtol=0, atol=allowed)
    without = plain_logits(AutoModelForCausalLM.from_pretrained(base), IDS)
    assert float((without - expected).abs().max()) > 1e-3
    vanilla.save_pretrained(tmp_path / "again")
    assert set(load_file(tmp_path / "again" / "adapter_model.safetensors")) == set(
        load_file(checkpoint / "adapter_model.safetensors")
    )

    merge(checkpoint, tmp_path / "merged", "fp32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(plain_logits(merged, IDS), expected, rtol=0, atol=allowed)
    assert set(load_file(tmp_path / "merged" / "model.safetensors")) == set(load_file(base / "model.safetensors"))


@pytest.mark.parametrize("kind", ALL)
def test_gradients_are_those_of_a_loop_over_tokens_in_fp64(kind, tmp_path):
    """Every token's experts written out, with W + s B A as one matrix."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(write_moe(tmp_path / "base", kind)).double()
    experts: Any = next(module for _, module in experts_of(model))
    names, rank, scale = ("gate_up_proj", "down_proj"), 3, 0.7
    leaves, low_rank = [], {}
    for name in names:
        _, *sizes = getattr(experts, name).shape
        inputs, outputs = sizes if experts.is_transposed else reversed(sizes)
        a, b = torch.randn(4, rank, inputs).double(), torch.randn(4, outputs, rank).double()
        leaves += [a.requires_grad_(), b.requires_grad_()]
        low_rank[name] = LowRank(a, b, scale)
    hidden = torch.randn(11, 64).double().requires_grad_()
    index = torch.stack([torch.randperm(3)[:2] for _ in range(11)])  # expert 3 gets no token
    weights = torch.rand(11, 2).double().requires_grad_()
    out_grad = torch.randn(11, 64).double()

    def whole(name: str, expert: int) -> torch.Tensor:
        weight, pair = getattr(experts, name)[expert], low_rank[name]
        return (weight.T if experts.is_transposed else weight) + scale * pair.b[expert] @ pair.a[expert]

    def bias(name: str, expert: int) -> torch.Tensor | float:
        return getattr(experts, f"{name}_bias")[expert] if experts.has_bias else 0.0

    rows = []
    for token in range(11):
        row = torch.zeros(64).double()
        for expert, weight in zip(index[token].tolist(), weights[token], strict=True):
            inner = experts._apply_gate(whole("gate_up_proj", expert) @ hidden[token] + bias("gate_up_proj", expert))
            row = row + weight * (whole("down_proj", expert) @ inner + bias("down_proj", expert))
        rows.append(row)
    expected = torch.stack(rows)
    actual = adapted_experts(experts, low_rank, hidden, index, weights, by_loop=True)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    inputs = [hidden, weights, *leaves]
    for ours, theirs in zip(
        torch.autograd.grad(actual, inputs, out_grad), torch.autograd.grad(expected, inputs, out_grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_the_grouped_product_is_the_loop():
    ends = torch.tensor([3, 3, 8, 16], dtype=torch.int32)  # the second expert has no row
    results = []
    for by_loop in (True, False):
        generator = torch.Generator().manual_seed(0)
        x, weight = (
            torch.randn(size, generator=generator).bfloat16().requires_grad_() for size in ((16, 32), (4, 24, 32))
        )
        out = grouped_linear(x, weight, ends, by_loop)
        results.append(
            [out, *torch.autograd.grad(out, [x, weight], torch.randn(16, 24, generator=generator).bfloat16())]
        )
    for loop, grouped in zip(*results, strict=True):
        torch.testing.assert_close(grouped, loop)


@pytest.mark.parametrize("kind", ALL)
def test_a_packed_block_is_its_documents_alone(kind, tmp_path):
    """Their losses and gradients: so its base may be read by slices, unseen by a check of packing."""
    model = trained({"path": str(write_moe(tmp_path / "base", kind)), "weights": "fp32"})
    model.module.train()
    packed = block(1, 0)
    borders, parameters = packed.cu_seqlens.tolist(), list(model.trainable.values())
    assert len(borders) == 3

    def loss_of(start: int, stop: int) -> torch.Tensor:
        inner = packed.cu_seqlens[(packed.cu_seqlens >= start) & (packed.cu_seqlens <= stop)] - start
        ids, labels, positions = (x[:, start:stop] for x in (packed.input_ids, packed.labels, packed.position_ids))
        return model.module(ids, positions, inner, int(inner.diff().max()), labels, 1.0)[0]

    whole, alone = loss_of(0, borders[-1]), torch.stack([loss_of(*pair) for pair in itertools.pairwise(borders)]).sum()
    torch.testing.assert_close(whole, alone, rtol=1e-5, atol=0)
    gradients = (torch.autograd.grad(loss, parameters) for loss in (whole, alone))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize("changes", [{"dropout": 0.1}, {"dora": True}, {"init": "pissa"}])
def test_what_lora_on_experts_lacks_is_refused_in_one_line(changes, tmp_path):
    base = write_moe(tmp_path / "base", "mixtral")
    with pytest.raises(ConfigError, match=r"^adapter\.[^\n]*experts: frozen$"):
        trained({"path": str(base)}, adapter={"rank": 4, **changes})
    frozen = trained({"path": str(base)}, adapter={"rank": 4, "experts": "frozen", **changes})
    assert set(frozen.left_out) >= {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert not any(".experts." in name for name in frozen.trainable)


@pytest.mark.parametrize("changes", [{"experts": "frozen"}, {"expert_rank": 2}])
def test_settings_of_experts_that_a_dense_model_does_not_have_are_refused(changes, tokenizer, tmp_path):
    base = tiny.write_base(tmp_path / "base", tokenizer)
    with pytest.raises(ConfigError, match=r"^adapter\.expert[^\n]*leave it out$"):
        trained({"path": str(base)}, adapter={"rank": 4, **changes})


def test_an_expert_rank_and_experts_by_name(tmp_path):
    base = write_moe(tmp_path / "base", "mixtral")
    model = trained(
        {"path": str(base)}, adapter={"rank": 4, "targets": ["q_proj", "experts.down_proj"], "expert_rank": 3}
    )
    shapes = {name.split("layers.0.")[1]: tuple(p.shape) for name, p in model.trainable.items() if "layers.0." in name}
    assert shapes == {
        "self_attn.q_proj.lora_A.weight": (4, 64),
        "self_attn.q_proj.lora_B.weight": (64, 4),
        "mlp.experts.lora_A.weight": (4 * 3, 96),
        "mlp.experts.lora_B.weight": (64, 4 * 3),
    }


@pytest.mark.parametrize(
    ("engine", "shares"),
    [
        ("kind: fsdp, shard: full", True),
        ("kind: zero, stage: 3", True),
        pytest.param("kind: zero, stage: 2", False, marks=pytest.mark.matrix),
        pytest.param("kind: zero, stage: 1", False, marks=pytest.mark.matrix),
    ],
)
def test_two_ranks_train_as_one_and_share_the_experts(engine, shares, single_run, tokenizer, tmp_path):
    """Routers train as well, and backward runs every layer again."""
    base, corpus, expected = single_run
    path = tiny.write_recipe(tmp_path / "recipe.yaml", _recipe(base, corpus, tmp_path / "runs"))
    engine = f"engine={{{engine}, activation_checkpointing: full}}"
    assert run_ranks(path, 2, engine, log=tmp_path / "log") == [0, 0], (tmp_path / "log").read_text()
    run = tmp_path / "runs" / "tiny"
    steps = rows(run / "metrics.jsonl")
    for key in ("balance_loss", "z_loss"):
        assert [row["experts"][key] for row in steps] == pytest.approx([row["experts"][key] for row in expected], 2e-4)
    assert [row["loss"] for row in steps] == pytest.approx([row["loss"] for row in expected], rel=2e-4)
    assert steps[0]["experts"]["load"] == expected[0]["experts"]["load"]  # before anything has moved
    contract = json.loads((run / "contract.json").read_text())
    assert all(check["passed"] for check in contract["checks"]), contract["checks"]
    assert set(contract["expert_rank"].values()) == {2}
    assert contract["left_out"] == {}
    (group,) = [group for group in contract["groups"] if group["name"] == "router"]
    assert [tensor["shape"] for tensor in group["tensors"]] == 2 * [[4, 64]]
    frozen = contract["frozen"]["num_parameters_per_rank"]
    if shares:
        assert max(frozen) < 0.55 * sum(frozen)  # experts included: nothing is whole on both
    else:
        assert frozen[0] == frozen[1]
    adapter = load_file(run / "checkpoints" / "step-00000004" / "adapter_model.safetensors")
    halves = [name for name in adapter if ".experts." in name and name.endswith("lora_B.weight")]
    assert len(halves) == 2 * 2
    assert all(adapter[name].any() for name in halves)


@pytest.fixture(scope="module")
def single_run(tokenizer, tmp_path_factory):
    """(base, corpus, rows of one rank)."""
    folder = tmp_path_factory.mktemp("single")
    base = write_moe(folder / "base", "qwen3_moe")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).write_bytes((tokenizer / name).read_bytes())
    corpus = tiny.write_corpus(folder / "corpus")
    assert train(_recipe(base, corpus, folder / "runs")) == 0
    return base, corpus, rows(folder / "runs" / "tiny" / "metrics.jsonl")


def _recipe(base: Path, corpus: Path, output_dir: Path) -> dict[str, Any]:
    model = {"path": str(base), "weights": "fp32", "router": "train", "router_z_loss": 0.01}
    batch = {"global_tokens": 8 * tiny.SEQ_LEN, "micro_batch": 1}  # forwards of the same blocks at any number of ranks
    values = tiny.recipe(base, corpus, output_dir, model=model, batch=batch, train={"tokens": 4 * 8 * tiny.SEQ_LEN})
    del values["data"]["validation"]
    return values
