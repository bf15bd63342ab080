"""The input of one forward: packed blocks with their document borders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Batch:
    """Blocks of packed documents for one forward of one rank. B blocks of L tokens, T = B * L.

    With `num_parts` above 1 the tensors [B, L] are this rank's part of longer blocks, whose other parts are in the same
    forward of other ranks; `cu_seqlens` and `max_seqlen` are those of the whole blocks.

    `labels[b, l]` is the target predicted at position l: the next token of the same document, or IGNORE_INDEX at its
    last token and in padding. `position_ids` restart at 0 with each document. `cu_seqlens` are the document borders
    over the flattened T tokens; the padding of a block counts as one more document.
    """

    input_ids: torch.Tensor  # int64 [B, L]
    labels: torch.Tensor  # int64 [B, L], already shifted
    position_ids: torch.Tensor  # int64 [B, L]
    cu_seqlens: torch.Tensor  # int32 [num_documents + 1], starts at 0, ends at T
    max_seqlen: int
    num_targets: int  # labels that are not IGNORE_INDEX; a Python int: no host sync
    counts_by_source: np.ndarray  # int64 [num_sources, 3]: blocks, tokens without padding, targets
    block_ids: tuple[int, ...]  # global stream positions of the B blocks
    num_parts: int = 1

    def cut(self, part: int, num_parts: int) -> Batch:
        """Part `part` of `num_parts` of every block, in order; only part 0 counts the sources."""
        if num_parts == 1:
            return self
        tensors = (self.input_ids, self.labels, self.position_ids)
        input_ids, labels, position_ids = (x.chunk(num_parts, dim=1)[part].contiguous() for x in tensors)
        return replace(
            self,
            input_ids=input_ids,
            labels=labels,
            position_ids=position_ids,
            num_targets=int((labels != IGNORE_INDEX).sum()),
            counts_by_source=self.counts_by_source * (part == 0),
            num_parts=num_parts,
        )

    def pinned(self) -> Batch:
        """The same batch in memory from which a GPU copies by itself, beside what it computes."""
        return self._with(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""
        if self.input_ids.device == device:
            return self
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def _with(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        names = ("input_ids", "labels", "position_ids", "cu_seqlens")
        return replace(self, **{name: change(getattr(self, name)) for name in names})
