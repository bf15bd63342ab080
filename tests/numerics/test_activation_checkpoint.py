"""What engine.activation_checkpointing recomputes: the same gradients to the bit, and no product that nothing reads.

T tokens, D model, F ffn, Q query and K key features, R rank, per layer.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dist_cpt.config.schema import RunConfig
from dist_cpt.engines import activation_checkpoint
from dist_cpt.engines.activation_checkpoint import checkpoint_layers
from dist_cpt.engines.host_copies import HostCopies
from dist_cpt.engines.single import SingleEngine
from dist_cpt.engines.tiled_mlp import TiledMlp
from dist_cpt.errors import ConfigError
from dist_cpt.model import fuse
from dist_cpt.model.load import load_model
from dist_cpt.optim.groups import param_groups
from tests.contract.model import SEQ_LEN, VOCAB, block, recipe
from tests.tiny_hybrids import KINDS as HYBRIDS

CPU = torch.device("cpu")
POLICIES = ("selective", "full", "offload")
T, D, F, Q, K, R, LAYERS = SEQ_LEN, 32, 44, 32, 16, 3, 2
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
OWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 7},
    "phi3": {"pad_token_id": 0},
    "gpt2": {"n_embd": D, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0, "attn_pdrop": 0.0,
             "embd_pdrop": 0.0},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
                  "shared_expert_intermediate_size": 20, "output_router_logits": False},
    "lfm2": HYBRIDS["lfm2"],
    "bamba": HYBRIDS["bamba"],
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """kind -> a folder with a random model of that type."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def folder(kind: str) -> str:
        path = tmp_path_factory.getbasetemp() / f"recomputed-{kind}"
        if not path.exists():
            torch.manual_seed(0)
            config = AutoConfig.for_model(kind, **(SIZES if kind != "gpt2" else {"vocab_size": VOCAB}) | OWN[kind])
            AutoModelForCausalLM.from_config(config).save_pretrained(path)
        return str(path)

    return folder


class Passed:
    """Gradients of a step of two micro-batches, and FLOPs of the second one's products."""

    def __init__(self, config: RunConfig, tokens: int = 0) -> None:
        model = load_model(config, device=CPU)
        groups = param_groups(model.trainable, config.optim, config.adapter.kind == "lora")
        checkpoint_layers(model.layers, config.engine.activation_checkpointing, CPU, tokens)
        self.tiled = sum(isinstance(module.forward, TiledMlp) for module in model.module.modules())
        engine = SingleEngine(model.module, model.trainable, groups, config, CPU)
        torch.manual_seed(1)
        engine.accumulate(block(1, 0), 10, last=False)
        with Products() as products:
            engine.accumulate(block(1, 1), 10, last=True)
        self.flops = products.flops
        self.gradients = {name: grad.clone() for name, grad in engine._grads.items()}
        self.fusion = model.fusion
        engine.close()


class Products(TorchDispatchMode):
    """FLOPs of products of matrices. FlopCounterMode hooks modules, which fails in a backward within a backward."""

    flops = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            left, right = args[-2:]
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return function(*args, **(kwargs or {}))


def passes(base: str, variant: str, **adapter: Any) -> dict[str, Passed]:
    """One for each policy, in fp32; routers of experts train, with both of their losses."""
    passed, model = {}, {"router": "train", "router_z_loss": 0.1} if base.endswith("_moe") else {}
    for policy in ("none", *POLICIES):
        config = recipe(base, {"kind": "single", "activation_checkpointing": policy}, variant, "fp32", **model)
        config = config.model_copy(update={"adapter": config.adapter.model_copy(update=adapter)})
        passed[policy] = Passed(config)
    return passed


def assert_same_gradients(passed: dict[str, Passed]) -> None:
    expected = passed["none"].gradients
    assert any(torch.count_nonzero(grad) for grad in expected.values())
    for policy in POLICIES:
        actual = passed[policy].gradients
        assert actual.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(actual[name], expected[name])] == [], policy


GATE_UP, QKVO, DOWN = 2 * T * D * 2 * F, 2 * T * D * (2 * Q + 2 * K), 2 * T * D * F
# x A of the maps, and the product with B of those whose result is read
INNER_MLP, INNER_ATTENTION = 2 * T * R * (2 * D + F), 2 * T * R * (3 * D + Q)
OUTER_MLP, OUTER_ATTENTION = 2 * T * R * 2 * F, 2 * T * R * (Q + 2 * K + D)


