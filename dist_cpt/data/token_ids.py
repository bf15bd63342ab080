"""Texts to token ids, in batches, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def unpadded_copy(backend: Tokenizer) -> Any:
    """A copy of a tokenizers backend that neither pads nor truncates, and that no later call can change."""
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(backend.to_str())
    copy.no_padding()
    copy.no_truncation()
    return copy


def batch_ids(backend: Any, texts: Sequence[str], *, special_tokens: bool = False) -> list[list[int]]:
    """The token ids of each text, tokenised in parallel by the backend's own threads."""
    # _fast leaves out character offsets, which take as long as the rest.
    return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=special_tokens)]
