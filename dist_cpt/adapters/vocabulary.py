"""New tokens on a base: their ids, the initial values of their rows, and how the old rows stay unchanged.

A new row starts as the mean of the rows of the pieces into which the base's tokenizer splits the token, or as a given
mixture of old rows, in embedding and head alike. D model, V vocab.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from dist_cpt.adapters.placeholders import is_placeholder, placeholder
from dist_cpt.errors import ConfigError, DataError

_MASKED = "_only_new_rows_train"  # marks a weight that has its hook


@dataclass(frozen=True)
class NewVocabulary:
    """The tokens that an extended tokenizer adds: ids from `first_row` on, and each token's pieces in the base."""

    first_row: int
    pieces: tuple[tuple[int, ...], ...]
    tokenizer_sha256: str
    mixtures: Mapping[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)  # by row: old rows, weights
    mixtures_sha256: str | None = None  # of the file with them

    @property
    def content(self) -> list[Any]:
        """What determines it, as JSON: the two tokenizers and the initial values of the rows."""
        return [self.tokenizer_sha256, self.first_row, len(self.pieces), self.mixtures_sha256]

    @property
    def size(self) -> int:
        """Tokens of the extended tokenizer, gaps in the base's ids included."""
        return self.first_row + len(self.pieces)


def new_vocabulary(base: Any, extended: Any, extended_sha256: str, where: str) -> NewVocabulary:
    """The tokens that the fast tokenizer `extended`, from the folder or hub id `where`, appends to `base`.

    Raises:
        DataError: an id of the base has another token, there is no new token, or the new ids have a gap.
    """
    old = base.backend_tokenizer.get_vocab(with_added_tokens=True)
    new = extended.backend_tokenizer.get_vocab(with_added_tokens=True)
    remedy = "make it from the base's own tokenizer: dist-cpt tokenizer extend"
    for token, index in sorted(old.items(), key=lambda item: item[1]):
        if new.get(token) != index:
            here = f"has id {new[token]}" if token in new else "is missing"
            raise DataError(
                f"embeddings.new_tokens: {where} does not extend the base's tokenizer: {token!r} {here}, in the base "
                f"it has id {index}",
                remedy=remedy,
            )
    added = sorted((index, token) for token, index in new.items() if token not in old)
    if not added:
        raise DataError(
            f"embeddings.new_tokens: {where} adds no token to the base's tokenizer", remedy="leave new_tokens out"
        )
    first = max(old.values()) + 1
    if [index for index, _ in added] != list(range(first, first + len(added))):
        raise DataError(
            f"embeddings.new_tokens: {where}: the {len(added)} new ids must be {first} to {first + len(added) - 1}, "
            f"but they span {added[0][0]} to {added[-1][0]}",
            remedy=remedy,
        )
    return NewVocabulary(first, tuple(_pieces(base, extended, [t for _, t in added])), extended_sha256)


def extend_vocabulary(model: Any, new: NewVocabulary, pad_rows_to: int) -> None:
    """Add a row for every new token to embedding and head of a causal LM; a tied pair stays tied.

    The number of rows becomes a multiple of `pad_rows_to`; spare rows start as the mean of all old rows. If the base
    has enough spare rows, these are used and no matrix grows. Old rows are unchanged.
    Source: Hewitt 2021, Initializing New Word Embeddings for Pretrained Language Models (the spare rows).

    Raises:
        ConfigError: the base's own tokenizer has more tokens than the base has rows.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows = embeddings.num_embeddings
    if new.first_row > rows:
        raise ConfigError(
            f"model.path: the base's tokenizer has {new.first_row} tokens, its embedding {rows} rows",
            remedy="give a base whose tokenizer fits it",
        )
    if new.size > rows:
        rows = -(-new.size // pad_rows_to) * pad_rows_to
    tied = head.weight is embeddings.weight
    embeddings.weight = _grown(embeddings.weight, new, rows)
    embeddings.num_embeddings = rows
    head.weight = embeddings.weight if tied else _grown(head.weight, new, rows)
    head.out_features = rows
    model.config.get_text_config().vocab_size = rows


def untie(model: Any) -> None:
    """Give the head its own copy of the embedding, in the model and in its configuration.

    Raises:
        ConfigError: they are two matrices already.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head.weight is not embeddings.weight:
        raise ConfigError(
            "embeddings.tie: untie: head and embedding of this base are two matrices already", remedy="use tie: keep"
        )
    weight = embeddings.weight.detach()
    own = placeholder(weight.shape, weight.dtype) if is_placeholder(weight) else weight.clone()
    head.weight = nn.Parameter(own, requires_grad=embeddings.weight.requires_grad)
    model.config.get_text_config().tie_word_embeddings = False
    model.config.tie_word_embeddings = False


