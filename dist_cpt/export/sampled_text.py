"""Documents that a language model writes by itself, in batches; document i has random numbers of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TopPLogitsWarper


@dataclass(frozen=True)
class SampledText:
    """One document."""

    text: str  # with its given beginning
    tokens: int  # sampled, the EOS included
    ended: bool  # by EOS, not by the limit
    loss: float  # of the sampled tokens under the model itself, in nats per token


@dataclass(frozen=True)
class Sampler:
    """A model that writes documents of at most `max_tokens` new tokens.

    Document i is a function of (model, `seed`, i, its beginning), whatever else is in its batch, up to the rounding
    of a batch of another shape.
    """

    model: Any  # a transformers causal LM in eval mode
    tokenizer: Any
    seed: int
    temperature: float
    top_p: float
    max_tokens: int

    def __call__(self, numbers: Sequence[int], beginnings: Sequence[list[int]]) -> list[SampledText]:
        """The documents with these numbers, each after the token ids that it begins with (at least one)."""
        uniforms = np.stack([_uniforms(self.seed, number, self.max_tokens) for number in numbers])
        draw = _Draw(torch.from_numpy(uniforms), self.temperature, self.top_p, self._num_ids())
        eos = self.tokenizer.eos_token_id
        input_ids, mask = _left_padded(beginnings, eos)
        settings = GenerationConfig(
            max_new_tokens=self.max_tokens, do_sample=False, eos_token_id=eos, pad_token_id=eos, use_cache=True
        )
        with torch.no_grad():
            output = self.model.generate(
                input_ids=input_ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                generation_config=settings,
                logits_processor=LogitsProcessorList([draw]),
            )
        new_ids, losses = output[:, input_ids.shape[1] :].tolist(), draw.losses().tolist()
        return [self._document(*row, eos) for row in zip(beginnings, new_ids, losses, strict=True)]

    def _num_ids(self) -> int:
        """Ids that the tokenizer can decode; a matrix may be padded beyond them."""
        return max(self.tokenizer.get_vocab().values()) + 1

    def _document(self, beginning: list[int], new_ids: list[int], losses: list[float], eos: int) -> SampledText:
        ended = eos in new_ids
        count = new_ids.index(eos) + 1 if ended else len(new_ids)
        text = self.tokenizer.decode(
            beginning + new_ids[:count], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        # A record with a NUL is a bad one.
        return SampledText(text.replace("\0", ""), count, ended, sum(losses[:count]) / count)


class _Draw(LogitsProcessor):
    """Draws the next token of each row by the inverse of its cumulative distribution, for greedy decoding to take."""

    def __init__(self, uniforms: torch.Tensor, temperature: float, top_p: float, num_ids: int) -> None:
        self._uniforms = uniforms  # fp64 [B, L] in [0, 1)
        self._temperature, self._num_ids = temperature, num_ids
        self._top_p: Any = TopPLogitsWarper(top_p) if top_p < 1 else None
        self._losses: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """fp32 [B, V] -> [B, V]: 0 for the token drawn, -inf elsewhere."""
        allowed = scores.float() / self._temperature
        allowed[:, self._num_ids :] = -torch.inf
        if self._top_p is not None:
            allowed = self._top_p(input_ids, allowed)
        cumulative = allowed.softmax(-1, dtype=torch.float64).cumsum(-1)
        total = cumulative[:, -1:]
        uniform = self._uniforms[:, len(self._losses)].to(scores.device)[:, None]
        drawn = torch.searchsorted(cumulative, uniform * total, right=True)
        drawn = drawn.minimum((cumulative < total).sum(-1, keepdim=True))  # the product may round up to the total
        self._losses.append(-scores.float().log_softmax(-1).gather(1, drawn)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)

    def losses(self) -> torch.Tensor:
        """fp32 CPU [B, tokens drawn]: -log p of each, under the model without temperature and top_p."""
        return torch.stack(self._losses, dim=1).cpu()


def _uniforms(seed: int, number: int, count: int) -> np.ndarray:
    """fp64 [count] in [0, 1), a function of the arguments; longer counts continue the same numbers."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, number], dtype=np.uint64))).random(count)


def _left_padded(rows: Sequence[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [B, L] ids and mask."""
    length = max(map(len, rows))
    ids = [[pad_id] * (length - len(row)) + row for row in rows]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)
