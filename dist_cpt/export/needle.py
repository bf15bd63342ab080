"""Does a model find one sentence anywhere in a long text? A synthetic check of a context's use.

Sentences "The code of KEY is VALUE." are hidden in running text, and a question at its end asks for one of them. Its
place is the depth, 0 the beginning; the others are anywhere. Keys and values are words of one token, so a model answers
in one forward, with the value of the highest probability. All values are in the text: a model that cannot tell which
belongs to the key is right once in NUM_FACTS.

Source: Hsieh et al. 2024, RULER (arXiv 2404.06654), the task with several keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dist_cpt.data.tokenizer import adds_bos
from dist_cpt.errors import ConfigError
from dist_cpt.export.generate import require_positions
from dist_cpt.runtime.liveness import made_progress

NUM_FACTS = 8  # in a text, of which one is asked for
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_SEED = 0
_FILLER_TOKENS = 2**24  # more than the longest text needs
_COMMON_WORDS = 2000  # the tokens with the lowest ids are the most frequent
_WORD = re.compile("[Ġ▁][a-z]{3,}")  # as byte-level and SentencePiece vocabularies write a word after a space


@dataclass(frozen=True)
class NeedleOptions:
    """Texts of which lengths, and how many of each length and depth."""

    lengths: tuple[int, ...] = ()  # in tokens, question included
    samples: int = 8


@dataclass(frozen=True)
class Sentence:
    """The token ids of `The code of KEY is VALUE.` around its two words."""

    start: list[int]
    middle: list[int]
    end: list[int]

    def fact(self, key: int, value: int) -> list[int]:
        return [*self.start, key, *self.middle, value, *self.end]

    def question(self, key: int) -> list[int]:
        return [*self.start, key, *self.middle]


@dataclass(frozen=True)
class Haystack:
    """What texts are made of."""

    filler: np.ndarray  # token ids of running text, read in a circle
    words: np.ndarray  # ids of the words that keys and values are drawn from
    sentence: Sentence
    first: list[int]  # what begins a text: a bos or nothing

    def text(self, length: int, depth: float, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """A text of `length` token ids, and its values, of which the first is right.

        Raises:
            ConfigError: `length` has no room for the sentences.
        """
        words = rng.choice(self.words, 2 * NUM_FACTS, replace=False).tolist()
        keys, values = words[:NUM_FACTS], words[NUM_FACTS:]
        question = self.sentence.question(keys[0])
        facts = [self.sentence.fact(key, value) for key, value in zip(keys, values, strict=True)]
        room = length - len(self.first) - len(question) - sum(map(len, facts))
        if room < 1:
            raise ConfigError(
                f"--needle {length}: the sentences alone need {length - room} tokens", remedy="ask for longer texts"
            )
        at = int(rng.integers(len(self.filler)))
        filler = np.take(self.filler, range(at, at + room), mode="wrap").tolist()
        places = [round(depth * room), *rng.integers(0, room + 1, NUM_FACTS - 1).tolist()]
        ids = [*self.first]
        before = 0
        for place, number in sorted(zip(places, range(NUM_FACTS), strict=True)):
            ids += [*filler[before:place], *facts[number]]
            before = place
        return [*ids, *filler[before:], *question], values


def haystack(tokenizer: Any, filler: np.ndarray) -> Haystack:
    """Texts in the words of `tokenizer` and the token ids `filler`, whose document ends are left out.

    Raises:
        ConfigError: no filler, or too few words of one token.
    """
    filler = filler[:_FILLER_TOKENS]
    filler = filler[filler != (-1 if tokenizer.eos_token_id is None else tokenizer.eos_token_id)]
    if not len(filler):
        raise ConfigError("--needle: no text to hide a sentence in", remedy="give text with --data")
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    words = [number for number, name in enumerate(names) if _WORD.fullmatch(name or "")][:_COMMON_WORDS]
    if len(words) < 2 * NUM_FACTS:
        raise ConfigError(
            f"--needle: the tokenizer has {len(words)} words of one token in Latin letters, {2 * NUM_FACTS} are needed"
        )
    parts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("\nThe code of", " is", ".\n")]
    first = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    return Haystack(filler, np.array(words), Sentence(*parts), first)


def needle_scores(model: Any, hay: Haystack, wanted: NeedleOptions) -> Iterator[dict[str, Any]]:
    """A row for each length: the fraction of right answers, over all and by depth. The same for the same arguments.

    Raises:
        ConfigError: a length has no room for the sentences, or exceeds a learned table of positions.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device).eval()
    for length in wanted.lengths:
        require_positions(model, length, 0)
        right = np.zeros((len(DEPTHS), wanted.samples), dtype=bool)
        for row, depth in enumerate(DEPTHS):
            for sample in range(wanted.samples):
                ids, values = hay.text(length, depth, np.random.default_rng((_SEED, length, row, sample)))
                right[row, sample] = _is_first_best(model, ids, values)
                made_progress()
        by_depth = {f"depth_{depth:g}": float(share) for depth, share in zip(DEPTHS, right.mean(axis=1), strict=True)}
        scores = {"accuracy": float(right.mean()), "chance": 1 / NUM_FACTS, **by_depth}
        yield {"task": f"needle_{length}", "samples": right.size, **scores}


@torch.no_grad()
def _is_first_best(model: Any, ids: Sequence[int], values: Sequence[int]) -> bool:
    """Whether the model finds the first of `values` more probable as the next token than each other one."""
    input_ids = torch.tensor([ids], device=next(model.parameters()).device)
    logits = model(input_ids=input_ids, use_cache=False, logits_to_keep=1).logits[0, -1]
    first, *others = logits[torch.tensor(values, device=logits.device)].tolist()
    return all(first > other for other in others)  # neither a tie nor NaN is an answer
