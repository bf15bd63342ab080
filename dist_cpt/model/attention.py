"""Attention over packed blocks that never crosses a document border.

B blocks, L sequence, T = B * L tokens, H heads, K kv heads, N head dim.

Exact ways, chosen by device, dtype and model, never by the data:

documents           one causal call per document, which skips everything outside the diagonal blocks; the CPU's way
flash_attention_2   the varlen kernels of the package flash_attn, where it is installed
varlen              the varlen kernels inside torch: bf16 or fp16, no cap on the scores
flex                FlexAttention, compiled, with one block mask per batch and window: any dtype, caps too
mask                a dense mask made once per batch: [B, L, L] booleans, for everything else

A model may cap its scores (Gemma 2) and look back a window only, in some of its layers.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from dist_cpt.errors import ConfigError

Choice = Literal["documents", "mask", "flash_attention_2", "varlen", "flex"]
_REGISTERED_NAME = "dist_cpt_packed"
_QUERY_CHUNK = 512  # queries whose capped scores exist at one time
_WIDEST_HEAD = 256  # of flash kernels


@dataclass
class Packing:
    """Where documents begin and end in one batch, in the form that this way of attention needs."""

    borders: list[int] | None = None  # of the T flattened tokens, for "documents"
    document_BL: torch.Tensor | None = None  # running document number, for "mask" and "flex"
    cu_seqlens: torch.Tensor | None = None  # int32 [documents + 1], for "varlen"
    max_seqlen: int = 0
    flex: bool = False
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)  # [B, 1, L, L] by sliding window
    block_masks: dict[int | None, BlockMask] = field(default_factory=dict)

    def mask(self, sliding_window: int | None) -> torch.Tensor:
        """True where a query may look: same document, not later, at most the window back. Built once."""
        if sliding_window not in self.masks:
            assert self.document_BL is not None
            same_BLL = self.document_BL[:, :, None] == self.document_BL[:, None, :]
            seen_LL = _causal(same_BLL.shape[-1], sliding_window, same_BLL.device)
            self.masks[sliding_window] = (same_BLL & seen_LL)[:, None]
        return self.masks[sliding_window]

    def block_mask(self, sliding_window: int | None) -> BlockMask:
        """The same for FlexAttention, with the blocks that hold nothing left out. Built once."""
        if sliding_window not in self.block_masks:
            assert self.document_BL is not None
            document_BL = self.document_BL
            batch, length = document_BL.shape

            def seen(b: torch.Tensor, _h: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
                inside = (document_BL[b, query] == document_BL[b, key]) & (query >= key)
                return inside if sliding_window is None else inside & (query - key < sliding_window)

            self.block_masks[sliding_window] = create_block_mask(
                seen, batch, None, length, length, device=document_BL.device
            )
        return self.block_masks[sliding_window]


def choose(
    device: torch.device, hf_config: Any = None, wanted: str = "auto", dtype: torch.dtype = torch.bfloat16
) -> Choice:
    """The way a model of `hf_config` attends on `device` in `dtype`, as `model.attention` wants it.

    Raises:
        ConfigError: the wanted way cannot compute this model here.
    """
    for way, why_not in _ways(device, hf_config, dtype).items():
        if wanted == way and why_not is not None:
            raise ConfigError(f"model.attention: {wanted}: {why_not}", remedy="use model.attention: auto")
        if why_not is None and wanted in ("auto", way):
            return way
    raise ConfigError(f"model.attention: {wanted} is unknown")


def _ways(device: torch.device, hf_config: Any, dtype: torch.dtype) -> dict[Choice, str | None]:
    """Every way, the best first, and what is against it."""
    if device.type != "cuda":
        why_not = f"runs on CUDA, not on {device.type}"
        return {"documents": None, "mask": None, "flash_attention_2": why_not, "varlen": why_not, "flex": why_not}
    softcap = getattr(hf_config, "attn_logit_softcapping", None)
    width = _head_dim(hf_config)
    narrow = None if dtype in (torch.bfloat16, torch.float16) else f"computes in bf16 or fp16, not in {dtype}"
    if narrow is None and width > _WIDEST_HEAD:
        narrow = f"takes heads up to {_WIDEST_HEAD} wide, this model's have {width}"
    flash = None if importlib.util.find_spec("flash_attn") else "the package flash_attn is not installed"
    capped = None if softcap is None else f"cannot cap scores, this model caps them at {softcap}"
    return {
        "flash_attention_2": flash or narrow,
        "varlen": _varlen_missing() or narrow or capped,
        "flex": None,
        "mask": None,
        "documents": None,
    }


def _head_dim(hf_config: Any) -> int:
    width = getattr(hf_config, "head_dim", None)
    if width is None and hf_config is not None:
        width = hf_config.hidden_size // hf_config.num_attention_heads
    return width or 0


@cache
def _varlen_missing() -> str | None:
    """Why torch's varlen attention cannot be used, if so; it came in 2.10, windows and shared heads later."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return f"torch {torch.__version__} has no varlen attention"
    missing = {"window_size", "enable_gqa", "scale"} - set(inspect.signature(varlen_attn).parameters)
    return f"torch {torch.__version__}'s varlen attention lacks {', '.join(sorted(missing))}" if missing else None


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
        return {"packing": Packing(borders=cu_seqlens.tolist())}  # host sync on a GPU, once per batch
    if choice == "varlen":
        return {"packing": Packing(cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)}
    return {"packing": Packing(document_BL=(position_ids == 0).cumsum(1), flex=choice == "flex")}


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
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within documents, [B, L, H, N]; the signature is that of transformers' interface.

    Raises:
        ValueError: a mask came besides the packing, or dropout where the way has none.
    """
    if attention_mask is not None:
        raise ValueError("packed attention takes its borders from the packing, not from an attention mask")
    if dropout and (packing.flex or packing.cu_seqlens is not None or softcap is not None):
        raise ValueError(f"attention dropout {dropout}: this way has none; use model.attention: mask")
    if packing.cu_seqlens is not None:
        return _varlen(query_BHLN, key_BKLN, value_BKLN, packing, scaling, sliding_window), None
    if packing.flex:
        return _flex(query_BHLN, key_BKLN, value_BKLN, packing, scaling, sliding_window, softcap), None
    groups = query_BHLN.shape[1] // key_BKLN.shape[1]
    if groups > 1:
        key_BKLN, value_BKLN = (x.repeat_interleave(groups, dim=1) for x in (key_BKLN, value_BKLN))
    if packing.borders is None:
        mask_B1LL = packing.mask(sliding_window)
        out_BHLN = _masked(query_BHLN, key_BKLN, value_BKLN, mask_B1LL, dropout, scaling, softcap)
        return out_BHLN.transpose(1, 2).contiguous(), None
    attend = _Attend(dropout, scaling, sliding_window, softcap)
    return _by_document(query_BHLN, key_BKLN, value_BKLN, packing.borders, attend), None


def _varlen(
    query_BHLN: torch.Tensor,
    key_BKLN: torch.Tensor,
    value_BKLN: torch.Tensor,
    packing: Packing,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    batch, _, length, _ = query_BHLN.shape
    borders = packing.cu_seqlens
    assert borders is not None
    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query_BHLN, key_BKLN, value_BKLN))
    out_THN = varlen_attn(
        query,
        key,
        value,
        borders,
        borders,
        packing.max_seqlen,
        packing.max_seqlen,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),  # a token sees itself besides
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out_THN, torch.Tensor)
    return out_THN.unflatten(0, (batch, length))


def _flex(
    query_BHLN: torch.Tensor,
    key_BKLN: torch.Tensor,
    value_BKLN: torch.Tensor,
    packing: Packing,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    run = _compiled_flex() if query_BHLN.is_cuda else flex_attention  # tests: on a CPU it has no compiled backward
    out_BHLN = run(
        query_BHLN,
        key_BKLN,
        value_BKLN,
        score_mod=None if softcap is None else _cap(softcap),
        block_mask=packing.block_mask(sliding_window),
        scale=scaling,
        enable_gqa=query_BHLN.shape[1] != key_BKLN.shape[1],
    )
    assert isinstance(out_BHLN, torch.Tensor)
    return out_BHLN.transpose(1, 2).contiguous()


@cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)


@cache  # the same function for the same cap, else it would be compiled for every layer
def _cap(softcap: float) -> Callable[..., torch.Tensor]:
    def capped(score: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


@dataclass(frozen=True)
class _Attend:
    """Causal attention inside one document."""

    dropout: float
    scaling: float | None
    sliding_window: int | None
    softcap: float | None

    def __call__(self, query_BHLN: torch.Tensor, key_BHLN: torch.Tensor, value_BHLN: torch.Tensor) -> torch.Tensor:
        length, window = query_BHLN.shape[2], self.sliding_window
        if self.softcap is None and (window is None or length <= window):
            return F.scaled_dot_product_attention(
                query_BHLN, key_BHLN, value_BHLN, is_causal=True, dropout_p=self.dropout, scale=self.scaling
            )
        seen_LL = _causal(length, window, query_BHLN.device)
        return _masked(query_BHLN, key_BHLN, value_BHLN, seen_LL, self.dropout, self.scaling, self.softcap)


def _masked(
    query_BHLN: torch.Tensor,
    key_BHLN: torch.Tensor,
    value_BHLN: torch.Tensor,
    mask: torch.Tensor,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
) -> torch.Tensor:
    if softcap is None:
        return F.scaled_dot_product_attention(
            query_BHLN, key_BHLN, value_BHLN, attn_mask=mask, dropout_p=dropout, scale=scaling
        )
    scale = query_BHLN.shape[-1] ** -0.5 if scaling is None else scaling
    outs = []
    for start in range(0, query_BHLN.shape[2], _QUERY_CHUNK):
        rows = slice(start, start + _QUERY_CHUNK)
        # Scores are formed again in the backward pass: kept, they would be H L^2 fp32 numbers in every layer.
        outs.append(
            checkpoint(
                _capped_attention,
                query_BHLN[:, :, rows],
                key_BHLN,
                value_BHLN,
                mask[..., rows, :],
                scale,
                softcap,
                use_reentrant=False,
            )
        )
    return torch.cat(outs, dim=2)


def _capped_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float, softcap: float
) -> torch.Tensor:
    scores = query.float() @ key.float().transpose(-1, -2) * scale
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ value.float()).to(value.dtype)


def _by_document(
    query_BHLN: torch.Tensor, key_BHLN: torch.Tensor, value_BHLN: torch.Tensor, borders: list[int], attend: _Attend
) -> torch.Tensor:
    batch, heads, length, head_dim = query_BHLN.shape
    if borders == list(range(0, batch * length + 1, length)):  # every block is one document
        return attend(query_BHLN, key_BHLN, value_BHLN).transpose(1, 2).contiguous()
    sizes = [stop - start for start, stop in itertools.pairwise(borders)]

    def documents(x_BHLN: torch.Tensor) -> list[torch.Tensor]:  # each [1, H, tokens of the document, N]
        x_THN = x_BHLN.transpose(1, 2).reshape(batch * length, heads, head_dim)
        return [x.transpose(0, 1)[None] for x in x_THN.split(sizes)]

    outs_THN = [
        attend(query, key, value)[0].transpose(0, 1)
        for query, key, value in zip(*map(documents, (query_BHLN, key_BHLN, value_BHLN)), strict=True)
    ]
    return torch.cat(outs_THN).view(batch, length, heads, head_dim)


def _causal(length: int, sliding_window: int | None, device: torch.device) -> torch.Tensor:
    seen_LL = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return seen_LL if sliding_window is None else seen_LL.triu(1 - sliding_window)
