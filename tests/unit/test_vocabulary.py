"""New tokens on a base: what their rows begin with, which rows move, and what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from dist_cpt.adapters.vocabulary import (
    NewVocabulary,
    extend_vocabulary,
    new_vocabulary,
    train_new_rows_only,
    untie,
)
from dist_cpt.config.load import build
from dist_cpt.config.resolve import resolve_paths
from dist_cpt.config.schema import OptimConfig, ScheduleConfig
from dist_cpt.data.tokenizer import load_new_vocabulary, load_tokenizer
from dist_cpt.data.tokenizer_extend import extend_tokenizer
from dist_cpt.errors import ConfigError, DataError
from dist_cpt.optim.groups import ParamGroup, param_groups
from dist_cpt.optim.optimizer import AdamW, Part
from dist_cpt.optim.schedule import fraction, learning_rates
from tests import tiny

NEW = NewVocabulary(6, ((0, 1), (2,), ()), "0" * 64)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(the base's tokenizer, an extended one, what it added)."""
    folder = tmp_path_factory.mktemp("made")
    corpus = tiny.write_corpus(folder / "corpus", 40)
    base = tiny.write_tokenizer(folder / "base", corpus)
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    done = extend_tokenizer(str(base), folder / "extended", lambda: texts, num_new=20)
    return base, folder / "extended", done.tokens


