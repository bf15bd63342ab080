"""Recurrent layers start anew in each document, under every choice of attention."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from dist_cpt.adapters.language_model import decoder_of, recurrent_mixers
from dist_cpt.engines.activation_checkpoint import mlp_of
from dist_cpt.errors import ConfigError
from dist_cpt.model.attention import Choice, Packing, choose, packing_arguments
from dist_cpt.model.context_parallel import check_context_parallel
from dist_cpt.model.recurrence import install_recurrence
from tests.packed_models import V, blocks, build
from tests.tiny_hybrids import KINDS

CPU = torch.device("cpu")


@pytest.mark.parametrize("choice", ["documents", "varlen", "mask", "flex"])
def test_the_packing_of_every_attention_has_the_offsets(choice: Choice) -> None:
    _, position_ids, cu_seqlens, _ = blocks()
    packing = packing_arguments(choice, position_ids, cu_seqlens, 24)["packing"]
    assert packing.offsets == cu_seqlens.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixer_runs_once_for_each_document_and_not_as_in_training(kind: str) -> None:
    """In training mode Mamba's kernel would multiply by out_proj's weight past its adapter."""
    _, packed = build(kind)
    ids, position_ids, cu_seqlens, labels = blocks()
    lengths = torch.diff(cu_seqlens).tolist()
    mixers = recurrent_mixers(decoder_of(packed.hf_model))
    assert mixers
    seen: list[tuple[int, bool]] = []
    for mixer in mixers:
        note = partial(lambda owner, _, args: seen.append((args[0].shape[1], owner.training)), mixer)
        mixer.out_proj.register_forward_pre_hook(note)
    packed(ids, position_ids, cu_seqlens, 24, labels, 1.0)
    assert seen == [(length, False) for _ in mixers for length in lengths]
    assert all(mixer.training for mixer in mixers)
    whole = torch.tensor([0, 24, 48], dtype=torch.int32)  # each block is one document: one call for both
    seen.clear()
    packed(ids, torch.arange(24).expand(2, -1), whole, 24, labels, 1.0)
    assert seen == [(24, False) for _ in mixers]


def test_a_state_that_was_carried_on_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its border a document after another one has a loss that is off by ten times what counts as equal."""
    for kind in KINDS:
        _, packed = build(kind)
        ids, position_ids, cu_seqlens, labels = blocks()
        labels[0, :7] = -100
        with torch.no_grad():
            reset = float(packed(ids, position_ids, cu_seqlens, 24, labels, 1.0)[1])
            with monkeypatch.context() as patch:
                patch.setattr(Packing, "offsets", [0, 24, 48])
                carried = float(packed(ids, position_ids, cu_seqlens, 24, labels, 1.0)[1])
        assert abs(reset - carried) > 1e-5 * reset, kind


def test_installing_twice_is_once() -> None:
    _, packed = build("lfm2")
    decoder = decoder_of(packed.hf_model)
    before = [type(mixer) for mixer in recurrent_mixers(decoder)]
    install_recurrence(decoder)
    assert [type(mixer) for mixer in recurrent_mixers(decoder)] == before


def test_a_mixer_is_no_mlp_whatever_its_name() -> None:
    """Nemotron-H calls every one of them `mixer`; an MLP is recomputed alone, and in tiles, which no mixer could be."""
    _, packed = build("nemotron_h")
    layers = decoder_of(packed.hf_model).layers
    assert [mlp_of(layer) is not None for layer in layers] == [False, False, True]


def test_a_mask_is_refused_and_a_missing_packing_too() -> None:
    _, packed = build("lfm2")
    (mixer,) = recurrent_mixers(decoder_of(packed.hf_model))
    hidden = torch.zeros(1, 4, 32)
    with pytest.raises(ValueError, match="attention mask"):
        mixer(hidden, packing=None, attention_mask=torch.ones(1, 4))
    with pytest.raises(TypeError, match="packing"):
        mixer(hidden)


@pytest.mark.parametrize("kind", ["lfm2", "falcon_h1"])
def test_a_block_over_several_ranks_is_refused_by_name(kind: str) -> None:
    plain, _ = build(kind)
    check_context_parallel(plain.config, 1)
    with pytest.raises(ConfigError, match=rf"context_parallel 2: {kind} has layers of type (conv|hybrid), which carry"):
        check_context_parallel(plain.config, 2)


def test_flash_attention_is_not_chosen_where_it_would_say_nothing_of_borders(monkeypatch) -> None:
    monkeypatch.setattr("dist_cpt.model.attention._flash_missing", lambda: None)
    monkeypatch.setattr("dist_cpt.model.attention._why_not_flash_kernel", lambda *_: None)
    plain, _ = build("lfm2")
    dense, _ = build("llama")
    cuda = torch.device("cuda")
    assert choose(cuda, dense.config) == "flash_attention_2"
    assert choose(cuda, plain.config) != "flash_attention_2"
    with pytest.raises(ConfigError, match="recurrent layers where documents begin"):
        choose(cuda, plain.config, "flash_attention_2")


def test_another_document_changes_nothing() -> None:
    for kind in KINDS:
        _, packed = build(kind)
        ids, position_ids, cu_seqlens, labels = blocks()
        changed = ids.clone()
        changed[0, :7] = (changed[0, :7] + 1) % V
        labels[0, :7] = -100
        with torch.no_grad():
            left, right = (packed(x, position_ids, cu_seqlens, 24, labels, 1.0)[1] for x in (ids, changed))
        assert torch.equal(left, right), kind