@pytest.mark.parametrize(
    ("variant", "fused", "selective", "full"),
    [
        ("lora-only", False, GATE_UP + INNER_MLP + OUTER_MLP,
         GATE_UP + INNER_MLP + OUTER_MLP + QKVO + INNER_ATTENTION + OUTER_ATTENTION),
        ("lora-only", True, GATE_UP + OUTER_MLP,
         GATE_UP + INNER_MLP + OUTER_MLP + QKVO + INNER_ATTENTION + OUTER_ATTENTION),
        ("full", False, GATE_UP, GATE_UP + QKVO),
        ("full", True, GATE_UP, GATE_UP + QKVO),
    ],
)  # fmt: skip
def test_the_last_product_is_not_redone_and_gradients_keep_every_bit(
    variant: str, fused: bool, selective: int, full: int, bases: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fused:  # the modules, with plain torch in place of kernels
        monkeypatch.setattr(fuse, "available", lambda tensor: True)
    passed = passes(bases("llama"), variant)
    assert bool(passed["none"].fusion.swapped) == fused
    assert_same_gradients(passed)
    again = {policy: passed[policy].flops - passed["none"].flops for policy in POLICIES}
    assert again == {"selective": LAYERS * selective, "full": LAYERS * full, "offload": LAYERS * full}


@pytest.mark.parametrize(
    ("kind", "variant", "fused", "adapter"),
    [
        ("llama", "lora-only", False, {}),
        ("llama", "lora-only", True, {}),
        ("llama", "full", False, {}),
        ("gpt2", "lora-only", False, {"dropout": 0.3}),
        *(
            pytest.param(*cell, marks=pytest.mark.matrix)
            for cell in (
                ("llama", "full", True, {}),
                ("llama", "lora", True, {"dropout": 0.3}),
                ("llama", "nf4", False, {}),
                ("llama", "int8", False, {}),
                ("gemma2", "lora", True, {}),
                ("gemma2", "full", False, {}),
                ("phi3", "lora", True, {}),
                ("phi3", "lora", False, {}),
                ("gpt2", "full", False, {}),
                ("llama", "lora-only", False, {"dora": True}),
            )
        ),
    ],
)
def test_an_mlp_in_tiles_has_the_same_gradients_and_no_more_products(
    kind: str, variant: str, fused: bool, adapter: dict[str, Any], bases: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of 6, 6, 6 and 2 tokens. Dropout draws masks of its own by tile, so there it is compared among policies."""
    if fused:
        monkeypatch.setattr(fuse, "available", lambda tensor: True)
    monkeypatch.setattr(activation_checkpoint, "TILE_TOKENS", 6)
    tiled = {}
    for policy in ("none", *POLICIES):
        config = recipe(bases(kind), {"kind": "single", "activation_checkpointing": policy}, variant, "fp32")
        config = config.model_copy(update={"adapter": config.adapter.model_copy(update=adapter)})
        whole = Passed(config)
        tiled[policy] = Passed(config, T)
        assert tiled[policy].tiled == (LAYERS if policy != "none" else 0)
        reference = tiled["selective"] if adapter.get("dropout") and policy != "none" else whole
        for name, expected in reference.gradients.items():
            error = (tiled[policy].gradients[name] - expected).abs().max()
            rounding = 2.0**-7 if variant in ("nf4", "int8") else 2e-6  # these compute in bf16
            assert error <= rounding * expected.abs().max(), (policy, name)
        if policy in ("full", "offload") and kind == "llama" and variant == "lora-only" and not adapter:
            # torch's own modules compute the last product again
            assert tiled[policy].flops - whole.flops == (0 if fused else LAYERS * (DOWN + 2 * T * R * D))


@pytest.mark.parametrize(("kind", "variant"), [("llama", "nf4"), ("llama", "int8"), ("gpt2", "lora-only")])
def test_a_base_in_codes_or_transposed_leaves_its_last_product_out_too(kind: str, variant: str, bases: Any) -> None:
    passed = passes(bases(kind), variant)
    assert_same_gradients(passed)
    last = 2 * T * D * (F if kind == "llama" else 4 * D)
    # were it redone, "full" would repeat every product of the forward pass
    forward = (QKVO + GATE_UP + DOWN) if kind == "llama" else 2 * T * D * (4 * D + 8 * D)
    adapters = passed["full"].flops - passed["none"].flops - LAYERS * (forward - last)
    assert 0 < adapters < LAYERS * last


@pytest.mark.parametrize(
    ("kind", "fused"),
    [
        pytest.param("gemma2", False, marks=pytest.mark.matrix),
        ("gemma2", True),
        ("phi3", True),
        pytest.param("gpt2", False, marks=pytest.mark.matrix),
        ("qwen2_moe", False),
        ("lfm2", False),
        pytest.param("bamba", False, marks=pytest.mark.matrix),
    ],
)
def test_other_architectures_keep_every_bit(
    kind: str, fused: bool, bases: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fused:
        monkeypatch.setattr(fuse, "available", lambda tensor: True)
    passed = passes(bases(kind), "lora-only")
    assert_same_gradients(passed)
    assert passed["selective"].flops > passed["none"].flops
    routers = [name for name in passed["none"].gradients if name.endswith(".mlp.gate.weight")]
    assert len(routers) == (LAYERS if kind == "qwen2_moe" else 0)


@pytest.mark.parametrize("fused", [pytest.param(False, marks=pytest.mark.matrix), True])
@pytest.mark.parametrize("adapter", [{"dropout": 0.3}, {"dora": True}], ids=["dropout", "dora"])
def test_dropout_draws_the_same_again_and_dora_reads_its_product(
    adapter: dict[str, Any], fused: bool, bases: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fused:
        monkeypatch.setattr(fuse, "available", lambda tensor: True)
    assert_same_gradients(passes(bases("llama"), "lora-only", **adapter))


def test_a_layer_without_an_mlp_refuses_selective() -> None:
    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn, self.fc1, self.fc2 = (torch.nn.Linear(4, 4) for _ in range(3))

    with pytest.raises(ConfigError, match=r"selective recomputes MLPs, and layer 0, a Flat, has none"):
        checkpoint_layers([Flat()], "selective", CPU)


def test_inputs_wait_in_host_memory_and_a_second_backward_finds_them_again() -> None:
    host = HostCopies(CPU)
    tensors = [torch.full((3, 4), float(n), requires_grad=n > 0) for n in range(4)]
    copies = [host.of(tensor) for tensor in tensors]
    assert [copy._tensor is None for copy in copies] == [True, True, True, False]  # the last is needed first
    for _ in range(2):
        for copy, tensor in reversed(list(zip(copies, tensors, strict=True))):
            back = copy.on_device()
            assert torch.equal(back, tensor)
            assert back.requires_grad == tensor.requires_grad
            assert copy._tensor is None
        assert sum(copy._tensor is not None for copy in copies) == 0
    del copies, copy  # pyright: ignore[reportPossiblyUnboundVariable]
    gc.collect()
    assert host._newest() is None  # the graph owned them
