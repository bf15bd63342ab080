"""A packed block is its documents: logits and gradients equal those of each document alone, fp32, 1e-5."""

from __future__ import annotations

import pytest
import torch

from dist_cpt.model.attention import Packing, packed_attention
from tests.packed_models import KINDS, LENGTHS, V, blocks, build

CHOICES = ["documents", "mask", "flex"]


pytestmark = pytest.mark.usefixtures("uncompiled_flex")


@pytest.mark.parametrize("choice", ["documents", "mask"])  # flex has no backward on a CPU
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_packed_block_equals_its_documents(kind, choice):
    plain, packed = build(kind, choice)
    ids, position_ids, cu_seqlens, labels = blocks()
    scaled, loss = packed(ids, position_ids, cu_seqlens, max(max(block) for block in LENGTHS), labels, 0.25)
    scaled.backward()

    expected = torch.zeros(())
    flat_ids, flat_labels = ids.flatten(), labels.flatten()
    for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        logits = plain(input_ids=flat_ids[start:stop][None], use_cache=False).logits[0]
        expected = expected + torch.nn.functional.cross_entropy(logits, flat_labels[start:stop], reduction="sum")
    (expected * 0.25).backward()
    assert abs(float(loss) / float(expected.detach()) - 1) < 1e-6
    theirs = dict(plain.named_parameters())
    for name, parameter in packed.causal_lm.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_packed_logits_equal_each_document_alone(kind, choice):
    plain, packed = build(kind, choice)
    ids, position_ids, cu_seqlens, _ = blocks()
    head = packed.hf_model.get_output_embeddings()
    seen = []
    handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        packed(ids, position_ids, cu_seqlens, 24, torch.zeros_like(ids), 1.0)
        handle.remove()
        logits = head(seen[0])
        for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
            alone = plain(input_ids=ids.flatten()[start:stop][None], use_cache=False).logits[0]
            torch.testing.assert_close(logits[start:stop], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_another_document_changes_nothing(kind, choice):
    _, packed = build(kind, choice)
    ids, position_ids, cu_seqlens, labels = blocks()
    changed = ids.clone()
    changed[0, :7] = (changed[0, :7] + 1) % V
    only_later = labels.clone()
    only_later[0, :7] = -100
    with torch.no_grad():
        left, right = (packed(x, position_ids, cu_seqlens, 24, only_later, 1.0)[1] for x in (ids, changed))
        own, before = (packed(x, position_ids, cu_seqlens, 24, labels, 1.0)[1] for x in (changed, ids))
    assert torch.equal(left, right)
    assert not torch.equal(own, before)


def test_without_labels_the_last_logits():
    plain, packed = build("qwen3")
    ids = torch.randint(0, V, (1, 9), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        last = packed(ids, torch.arange(9)[None], torch.tensor([0, 9], dtype=torch.int32), 9)
        expected = plain(input_ids=ids, use_cache=False).logits[:, -1]
    assert last.dtype == torch.float32
    torch.testing.assert_close(last, expected, rtol=0, atol=1e-5)


def test_the_mask_is_made_once_per_batch():
    packing = Packing(document_BL=torch.tensor([[1, 1, 2]]))
    assert packing.mask(None) is packing.mask(None)
    assert packing.mask(None)[0, 0].tolist() == [[True, False, False], [True, True, False], [False, False, True]]


def test_a_foreign_mask_is_refused():
    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="attention mask"):
        packed_attention(torch.nn.Identity(), x, x, x, torch.ones(1, 1, 2, 2), packing=Packing(borders=[0, 2]))


def test_all_targets_ignored_still_reaches_every_parameter():
    _, packed = build("llama")
    ids, position_ids, cu_seqlens, labels = blocks()
    scaled, _ = packed(ids, position_ids, cu_seqlens, 24, torch.full_like(labels, -100), 1.0)
    scaled.backward()
    for name, parameter in packed.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
