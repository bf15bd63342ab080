"""Which attention implementation a model gets, and that all compute the same for any documents."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn.attention import flex_attention, varlen
from transformers import AutoConfig

from dist_cpt.errors import ConfigError
from dist_cpt.model import attention
from dist_cpt.model.attention import choose, describe, packed_attention, packing_arguments
from tests.kernel_inputs import attention as case
from tests.kernels.error_rule import assert_right

CUDA, BF16 = torch.device("cuda"), torch.bfloat16
LLAMA = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
GEMMA = LLAMA | {"head_dim": 16, "attn_logit_softcapping": 50.0}
# two blocks each: many, one per block, one token each, and one that ends a token before its block does
DOCUMENTS = {"many": (7, 1, 63, 52, 119, 4), "whole": (123, 123), "single": (1,) * 246, "odd": (122, 1, 1, 122)}


def config(kind="llama", **values):
    return AutoConfig.for_model(kind, **(GEMMA if kind == "gemma2" else LLAMA) | values)


@pytest.fixture
def machine(monkeypatch):
    """A GPU machine with only torch on it; the test says what else is there."""

    def has(flash=False, caps=True, varlen_missing=None, triton=True):
        monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: flash)
        monkeypatch.setattr(attention, "_flash_caps", lambda: caps)
        monkeypatch.setattr(attention, "_varlen_missing", lambda: varlen_missing)
        monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: triton or None)

    has()
    return has


def test_auto_takes_the_best_choice_that_computes_the_model(machine):
    assert choose(CUDA, config()) == "varlen"
    assert choose(CUDA, config(), "auto", torch.float32) == "mask"
    assert choose(CUDA, config(attention_dropout=0.1)) == "mask"
    assert choose(CUDA, config(head_dim=512)) == choose(CUDA, config(head_dim=20)) == "mask"
    assert choose(CUDA, config("gemma2")) == choose(CUDA, config("gemma2"), "auto", torch.float32) == "flex"
    assert choose(CUDA, config("gemma2", head_dim=8)) == choose(CUDA, config("gemma2", attention_dropout=0.1)) == "mask"
    machine(varlen_missing="torch 2.9 has no varlen attention")
    assert choose(CUDA, config()) == "mask"
    machine(triton=False)
    assert choose(CUDA, config("gemma2")) == "mask"
    machine(flash=True)
    assert choose(CUDA, config()) == choose(CUDA, config("gemma2")) == "flash_attention_2"
    assert choose(CUDA, config(), "auto", torch.float32) == "mask"
    assert choose(CUDA, config("gemma2", attention_dropout=0.1)) == "mask"
    machine(flash=True, caps=False)
    assert choose(CUDA, config("gemma2")) == "flex"
    assert choose(torch.device("cpu"), config("gemma2")) == "documents"
    assert choose(CUDA, config(), "mask") == "mask"


@pytest.mark.parametrize(
    ("device", "values", "wanted", "dtype", "why"),
    [
        ("cpu", {}, "varlen", BF16, "runs on CUDA, not on cpu"),
        ("cuda", {}, "flash_attention_2", BF16, "the package flash_attn is not installed"),
        ("cuda", {}, "varlen", torch.float32, "computes in bf16 or fp16, not in torch.float32"),
        ("cuda", {"kind": "gemma2"}, "varlen", BF16, "has no softcap, this model has 50.0"),
        ("cuda", {"attention_dropout": 0.1}, "flex", BF16, "has no dropout, this model's attention has 0.1"),
        ("cuda", {"head_dim": 8}, "flex", BF16, "supports head dimensions from 16, this model has 8"),
    ],
)
def test_an_unsupported_choice_is_refused(machine, device, values, wanted, dtype, why):
    with pytest.raises(ConfigError, match=f"model.attention: {wanted}: {why}"):
        choose(torch.device(device), config(**values), wanted, dtype)


def test_the_description_names_why_better_choices_are_not_used(machine):
    assert describe("documents", torch.device("cpu"), config(), BF16) == "documents"
    description = describe("flex", CUDA, config("gemma2"), BF16)
    assert description == (
        "flex; not flash_attention_2: the package flash_attn is not installed; "
        "not varlen: has no softcap, this model has 50.0"
    )
    assert describe("mask", CUDA, config(), BF16).endswith("not varlen: the recipe asks for another")


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 5, 200])
@pytest.mark.parametrize("documents", ["many", "whole", "odd"])
def test_error_is_at_most_twice_that_of_torch(documents, window, softcap, uncompiled_flex, monkeypatch):
    monkeypatch.setattr(attention, "_SCORES", 4 * 2 * 123 * 20)  # 20 or more queries at a time
    monkeypatch.setattr(attention, "_ROWS", 8)
    sizes, options = DOCUMENTS[documents], {"sliding_window": window, "softcap": softcap}
    for dtype, size in ((torch.float32, 1.0), (torch.float32, 30.0), (BF16, 1.0)):  # 30: one score rules
        given = case.inputs(dtype, size)
        torchs = case.plain(sizes, *given, **options)
        truth = case.plain(sizes, *(x.double() for x in given), **options)
        for choice in ("documents", "mask", "flex"):
            actual = case.run(choice, sizes, *given, **options)
            assert_right(actual, torchs[: len(actual)], truth[: len(actual)])


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("documents", "window"), [("single", None), ("single", 5), ("many", 1)])
def test_a_token_that_sees_only_itself(documents, window, softcap, uncompiled_flex):
    """It takes its own value, and no score matters: queries and keys get no gradient but what cancelling leaves."""
    given = case.inputs(torch.float32)
    query, key, value, d_out = given
    scores = (query * key.repeat_interleave(2, 1)).sum(-1).abs().max() * case.SCALE
    # Flash kernels form a score again in the backward pass: off by a rounding of its size, its weight is not quite 1.
    allowed = 2 * 2.0**-23 * float(scores * d_out.abs().max())
    for choice in ("documents", "mask", "flex"):
        out, *grads = case.run(choice, DOCUMENTS[documents], *given, sliding_window=window, softcap=softcap)
        torch.testing.assert_close(out.transpose(1, 2), value.repeat_interleave(2, 1), rtol=1e-6, atol=0)
        for grad in grads[:2]:
            assert float(grad.abs().max()) < 1e-5
        if grads:
            torch.testing.assert_close(grads[2], d_out.unflatten(1, (2, 2)).sum(2), rtol=0, atol=allowed)


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_heads_that_share_a_key(kv_heads, uncompiled_flex):
    given, sizes = case.inputs(torch.float64, kv_heads=kv_heads), DOCUMENTS["many"]
    for choice, softcap in itertools.product(("documents", "mask", "flex"), (None, 2.0)):
        if (choice, softcap) != ("flex", None):
            expected = case.plain(sizes, *given, softcap=softcap)
            for ours, exact in zip(case.run(choice, sizes, *given, softcap=softcap), expected, strict=False):
                torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("names_sharing", [True, False])  # torch 2.11 shares key heads unasked
@pytest.mark.parametrize("window", [None, 5, 200])
def test_varlen_is_asked_for_the_same(window, names_sharing, monkeypatch):
    """torch's kernel runs on a GPU only; what it is given, read as its documentation says, is this attention."""

    def with_sharing(query, key, *arguments, enable_gqa, **options):
        assert enable_gqa == (query.shape[1] != key.shape[1])
        return documented(query, key, *arguments, **options)

    def documented(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
        assert cu_seq_q is cu_seq_k
        assert max_q == max_k == max(DOCUMENTS["many"])
        left, right = window_size
        assert right == 0
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
        outs = []
        for start, stop in itertools.pairwise(cu_seq_q.tolist()):
            scores = torch.einsum("qhn,khn->hqk", query[start:stop], key[start:stop]) * scale
            seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril()
            seen = seen if left < 0 else seen.triu(-left)
            weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
            outs.append(torch.einsum("hqk,khn->qhn", weights, value[start:stop]))
        return torch.cat(outs)

    monkeypatch.setattr(varlen, "varlen_attn", with_sharing if names_sharing else documented)
    given = case.inputs(torch.float64)
    expected = case.plain(DOCUMENTS["many"], *given, sliding_window=window)
    for ours, exact in zip(case.run("varlen", DOCUMENTS["many"], *given, sliding_window=window), expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)


def test_this_torch_has_all_that_varlen_needs():
    assert attention._varlen_missing() is None


@pytest.mark.parametrize("length", [1, 127, 128, 507])
@pytest.mark.parametrize("window", [None, 1, 129, 600])
def test_block_masks_equal_those_made_from_every_pair(length, window):
    generator = torch.Generator().manual_seed(length)
    starts = torch.rand(3, length, generator=generator) < torch.tensor([0.0, 0.005, 0.3])[:, None]
    actual = attention._block_mask(starts.cumsum(1).int(), window)
    expected = flex_attention.create_block_mask(actual.mask_mod, 3, None, length, length, device="cpu")
    for part in ("kv", "q", "full_kv", "full_q"):
        for name in (f"{part}_num_blocks", f"{part}_indices"):
            assert torch.equal(getattr(actual, name), getattr(expected, name)), name


def test_flex_is_compiled_once_for_all_windows_and_batches(monkeypatch):
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(flex_attention.flex_attention, dynamic=False, fullgraph=True, backend=count)
    monkeypatch.setattr(attention, "_compiled_flex", lambda: compiled)
    given = case.inputs(torch.float32)
    with torch.no_grad():
        for documents in DOCUMENTS.values():
            for window in (None, 5, 64):
                case.run("flex", documents, *given, sliding_window=window, softcap=2.0)
    assert len(graphs) == 1


def test_capped_scores_are_not_kept_for_the_backward_pass():
    query, key, value, _ = (x.requires_grad_() for x in case.inputs(torch.float32))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        cu_seqlens = torch.tensor([0, 123, 246], dtype=torch.int32)
        packing = packing_arguments("documents", torch.zeros(2, 123), cu_seqlens, 123)["packing"]
        packed_attention(torch.nn.Identity(), query, key, value, None, packing=packing, softcap=2.0)
    assert sum(saved) <= query.numel() + key.numel() + value.numel()  # scores: 2 x 4 x 123 x 123


@pytest.mark.parametrize("choice", ["documents", "mask"])
def test_dropout_of_capped_scores(choice):
    query, key, value, d_out = case.inputs(torch.float32)
    value = torch.ones_like(value)
    torch.manual_seed(0)
    out = case.run(choice, DOCUMENTS["whole"], query, key, value, d_out, softcap=2.0, dropout=0.5)[0]
    assert 0.8 < float(out.mean()) < 1.2  # weights that stay are doubled
    assert float(out.std()) > 0.05


@pytest.mark.parametrize(
    ("choice", "options", "why"),
    [
        ("varlen", {"dropout": 0.1}, "attention dropout 0.1: varlen"),
        ("flex", {"dropout": 0.1}, "attention dropout 0.1: flex"),
        ("varlen", {"softcap": 5.0}, "softcap 5.0: varlen"),
    ],
)
def test_unsupported_options_are_refused_at_the_call_too(choice, options, why):
    with pytest.raises(ValueError, match=why):
        case.run(choice, DOCUMENTS["many"], *case.inputs(torch.float32), **options)
