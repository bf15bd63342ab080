"""Blocks of a million tokens: through the store, packing, position ids, borders and labels, and through a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from dist_cpt.data.batch import IGNORE_INDEX, Batch
from dist_cpt.data.loader import BlockLoader
from dist_cpt.data.prepared import Prepared, PreparedSource
from dist_cpt.data.store import StoreWriter, TokenStore
from dist_cpt.engines.activation_checkpoint import checkpoint_layers
from dist_cpt.model.attention import choose, install
from dist_cpt.model.loss import CausalLMForLoss, PositionLosses, install_loss_head
from dist_cpt.plan.recomputation import TILE_TOKENS, Policy
from dist_cpt.train.tasks import log_likelihoods

LONG = 2**20
V = 512


def block(folder: Path, lengths: list[int], seq_len: int) -> Batch:
    ids = np.arange(sum(lengths), dtype=np.int32) % 60_000
    (folder / "s").mkdir()
    writer = StoreWriter(folder / "s", 60_000)
    writer.append(ids, np.array(lengths, dtype=np.int32))
    writer.finish("t", {"name": "s"}, {}, [])
    source = PreparedSource("s", 1.0, "domain", TokenStore.open(folder / "s"))
    return BlockLoader(Prepared([source], [], "t", 60_000, "i", seq_len), seq_len, 0, 1).batch([0])


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


def small_model(**changes: int) -> CausalLMForLoss:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1} | changes
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, num_hidden_layers=1, max_position_embeddings=LONG, **sizes))
    install_loss_head(model.lm_head, model.config, use_reference=False)
    install(model, choice := choose(torch.device("cpu"), model.config))
    return CausalLMForLoss(model, choice).train()


def test_a_document_of_a_million_tokens_is_one_block(tmp_path: Path) -> None:
    batch = block(tmp_path, [LONG], LONG)
    assert batch.input_ids.shape == (1, LONG)
    assert torch.equal(batch.position_ids[0], torch.arange(LONG))
    assert batch.cu_seqlens.tolist() == [0, LONG]
    assert (batch.max_seqlen, batch.num_targets) == (LONG, LONG - 1)
    assert torch.equal(batch.labels[0, :-1], batch.input_ids[0, 1:])
    last = batch.cut(7, 8)  # the last part: its positions go on, and its last token has no target
    assert last.position_ids[0, [0, -1]].tolist() == [LONG - LONG // 8, LONG - 1]
    assert (last.labels[0, -1], last.num_targets, int(last.counts_by_source.sum())) == (IGNORE_INDEX, LONG // 8 - 1, 0)
    parts = [batch.cut(part, 8) for part in range(8)]
    assert torch.equal(torch.cat([part.labels for part in parts], 1), batch.labels)
    assert sum(part.num_targets for part in parts) == batch.num_targets
    assert (sum(part.counts_by_source for part in parts) == batch.counts_by_source).all()


def test_positions_up_to_a_million_rotate_each_by_its_angle() -> None:
    """Angles to what fp32 can tell: a position times a frequency has 24 bits."""
    model = small_model().hf_model
    position_ids = torch.tensor([[0, 1, 2**17 + 1, LONG - 2, LONG - 1]])
    cos, sin = model.model.rotary_emb(torch.zeros(1, 5, 16), position_ids)
    frequencies = 10_000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    angles = position_ids[0].double()[:, None] * frequencies
    for table, exact in ((cos, angles.cos()), (sin, angles.sin())):
        error = (table[0, :, :4].double() - exact).abs()
        assert (error <= 2.0**-23 + 2 * angles * 2.0**-24).all()
    assert len(torch.unique(cos[0], dim=0)) == 5


def test_the_loss_by_position_is_that_of_each_token(tmp_path: Path) -> None:
    model = small_model().eval()
    batch = block(tmp_path, [1500, 300, 248], 2048)
    ids, labels = batch.input_ids % V, torch.where(batch.labels == IGNORE_INDEX, IGNORE_INDEX, batch.labels % V)
    inputs = ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen
    head = model.loss_head
    head.recorder = positions = PositionLosses(2048, torch.device("cpu"))
    with torch.no_grad():
        _, loss = model(*inputs, labels)
        head.recorder = None
        _, whole = model(*inputs, labels)
        logits = torch.nn.functional.linear(model.hidden(*inputs)[0], head.weight)
    by_token = torch.nn.functional.cross_entropy(logits, labels[0], reduction="none").double()
    assert positions.starts == [0, 64, 256, 1024]
    for (total, count), start, stop in zip(positions.sums, (0, 64, 256, 1024), (64, 256, 1024, 2048), strict=True):
        here = (batch.position_ids[0] >= start) & (batch.position_ids[0] < stop) & (labels[0] != IGNORE_INDEX)
        assert int(count) == int(here.sum()) > 0
        assert float(total) == pytest.approx(float(by_token[here].sum()), rel=1e-5)
    assert float(loss) == pytest.approx(float(whole), rel=1e-6)


@pytest.mark.parametrize("length", [2**15, pytest.param(LONG, marks=pytest.mark.matrix)])
def test_no_tensor_of_a_long_block_is_tokens_by_vocabulary(length: int, tmp_path: Path) -> None:
    """Forward and backward of a block of many documents; the logits exist a chunk of tokens at a time."""
    model = small_model()
    batch = block(tmp_path, [1024] * (length // 1024), length)
    ids, labels = batch.input_ids % V, torch.where(batch.labels == IGNORE_INDEX, IGNORE_INDEX, batch.labels % V)
    with Largest() as largest:
        scaled, loss = model(
            ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen, labels, 1.0 / batch.num_targets
        )
        scaled.backward()
    assert 5.0 < float(loss) / batch.num_targets < 8.0  # ln V = 6.2
    assert largest.elements <= max(32 * length, 2048 * V)  # F features of every token, or a chunk of logits


def test_the_likelihood_of_an_answer_is_that_of_its_tokens_after_the_question() -> None:
    model = small_model().eval()
    random = np.random.default_rng(0)

    def ids(length: int) -> list[int]:
        return random.integers(0, V, length).tolist()

    answers = [(ids(question), ids(answer)) for question, answer in ((5, 1), (30, 4), (1, 9), (60, 3), (2, 2))]
    sizes: list[int] = []

    class Evaluates:
        """The part of an engine that is needed."""

        def evaluate(self, batch: Batch) -> torch.Tensor:
            sizes.append(batch.input_ids.numel())
            with torch.no_grad():
                return model(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen, batch.labels)[1]

    engine: Any = Evaluates()
    found = log_likelihoods(engine, model.loss_head, answers, longest=40, budget=48)
    assert len(sizes) == 3
    assert max(sizes) <= 48
    assert model.loss_head.recorder is None
    for (question, answer), value in zip(answers, found, strict=True):
        text = [*question, *answer][-41:]  # the question of 60 tokens loses its first
        whole = torch.tensor([text[:-1]])
        length = whole.shape[1]
        borders = torch.tensor([0, length], dtype=torch.int32)
        with torch.no_grad():
            hidden = model.hidden(whole, torch.arange(length)[None], borders, length)
            logits = torch.nn.functional.linear(hidden[0], model.loss_head.weight).log_softmax(-1)
        expected = sum(float(logits[length - len(answer) + n, token]) for n, token in enumerate(answer))
        assert value == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("policy", ["selective", "full"])
def test_no_tensor_of_a_long_block_is_tokens_by_ffn(policy: Policy, tmp_path: Path) -> None:
    """F = 16 D: with MLPs in tiles the largest tensor of forward and backward is one of a tile, or [L, D]."""
    length, tile, wide = 2**15, TILE_TOKENS, 256
    batch = block(tmp_path, [1024] * (length // 1024), length)
    ids, labels = batch.input_ids % V, torch.where(batch.labels == IGNORE_INDEX, IGNORE_INDEX, batch.labels % V)
    found = {}
    for tokens in (0, length):
        model = small_model(intermediate_size=wide)
        checkpoint_layers(model.hf_model.model.layers, policy, torch.device("cpu"), tokens)
        with Largest() as largest:
            scaled, loss = model(
                ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen, labels, 1.0 / batch.num_targets
            )
            scaled.backward()
        found[tokens] = largest.elements, {name: p.grad for name, p in model.named_parameters()}, float(loss)
    (whole, gradients, loss), (tiled, by_tile, loss_by_tile) = found[0], found[length]
    assert (whole, tiled) == (length * wide, tile * wide)
    assert loss_by_tile == pytest.approx(loss, rel=1e-6)
    for name, expected in gradients.items():
        assert float((by_tile[name] - expected).abs().max()) <= 1e-5 * float(expected.abs().max()), name