def train_new_rows_only(modules: Iterable[nn.Module], first_row: int) -> None:
    """Zero the gradient of the rows before `first_row` of `modules`' weights.

    This happens before anything reduces, shards, measures or clips the gradient, so it is the same under every
    engine. AdamW without decay then leaves these rows unchanged: 0 / (0 + eps) is 0.
    """
    for module in modules:
        module.register_forward_pre_hook(partial(_hook_weight, first_row))


def _hook_weight(first_row: int, module: Any, _: Any) -> None:
    # In forward: under FSDP2 the weight that computes is another tensor than the registered one.
    weight = module.weight
    if weight.requires_grad and not hasattr(weight, _MASKED):
        weight.register_hook(partial(_zero_rows, first_row))
        setattr(weight, _MASKED, True)


def _zero_rows(first_row: int, grad_VD: torch.Tensor) -> torch.Tensor:
    # In place: backward has just allocated it, and a copy would be a second vocabulary matrix.
    grad_VD[:first_row].zero_()
    return grad_VD


def _grown(weight_VD: torch.Tensor, new: NewVocabulary, rows: int) -> nn.Parameter:
    old = weight_VD.detach()
    unread = is_placeholder(old)
    grown = placeholder((rows, old.shape[1]), old.dtype) if unread else with_rows(old, new, rows)
    return nn.Parameter(grown, requires_grad=weight_VD.requires_grad)


def with_rows(old: torch.Tensor, new: NewVocabulary, rows: int) -> torch.Tensor:
    """A vocabulary matrix [old rows, D] with `rows` rows, those of `new` tokens and spare ones included."""
    grown = old.new_empty(rows, old.shape[1])
    grown[: len(old)] = old[:rows]
    mean = old[: new.first_row].mean(0, dtype=torch.float32)
    grown[len(old) :] = mean
    for row, pieces in enumerate(new.pieces, start=new.first_row):
        if row in new.mixtures:
            ids, weights = (torch.from_numpy(values).to(old.device) for values in new.mixtures[row])
            grown[row] = (old[ids].float() * weights[:, None]).sum(0)
        else:
            grown[row] = old[list(pieces)].mean(0, dtype=torch.float32) if pieces else mean
    return grown


def _pieces(base: Any, extended: Any, tokens: list[str]) -> Iterable[tuple[int, ...]]:
    """Ids of each new token's pieces in the base's vocabulary, unknown ones left out."""
    backend, unknown = base.backend_tokenizer, base.unk_token_id
    known = extended.backend_tokenizer.get_vocab(with_added_tokens=False)
    added = {token.content for token in extended.added_tokens_decoder.values()}
    for token in tokens:
        if token in known and token not in added:
            # Already normalised and pre-tokenised: go to the model directly.
            ids = [piece.id for piece in _tokenize(backend.model, token)]
        else:
            ids = backend.encode(token, add_special_tokens=False).ids
        yield tuple(index for index in ids if index != unknown)


def _tokenize(model: Any, token: str) -> list[Any]:
    try:
        return model.tokenize(token)
    except Exception:  # a Unigram model without <unk> raises a bare Exception for an unknown character
        return []
