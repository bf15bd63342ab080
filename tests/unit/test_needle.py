"""The needle check: what its texts are, and that only a model that finds the sentence scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dist_cpt.errors import ConfigError
from dist_cpt.export.needle import DEPTHS, NUM_FACTS, Haystack, NeedleOptions, haystack, needle_scores
from tests import tiny

LENGTH = 400


@pytest.fixture(scope="module")
def hay(tmp_path_factory: pytest.TempPathFactory) -> Haystack:
    folder = tmp_path_factory.mktemp("needle")
    corpus = tiny.write_corpus(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny.write_tokenizer(folder, corpus))
    ids = tokenizer(corpus.read_text()[:20_000])["input_ids"] + [tokenizer.eos_token_id]
    return haystack(tokenizer, np.array(ids, dtype=np.int32))


class Rigged(torch.nn.Module):
    """A model whose next token is `answer(ids)`, of the last `window` ids; -1: all tokens are as probable."""

    def __init__(self, answer: Callable[[list[int]], int], window: int = LENGTH, other: float = 0.0) -> None:
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self._answer, self._window, self._other = answer, window, other

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        logits = torch.full((1, 1, tiny.VOCAB_SIZE), self._other)
        answer = self._answer(input_ids[0, -self._window :].tolist())
        if answer >= 0:
            logits[..., answer] = 1.0
        return SimpleNamespace(logits=logits)


def copy_after_the_key(hay: Haystack) -> Callable[[list[int]], int]:
    """What follows the earlier place of the question, as an induction head finds it."""
    size = len(hay.sentence.question(0))

    def answer(ids: list[int]) -> int:
        places = [n for n in range(len(ids) - size) if ids[n : n + size] == ids[-size:]]
        return ids[places[0] + size] if places else -1

    return answer


def scores(model: torch.nn.Module, hay: Haystack, samples: int = 8) -> dict[str, Any]:
    [row] = needle_scores(model, hay, NeedleOptions((LENGTH,), samples))
    return row


def test_a_model_that_finds_the_sentence_scores_one_at_every_depth(hay: Haystack) -> None:
    row = scores(Rigged(copy_after_the_key(hay)), hay)
    assert row == {
        "task": f"needle_{LENGTH}",
        "samples": 40,
        "accuracy": 1.0,
        "chance": 1 / NUM_FACTS,
        **{f"depth_{depth:g}": 1.0 for depth in DEPTHS},
    }


def test_a_model_that_sees_the_end_alone_finds_what_is_there(hay: Haystack) -> None:
    row = scores(Rigged(copy_after_the_key(hay), window=120), hay)
    assert [row[f"depth_{depth:g}"] for depth in (0.0, 0.25, 0.5, 1.0)] == [0.0, 0.0, 0.0, 1.0]


def test_any_value_of_the_text_is_right_by_chance(hay: Haystack) -> None:
    """Which value comes first in the text says nothing of the key."""
    middle, size = hay.sentence.middle, len(hay.sentence.question(0))

    def first_value(ids: list[int]) -> int:
        places = [n for n in range(1, len(ids) - size) if ids[n : n + len(middle)] == middle]
        return next(ids[n + len(middle)] for n in places if ids[n - 1] in hay.words)

    row = scores(Rigged(first_value), hay, samples=16)
    assert row["depth_0"] == 1.0  # the fact at depth 0 does come first
    assert all(row[f"depth_{depth:g}"] <= 0.25 for depth in DEPTHS[2:])


@pytest.mark.parametrize("other", [0.0, math.nan])
def test_no_preference_is_no_answer(other: float, hay: Haystack) -> None:
    assert scores(Rigged(lambda _: -1, other=other), hay)["accuracy"] == 0.0


def test_an_untrained_model_guesses(hay: Haystack) -> None:
    """80 texts, p = 1/8: 10 right answers, with a standard deviation of 3."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=tiny.VOCAB_SIZE, max_position_embeddings=LENGTH, **sizes))
    row = scores(model, hay, samples=16)
    assert 0.0 < row["accuracy"] < 1 / NUM_FACTS + 9 / 80
    assert row == scores(model, hay, samples=16)


def test_a_text_has_its_length_and_the_sentence_at_its_depth(hay: Haystack) -> None:
    for depth in DEPTHS:
        ids, values = hay.text(LENGTH, depth, np.random.default_rng(3))
        assert len(ids) == LENGTH
        question = ids[-len(hay.sentence.question(0)) :]
        places = [n for n in range(LENGTH - len(question)) if ids[n : n + len(question)] == question]
        assert [ids[n + len(question)] for n in places] == values[:1]
        facts = (NUM_FACTS + 1) * len(question)  # that the filler's share may be off by
        assert abs(places[0] - depth * LENGTH) <= facts
        assert len(set(values)) == NUM_FACTS
        assert all(ids.count(value) >= 1 for value in values)


def test_what_cannot_be_asked_is_refused(hay: Haystack, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--needle 40: the sentences alone need \d+ tokens"):
        hay.text(40, 0.0, np.random.default_rng(0))
    corpus = tiny.write_corpus(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny.write_tokenizer(tmp_path, corpus, vocab_size=258))
    with pytest.raises(ConfigError, match="0 words of one token"):
        haystack(tokenizer, np.arange(3))
    with pytest.raises(ConfigError, match="no text"):
        haystack(tokenizer, np.array([tokenizer.eos_token_id]))