class Model(nn.Module):
    """As much of a causal LM as has a vocabulary."""

    def __init__(self, rows: int, tied: bool, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(rows, 4, dtype=dtype)
        self.head = nn.Linear(4, rows, bias=False, dtype=dtype)
        if tied:
            self.head.weight = self.embeddings.weight
        self.config = SimpleNamespace(vocab_size=rows, tie_word_embeddings=tied)
        self.config.get_text_config = lambda: self.config

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


def test_pieces_are_those_of_the_old_tokenizer(made):
    base, extended, tokens = made
    old, new = load_tokenizer(str(base)), load_tokenizer(str(extended))
    found = new_vocabulary(old, new, "hash", "here")
    assert found.first_row == len(old) == tiny.VOCAB_SIZE
    assert (found.size, found.tokenizer_sha256) == (len(new), "hash")
    text = [token for token in tokens if token.startswith("Ġ")]
    assert text
    for token in text:  # Ġ is how the model writes a space
        pieces = found.pieces[tokens.index(token)]
        assert list(pieces) == old.encode(token.replace("Ġ", " "), add_special_tokens=False)
        assert len(pieces) > 1, "its own row would be no piece of it"


def test_an_added_token_is_cut_as_text(made, tmp_path):
    base, _, _ = made
    old, new = load_tokenizer(str(base)), load_tokenizer(str(base))
    new.add_tokens(["<call>"], special_tokens=True)
    assert new_vocabulary(old, new, "", "").pieces == (tuple(old.encode("<call>")),)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_rows_are_the_mean_of_their_pieces_and_old_ones_keep_every_bit(tied, dtype):
    model = Model(6, tied, dtype)
    old = [m.weight.detach().clone() for m in (model.embeddings, model.head)]
    extend_vocabulary(model, NEW, pad_rows_to=8)
    assert (model.head.weight is model.embeddings.weight) is tied
    assert model.config.vocab_size == model.embeddings.num_embeddings == model.head.out_features == 16
    for before, module in zip(old, (model.embeddings, model.head), strict=True):
        rows = module.weight.detach()
        assert rows.shape == (16, 4)
        assert rows.dtype == dtype
        assert torch.equal(rows[:6], before)
        assert torch.equal(rows[6], ((before[0].float() + before[1].float()) / 2).to(dtype))
        assert torch.equal(rows[7], before[2])
        mean = before.float().mean(0).to(dtype)
        assert all(torch.equal(row, mean) for row in rows[8:])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_with_a_mixture_begins_as_it_in_both_matrices(tied, dtype):
    model = Model(6, tied, dtype)
    old = [module.weight.detach().clone() for module in (model.embeddings, model.head)]
    mixture = np.array([1, 4, 5]), np.array([0.5, 0.3, 0.2], dtype=np.float32)
    extend_vocabulary(model, replace(NEW, mixtures={7: mixture}), pad_rows_to=1)
    for module, before in zip((model.embeddings, model.head), old, strict=True):
        rows, wide = module.weight.detach(), before.float()
        expected = 0.5 * wide[1] + 0.3 * wide[4] + 0.2 * wide[5]
        assert torch.allclose(rows[7].float(), expected, atol=1e-6 if dtype == torch.float32 else 2e-2)
        assert torch.equal(rows[6], ((wide[0] + wide[1]) / 2).to(dtype)), "without a mixture, the mean"
        assert torch.equal(rows[:6], before)


def test_spare_rows_of_the_base_are_used_first():
    model = Model(10, tied=False)
    old = model.head.weight.detach().clone()
    extend_vocabulary(model, NEW, pad_rows_to=64)
    rows = model.head.weight.detach()
    assert rows.shape == (10, 4)
    assert torch.equal(rows[7], old[2])
    assert torch.equal(rows[8], old[:6].mean(0)), "spare rows are left out of the mean"
    assert torch.equal(rows[9], old[9])
    with pytest.raises(ConfigError, match=r"model\.path: .* 6 .* 5 "):
        extend_vocabulary(Model(5, tied=False), NEW, pad_rows_to=64)


def test_untie_makes_a_copy_and_refuses_two_matrices():
    model = Model(6, tied=True)
    untie(model)
    assert model.head.weight is not model.embeddings.weight
    assert torch.equal(model.head.weight, model.embeddings.weight)
    assert model.config.tie_word_embeddings is False
    with pytest.raises(ConfigError, match=r"embeddings\.tie: untie"):
        untie(model)


@pytest.mark.parametrize("tied", [True, False])
def test_old_rows_get_no_gradient_and_do_not_move(tied):
    model, free = Model(8, tied), Model(8, tied)
    free.load_state_dict(model.state_dict())
    train_new_rows_only((model.embeddings, model.head), 5)
    before = model.head.weight.detach().clone()
    ids = torch.tensor([1, 2, 6, 7])
    for one in (model, free):
        for _ in range(2):  # two micro-batches
            nn.functional.cross_entropy(one.head(one.embeddings(ids)), ids.flip(0)).backward()
    for name, parameter in model.named_parameters():
        grad, whole = parameter.grad, free.get_parameter(name).grad
        assert grad is not None
        assert whole is not None
        assert not grad[:5].any()
        assert torch.equal(grad[5:], whole[5:])
        assert whole[:5].any()
    weights = {"head": model.head.weight.data}
    adam = AdamW(weights, OptimConfig())
    grad = model.head.weight.grad
    assert grad is not None
    for _ in range(3):
        adam.update([Part(["head"], [grad], 0.1, 0.0)])
        adam.steps += 1
    assert torch.equal(weights["head"][:5], before[:5])
    assert not torch.equal(weights["head"][5:], before[5:])


def test_a_tokenizer_that_does_not_extend_the_base_is_refused(made, tmp_path):
    base, extended, _ = made
    old, new = load_tokenizer(str(base)), load_tokenizer(str(extended))
    with pytest.raises(DataError, match=r"there .*'.+' .* id 512"):
        new_vocabulary(new, old, "", "there")
    with pytest.raises(DataError, match="adds no token"):
        new_vocabulary(old, old, "", "there")
    content = json.loads(new.backend_tokenizer.to_str())
    vocab = content["model"]["vocab"]
    first, second = list(vocab)[2:4]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    swapped = load_tokenizer(str(extended))
    swapped._tokenizer = type(swapped.backend_tokenizer).from_str(json.dumps(content))
    with pytest.raises(DataError, match=f"{first!r} has id 3.* id 2"):
        new_vocabulary(old, swapped, "", "there")


def recipe(embeddings, **changes):
    values = {
        "name": "run",
        "model": {"path": "/base"},
        "embeddings": {"train": ["embed_tokens", "lm_head"], "new_tokens": "/extended"} | embeddings,
        "data": {"seq_len": 128, "sources": [{"path": "corpus.jsonl"}]},
        "batch": {"global_tokens": 1024},
        "train": {"tokens": 10_240},
    }
    return build(values | changes, "recipe.yaml")


@pytest.mark.parametrize(
    ("embeddings", "changes", "settings"),
    [
        ({"rows": "new", "new_tokens": None}, {}, "embeddings.new_tokens: null, embeddings.rows: new"),
        ({"pad_rows_to": 8, "new_tokens": None}, {}, "embeddings.new_tokens: null, embeddings.pad_rows_to: 8"),
        ({"init": "focus", "new_tokens": None}, {}, "embeddings.new_tokens: null, embeddings.init: focus"),
        ({"train": ["lm_head"]}, {}, "embeddings.train: [lm_head]"),
        (
            {"rows": "new"},
            {"optim": {"embedding_weight_decay": 0.1}},
            "embeddings.rows: new, optim.embedding_weight_decay: 0.1",
        ),
        (
            {"rows": "new"},
            {"adapter": {"continue_from": {"path": "a", "optimizer": True}}},
            "embeddings.rows: new, adapter.continue_from.optimizer: true",
        ),
        ({"freeze_rest_steps": 10}, {}, "embeddings.freeze_rest_steps: 10, train.tokens: 10240"),
        (
            {"freeze_rest_steps": 2, "new_tokens": None, "train": []},
            {},
            "embeddings.freeze_rest_steps: 2, adapter.kind: lora, embeddings.train: null",
        ),
        (
            {"tie": "untie", "new_tokens": None, "train": []},
            {},
            "embeddings.tie: untie, adapter.kind: lora, embeddings.train: null",
        ),
        ({"tie": "untied"}, {}, "embeddings.tie"),
        ({"kind": "lora"}, {}, "embeddings.kind: lora, embeddings.new_tokens: /extended"),
        ({"kind": "lora", "new_tokens": None, "tie": "untie"}, {}, "embeddings.kind: lora, embeddings.tie: untie"),
        ({"kind": "lora", "new_tokens": None, "train": []}, {}, "embeddings.kind: lora, embeddings.train: null"),
        (
            {"kind": "lora", "new_tokens": None},
            {"adapter": {"dropout": 0.1}},
            "embeddings.kind: lora, adapter.dropout: 0.1",
        ),
        (
            {"kind": "lora", "new_tokens": None},
            {"adapter": {"continue_from": "a"}},
            "embeddings.kind: lora, adapter.continue_from",
        ),
        (
            {"train": []},
            {"model": {"config": {"model_type": "llama"}}, "adapter": {"kind": "none"}, "data": {
                "seq_len": 128, "tokenizer": "/t", "sources": [{"path": "a"}]}},
            "model.config: {...}, embeddings.new_tokens: /extended",
        ),
    ],
)  # fmt: skip
def test_settings_that_exclude_each_other_are_refused(embeddings, changes, settings):
    with pytest.raises(ConfigError, match=re.escape(settings)) as caught:
        recipe(embeddings, **changes)
    assert "\n" not in str(caught.value)


def test_the_corpus_is_read_with_the_extended_tokenizer():
    assert resolve_paths(recipe({})).data.tokenizer == "/extended"
    assert resolve_paths(resolve_paths(recipe({}))).data.tokenizer == "/extended"
    other = {"seq_len": 128, "tokenizer": "/base", "sources": [{"path": "corpus.jsonl"}]}
    with pytest.raises(ConfigError, match=r"embeddings\.new_tokens: /extended, data\.tokenizer: /base"):
        resolve_paths(recipe({}, data=other))


def test_low_rank_embeddings_train_as_fast_as_the_adapter():
    def rate(**embeddings):
        return resolve_paths(recipe({"new_tokens": None} | embeddings, optim={"lr": 1e-3})).optim.embedding_lr

    assert (rate(), rate(kind="lora")) == (1e-4, 1e-3)
    names = ["base_model.model.lm_head.lora_B.weight", "base_model.model.model.embed_tokens.lora_embedding_A"]
    groups = param_groups({n: torch.zeros(2, 2) for n in [*names, "x.q_proj.lora_B.weight"]}, OptimConfig(), True)
    assert {group.name: list(group.names) for group in groups} == {
        "adapter": ["x.q_proj.lora_B.weight"],
        "embeddings": names,
    }


def test_a_missing_tokenizer_is_one_line(made, tmp_path):
    base, extended, _ = made
    for model, new, remedy in ((tmp_path, extended, "model.path"), (base, tmp_path, "tokenizer extend")):
        config = recipe({"new_tokens": str(new)}, model={"path": str(model)})
        with pytest.raises(DataError, match=remedy) as caught:
            load_new_vocabulary(config)
        assert "\n" not in str(caught.value)
    assert load_new_vocabulary(recipe({"new_tokens": None})) is None


def test_a_group_frozen_at_first_has_its_whole_schedule_afterwards():
    schedule = ScheduleConfig(warmup_fraction=0.2)
    groups = [ParamGroup("adapter", ("a",), 1.0, 0.0, frozen_steps=5), ParamGroup("embeddings", ("e",), 1.0, 0.0)]
    rates = [learning_rates(schedule, groups, step, 25) for step in range(1, 26)]
    assert [at["adapter"] for at in rates[:5]] == [0.0] * 5
    assert [at["adapter"] for at in rates[5:]] == [fraction(schedule, step, 20) for step in range(1, 21)]
    assert [at["embeddings"] for at in rates] == [fraction(schedule, step, 25) for step in range(1, 26)]
