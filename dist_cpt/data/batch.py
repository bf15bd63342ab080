"""The value the model eats: packed blocks with their document borders."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Batch:
    """Blocks of packed documents for one forward of one rank. B blocks of L tokens, T = B * L.

    `labels[b, l]` is the target predicted at position l: the next token of the same document, or
    IGNORE_INDEX at the last token of each document and in padding. `position_ids` restart at 0 with each
    document. `cu_seqlens` are the document borders over the flattened T tokens, padding counted as one
    more document per block, every block start a border.
    """

    input_ids: torch.Tensor  # int64 [B, L]
    labels: torch.Tensor  # int64 [B, L], already shifted
    position_ids: torch.Tensor  # int64 [B, L]
    cu_seqlens: torch.Tensor  # int32 [num_documents + 1], starts at 0, ends at T
    max_seqlen: int
    num_targets: int  # labels that are not IGNORE_INDEX; a Python int, known without a host sync
    tokens_by_source: np.ndarray  # int64 [num_sources]: non-padding tokens of each source in these blocks
    block_ids: tuple[int, ...]  # global stream positions of the B blocks

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""
        if self.input_ids.device == device:
            return self
        return Batch(
            self.input_ids.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.position_ids.to(device, non_blocking=True),
            self.cu_seqlens.to(device, non_blocking=True),
            self.max_seqlen,
            self.num_targets,
            self.tokens_by_source,
            self.block_ids,
        )
