"""Each choice of attention on a GPU: right by the rule beside torch, boundaries kept, no host sync, little memory."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dist_cpt.model.architectures import parts_of
from dist_cpt.model.attention import choose, install, packing_arguments
from dist_cpt.model.loss import CausalLMForLoss, install_loss_head
from tests.kernel_inputs import attention as case
from tests.kernels.error_rule import assert_right

pytestmark = pytest.mark.gpu
CUDA, BF16, FP32 = torch.device("cuda"), torch.bfloat16, torch.float32
LENGTH = 1000  # no multiple of a block
DOCUMENTS = (700, 1, 299, LENGTH)
CHOICES = [("varlen", BF16), ("flex", BF16), ("flex", FP32), ("mask", BF16), ("mask", FP32), ("documents", BF16)]


@pytest.fixture(autouse=True)
def own_graphs():
    torch._dynamo.reset()  # each test has its own shapes


def inputs(dtype, heads=8, kv_heads=2, width=128, length=LENGTH, batch=2):
    sizes = {"heads": heads, "kv_heads": kv_heads, "width": width, "length": length, "batch": batch}
    return case.inputs(dtype, **sizes, device="cuda")


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("window", [None, 1, 100, 5000])
@pytest.mark.parametrize(("choice", "dtype"), CHOICES)
def test_error_is_at_most_twice_that_of_torch(choice, dtype, window, softcap):
    if choice == "varlen" and softcap is not None:
        with pytest.raises(ValueError, match="varlen"):
            case.run(choice, DOCUMENTS, *inputs(dtype), softcap=softcap)
        return
    given, options = inputs(dtype), {"sliding_window": window, "softcap": softcap}
    actual = case.run(choice, DOCUMENTS, *given, **options)
    torchs = case.plain(DOCUMENTS, *given, **options)
    truth = case.plain(DOCUMENTS, *(x.double() for x in given), **options)
    if window == 1:  # the exact gradients of queries and keys are zero: only cancelling is left
        assert all(float(grad.abs().max()) < {FP32: 1e-4, BF16: 1e-1}[dtype] for grad in actual[1:3])
        actual, torchs, truth = ([results[0], results[3]] for results in (actual, torchs, truth))
    assert_right(actual, torchs, truth)


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(8, 4, 256), (28, 4, 128), (12, 12, 64), (4, 1, 96)])
@pytest.mark.parametrize("choice", ["varlen", "flex", "mask"])
def test_shapes_of_models(choice, heads, kv_heads, width):
    given = inputs(BF16, heads, kv_heads, width)
    truth = case.plain(DOCUMENTS, *(x.double() for x in given), sliding_window=300)
    torchs = case.plain(DOCUMENTS, *given, sliding_window=300)
    assert_right(case.run(choice, DOCUMENTS, *given, sliding_window=300), torchs, truth)


@pytest.mark.parametrize(("choice", "dtype"), CHOICES)
def test_another_document_changes_nothing(choice, dtype):
    given = inputs(dtype)
    changed = [x.clone() for x in given]
    for x in changed[:3]:
        x[0, :, :700] = x[0, :, :700].flip(1)
    before, after = (case.run(choice, DOCUMENTS, *x) for x in (given, changed))
    assert torch.equal(before[0][0, 700:], after[0][0, 700:])
    assert torch.equal(before[0][1], after[0][1])
    assert not torch.equal(before[0][0, :700], after[0][0, :700])


@pytest.mark.parametrize(("choice", "softcap"), [("varlen", None), ("flex", None), ("flex", 20.0), ("mask", None)])
def test_no_host_sync(choice, softcap):
    given = inputs(BF16)
    positions = torch.zeros(2, LENGTH, device="cuda")
    borders = torch.tensor([0, *DOCUMENTS], dtype=torch.int32, device="cuda").cumsum(0, dtype=torch.int32)
    case.run(choice, DOCUMENTS, *given, softcap=softcap)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        packing = packing_arguments(choice, positions, borders, LENGTH)["packing"]
        for window in (None, 100):
            if choice == "flex":
                packing.block_mask(window)
            elif choice == "mask":
                packing.mask(window)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_flex_never_holds_all_scores():
    given = inputs(BF16, batch=1, length=8192)
    case.run("flex", (8000, 192), *given, softcap=20.0)  # compiles
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    case.run("flex", (8000, 192), *given, softcap=20.0, sliding_window=1000)
    assert torch.cuda.max_memory_allocated() - before < 8 * 8192 * 8192  # bytes: a quarter of the fp32 scores


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("choice", ["flash_attention_2", "varlen", "flex"])
def test_a_model_attends_as_under_the_mask(choice, kind):
    if choice == "flash_attention_2":
        pytest.importorskip("flash_attn")
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 97, "pad_token_id": 0}  # fmt: skip
    gemma = {"head_dim": 32, "sliding_window": 50, "attn_logit_softcapping": 5.0, "final_logit_softcapping": None}
    config = AutoConfig.for_model(kind, **sizes | (gemma if kind == "gemma2" else {}))
    if (choice, kind) == ("varlen", "gemma2"):
        assert choose(CUDA, config) in ("flash_attention_2", "flex")
        return
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=BF16).to(CUDA).train()
    install_loss_head(parts_of(model).head, model.config, use_reference=True)
    ids = torch.randint(1, 97, (2, LENGTH), device="cuda")
    positions = torch.cat([torch.arange(size) for size in DOCUMENTS]).view(2, LENGTH).to(CUDA)
    borders = torch.tensor([0, *DOCUMENTS], dtype=torch.int32, device="cuda").cumsum(0, dtype=torch.int32)

    def hidden_and_gradients(attention):
        install(model, attention)
        hidden = CausalLMForLoss(model, attention).hidden(ids, positions, borders, max(DOCUMENTS))
        (hidden * torch.linspace(-1, 1, hidden.shape[-1], device="cuda").to(BF16)).sum().backward()
        grads = [parameter.grad.float() for parameter in model.model.parameters() if parameter.grad is not None]
        model.zero_grad()
        return [hidden.detach().float(), *grads]

    for actual, expected in zip(hidden_and_gradients(choice), hidden_and_gradients("mask"), strict=True):
        assert float((actual - expected).norm() / expected.norm()) < 0.03
