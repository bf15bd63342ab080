"""Attention over packed blocks that never crosses a document border.

B blocks, L sequence, T = B * L tokens, H heads, K kv heads, N head dim.

Three exact ways, chosen by the device, never by the data: on the CPU one causal call per document
("documents"), which skips everything outside the diagonal blocks; on CUDA the varlen kernels of flash_attn
where that package is installed ("flash_attention_2"), else a block-diagonal mask made once per batch
("mask").
"""

from __future__ import annotations

import importlib.util
import itertools
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

Choice = Literal["documents", "mask", "flash_attention_2"]
_REGISTERED_NAME = "dist_cpt_packed"


@dataclass
class Packing:
    """Where documents begin and end in one batch, in the form that this device's attention needs."""

    borders: list[int] | None = None  # of the T flattened tokens, for "documents"
    document_BL: torch.Tensor | None = None  # running document number, for "mask"
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)  # [B, 1, L, L] by sliding window

    def mask(self, sliding_window: int | None) -> torch.Tensor:
        """True where a query may look: same document, not later, at most the window back. Built once."""
        if sliding_window not in self.masks:
            assert self.document_BL is not None
            same_BLL = self.document_BL[:, :, None] == self.document_BL[:, None, :]
            seen_LL = _causal(same_BLL.shape[-1], sliding_window, same_BLL.device)
            self.masks[sliding_window] = (same_BLL & seen_LL)[:, None]
        return self.masks[sliding_window]


def choose(device: torch.device) -> Choice:
    """The way this device computes packed attention."""
    if device.type != "cuda":
        return "documents"
    return "flash_attention_2" if importlib.util.find_spec("flash_attn") else "mask"


def install(model: Any, choice: Choice) -> None:
    """Make a transformers model use the packed attention."""
    AttentionInterface.register(_REGISTERED_NAME, packed_attention)
    model.set_attn_implementation(choice if choice == "flash_attention_2" else _REGISTERED_NAME)


def packing_arguments(
    choice: Choice, position_ids: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
) -> dict[str, Any]:
    """Keyword arguments for the backbone; made once per batch, used by every layer."""
    if choice == "flash_attention_2":
        return {
            "cu_seq_lens_q": cu_seqlens,
            "cu_seq_lens_k": cu_seqlens,
            "max_length_q": max_seqlen,
            "max_length_k": max_seqlen,
        }
    if choice == "documents":
        return {"packing": Packing(borders=cu_seqlens.tolist())}
    return {"packing": Packing(document_BL=(position_ids == 0).cumsum(1))}


def packed_attention(
    module: torch.nn.Module,
    query_BHLN: torch.Tensor,
    key_BKLN: torch.Tensor,
    value_BKLN: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packing: Packing,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within documents, [B, L, H, N]; the signature is that of transformers' interface.

    Raises:
        ValueError: a mask came besides the packing.
    """
    if attention_mask is not None:
        raise ValueError("packed attention takes its borders from the packing, not from an attention mask")
    groups = query_BHLN.shape[1] // key_BKLN.shape[1]
    if groups > 1:
        key_BKLN, value_BKLN = (x.repeat_interleave(groups, dim=1) for x in (key_BKLN, value_BKLN))
    if packing.borders is None:
        mask_B1LL = packing.mask(sliding_window)
        out_BHLN = F.scaled_dot_product_attention(
            query_BHLN, key_BKLN, value_BKLN, attn_mask=mask_B1LL, dropout_p=dropout, scale=scaling
        )
        return out_BHLN.transpose(1, 2).contiguous(), None
    return _by_document(query_BHLN, key_BKLN, value_BKLN, packing.borders, dropout, scaling, sliding_window), None


def _by_document(
    query_BHLN: torch.Tensor,
    key_BHLN: torch.Tensor,
    value_BHLN: torch.Tensor,
    borders: list[int],
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    batch, heads, length, head_dim = query_BHLN.shape
    if borders == list(range(0, batch * length + 1, length)):  # every block is one document
        out_BHLN = _causal_attention(query_BHLN, key_BHLN, value_BHLN, dropout, scaling, sliding_window)
        return out_BHLN.transpose(1, 2).contiguous()
    sizes = [stop - start for start, stop in itertools.pairwise(borders)]

    def documents(x_BHLN: torch.Tensor) -> list[torch.Tensor]:  # each [1, H, tokens of the document, N]
        x_THN = x_BHLN.transpose(1, 2).reshape(batch * length, heads, head_dim)
        return [x.transpose(0, 1)[None] for x in x_THN.split(sizes)]

    outs_THN = [
        _causal_attention(query, key, value, dropout, scaling, sliding_window)[0].transpose(0, 1)
        for query, key, value in zip(*map(documents, (query_BHLN, key_BHLN, value_BHLN)), strict=True)
    ]
    return torch.cat(outs_THN).view(batch, length, heads, head_dim)


def _causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    length = query.shape[2]
    if sliding_window is not None and length > sliding_window:
        seen_LL = _causal(length, sliding_window, query.device)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=seen_LL, dropout_p=dropout, scale=scaling)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=dropout, scale=scaling)


def _causal(length: int, sliding_window: int | None, device: torch.device) -> torch.Tensor:
    seen_LL = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return seen_LL if sliding_window is None else seen_LL.triu(1 - sliding_window)
