"""Attention over packed blocks that never crosses document boundaries.

B blocks, L sequence, T = B * L tokens, H heads, K kv heads, N head dim, Q and S blocks of queries and of keys.

Exact implementations, selected by device, dtype and model, never by the data:

documents           one causal call per document, which skips everything outside the diagonal blocks; for CPUs
flash_attention_2   the varlen kernels of the package flash_attn, if installed
varlen              the varlen kernels of torch: bf16 or fp16, no softcap, no sinks
flex                FlexAttention, compiled, with one block mask per batch and window: any dtype, softcap or sinks
mask                a dense mask built once per batch, [B, L, L] booleans: for everything else

A model may cap its scores (Gemma 2), its heads may have a sink (gpt-oss: a learned score of no key in the softmax's
denominator), and some of its layers may have a sliding window.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.utils import is_flash_attn_2_available

from dist_cpt.adapters.language_model import decoder_of
from dist_cpt.errors import ConfigError
from dist_cpt.model.context_parallel import HeadExchange
from dist_cpt.model.recurrence import install_recurrence, recurrent_layers

Choice = Literal["documents", "mask", "flash_attention_2", "varlen", "flex"]
_REGISTERED_NAME = "dist_cpt_packed"
_FLEX_BLOCK = 128  # queries and keys per block of FlexAttention's masks
_SCORES = 2**20  # capped scores in memory at once: 4 MiB in fp32, which fits in a cache
_ROWS = 128  # queries per call with a window, if the window is shorter
# Model types whose attention passes `s_aux`. Source: transformers 5.23
_WITH_SINKS = ("flint", "gpt_oss", "granite_swa", "granitemoe_swa", "hy_v4", "mimo_v2_flash", "openai_privacy_filter")


@dataclass
class Packing:
    """The document boundaries of one batch, in the form that the implementation needs."""

    borders: list[int] | None = None  # offsets into the T flattened tokens, for "documents"
    document_BL: torch.Tensor | None = None  # document index, for "mask" and "flex"
    cu_seqlens: torch.Tensor | None = None  # int32 [documents + 1], for "varlen"
    max_seqlen: int = 0
    flex: bool = False
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)  # [B, 1, L, L] by sliding window
    block_masks: dict[int | None, BlockMask] = field(default_factory=dict)
    exchange: HeadExchange | None = None  # with the ranks that have the other tokens of the blocks

    @cached_property
    def offsets(self) -> list[int]:
        """Where documents begin in the T flattened tokens, and T; for recurrent layers. Host sync, once per batch."""
        if self.borders is not None:
            return self.borders
        if self.cu_seqlens is not None:
            return self.cu_seqlens.tolist()
        assert self.document_BL is not None
        sizes = self.document_BL.flatten().unique_consecutive(return_counts=True)[1]
        return [0, *sizes.cumsum(0).tolist()]

    def mask(self, sliding_window: int | None) -> torch.Tensor:
        """True where a query attends: same document, not later, within the window. Built once per batch."""
        if sliding_window not in self.masks:
            assert self.document_BL is not None
            same_BLL = self.document_BL[:, :, None] == self.document_BL[:, None, :]
            length = same_BLL.shape[-1]
            seen_LL = _seen(0, length, 0, sliding_window, same_BLL.device)
            self.masks[sliding_window] = (same_BLL & seen_LL)[:, None]
        return self.masks[sliding_window]

    def block_mask(self, sliding_window: int | None) -> BlockMask:
        """The same for FlexAttention, without the empty blocks. Built once per batch, without a host sync."""
        if sliding_window not in self.block_masks:
            assert self.document_BL is not None
            self.block_masks[sliding_window] = _block_mask(self.document_BL, sliding_window)
        return self.block_masks[sliding_window]


def choose(
    device: torch.device,
    hf_config: Any = None,
    wanted: str = "auto",
    dtype: torch.dtype = torch.bfloat16,
    context_parallel: int = 1,
) -> Choice:
    """The implementation for a model of `hf_config` on `device` in `dtype`; `wanted` is the recipe's `model.attention`.

    Raises:
        ConfigError: the wanted implementation cannot compute this model here.
    """
    for choice, why_not in _choices(device, hf_config, dtype).items():
        if choice == "flash_attention_2" and context_parallel > 1:  # transformers calls it with one rank's tokens
            continue
        if wanted == choice and why_not is not None:
            raise ConfigError(f"model.attention: {wanted}: {why_not}", remedy="use model.attention: auto")
        if why_not is None and wanted in ("auto", choice):
            return choice
    raise ConfigError(f"model.attention: {wanted} is unknown")


def describe(choice: Choice, device: torch.device, hf_config: Any, dtype: torch.dtype) -> str:
    """The implementation in use, and why each preferable one is not."""
    better = itertools.takewhile(lambda item: item[0] != choice, _choices(device, hf_config, dtype).items())
    return "; ".join([choice, *(f"not {name}: {why_not or 'the recipe asks for another'}" for name, why_not in better)])


def _choices(device: torch.device, hf_config: Any, dtype: torch.dtype) -> dict[Choice, str | None]:
    """All implementations, the best first, each with the reason why it cannot be used, or None."""
    if device.type != "cuda":
        why_not = f"runs on CUDA, not on {device.type}"
        return {"documents": None, "mask": None, "flash_attention_2": why_not, "varlen": why_not, "flex": why_not}
    softcap = getattr(hf_config, "attn_logit_softcapping", None)
    dropout = max(getattr(hf_config, key, None) or 0.0 for key in ("attention_dropout", "attn_pdrop"))
    capped = None if softcap is None else f"has no softcap, this model has {softcap}"
    dropped = f"has no dropout, this model's attention has {dropout}" if dropout else None
    kind = getattr(hf_config, "model_type", None)
    sinks = f"has no attention sinks, which {kind} has" if kind in _WITH_SINKS else None
    flash, narrow = sinks or _flash_missing(), _why_not_flash_kernel(device, _head_dim(hf_config), dtype)
    if flash is None and softcap is not None:
        flash = dropped if _flash_caps() else capped
    if flash is None and recurrent_layers(hf_config):
        flash = "does not say to recurrent layers where documents begin"
    flex = _why_not_flex(_head_dim(hf_config)) or dropped
    return {
        "flash_attention_2": flash or narrow,
        "varlen": _varlen_missing() or narrow or _why_not_padded(_head_dim(hf_config)) or capped or sinks or dropped,
        # without a softcap or sinks, a mask costs only memory and needs no compilation
        **({"mask": None, "flex": flex} if softcap is None and sinks is None else {"flex": flex, "mask": None}),
        "documents": None,
    }


def _head_dim(hf_config: Any) -> int:
    width = getattr(hf_config, "head_dim", None)
    if width is None and hf_config is not None:
        width = hf_config.hidden_size // hf_config.num_attention_heads
    return width or 64


def _why_not_flash_kernel(device: torch.device, head_dim: int, dtype: torch.dtype) -> str | None:
    if dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bf16 or fp16, not in {dtype}"
    if head_dim > 256:
        return f"supports head dimensions up to 256, this model has {head_dim}"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
        return f"needs compute capability 8.0, not {'.'.join(map(str, torch.cuda.get_device_capability(device)))}"
    return None


def _why_not_padded(head_dim: int) -> str | None:
    return f"supports head dimensions that are multiples of 8, this model has {head_dim}" if head_dim % 8 else None


def _why_not_flex(head_dim: int) -> str | None:
    if not importlib.util.find_spec("triton"):
        return "Triton is not installed"
    return f"supports head dimensions from 16, this model has {head_dim}" if head_dim < 16 else None


def _flash_missing() -> str | None:
    return None if is_flash_attn_2_available() else "the package flash_attn is not installed"


def _flash_caps() -> bool:
    """Whether the installed flash_attn supports a softcap (from 2.6)."""
    return "softcap" in _parameters(importlib.import_module("flash_attn").flash_attn_varlen_func)


@cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


@cache
def _varlen_missing() -> str | None:
    """Why torch's varlen attention cannot be used, or None; it was added in 2.10, windows and scales later."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return f"torch {torch.__version__} has no varlen attention"
    missing = {"window_size", "scale"} - _parameters(varlen_attn)
    return f"torch {torch.__version__}'s varlen attention lacks {', '.join(sorted(missing))}" if missing else None


def install(model: Any, choice: Choice) -> None:
    """Make a transformers model use the packed attention `choice`, and its recurrent layers the same documents."""
    AttentionInterface.register(_REGISTERED_NAME, packed_attention)
    decoder = decoder_of(model)
    decoder.set_attn_implementation(choice if choice == "flash_attention_2" else _REGISTERED_NAME)
    install_recurrence(decoder)


def packing_arguments(
    choice: Choice,
    position_ids: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    exchange: HeadExchange | None = None,
) -> dict[str, Any]:
    """Keyword arguments for the backbone, built once per batch and used by every layer.

    With an `exchange`, `position_ids` are this rank's part of the blocks that `cu_seqlens` describe.
    """
    if choice == "flash_attention_2":
        assert exchange is None, "attention of transformers' own sees the tokens of one rank"
        return {
            "cu_seq_lens_q": cu_seqlens,
            "cu_seq_lens_k": cu_seqlens,
            "max_length_q": max_seqlen,
            "max_length_k": max_seqlen,
        }
    if choice == "documents":
        borders = cu_seqlens.tolist()  # host sync on a GPU, once per batch
        return {"packing": Packing(borders=borders, exchange=exchange)}
    if choice == "varlen":
        return {"packing": Packing(cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, exchange=exchange)}
    num_tokens = position_ids.numel() * (1 if exchange is None else exchange.num_ranks)
    token_T = torch.arange(num_tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    document_T = torch.searchsorted(cu_seqlens, token_T, right=True, out_int32=True)
    document_BL = document_T.view(position_ids.shape[0], -1)
    return {"packing": Packing(document_BL=document_BL, flex=choice == "flex", exchange=exchange)}


def packed_attention(
    module: torch.nn.Module,
    query_BHLN: torch.Tensor,
    key_BKLN: torch.Tensor,
    value_BKLN: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packing: Packing,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within documents, [B, L, H, N], with the signature of transformers' attention interface.

    Of `options`, `dropout`, `scaling`, `sliding_window`, `softcap` and `s_aux` (the sinks, [H]) are used.

    Raises:
        ValueError: an attention mask is given, or dropout, a softcap or sinks that the implementation does not support.
    """
    if attention_mask is not None:
        raise ValueError("packed attention takes document boundaries from the packing, not from an attention mask")
    if packing.exchange is None:
        return _attend_whole((query_BHLN, key_BKLN, value_BKLN), packing, options), None
    heads = packing.exchange.to_heads(query_BHLN, key_BKLN, value_BKLN)
    if (sinks_H := options.get("s_aux")) is not None:
        options["s_aux"] = packing.exchange.own_heads(sinks_H)
    return packing.exchange.to_tokens(_attend_whole(heads, packing, options), query_BHLN.shape[1]), None


def _attend_whole(
    heads: tuple[torch.Tensor, torch.Tensor, torch.Tensor], packing: Packing, options: Mapping[str, Any]
) -> torch.Tensor:
    """`packed_attention` of whole blocks."""
    attend = _Attend(**{field.name: options[field.name] for field in fields(_Attend) if field.name in options})
    if attend.dropout and (packing.flex or packing.cu_seqlens is not None):
        name = "flex" if packing.flex else "varlen"
        raise ValueError(f"attention dropout {attend.dropout}: {name} does not support it; use model.attention: mask")
    if packing.cu_seqlens is not None:
        if attend.softcap is not None:
            raise ValueError(f"softcap {attend.softcap}: varlen does not support it; use model.attention: flex")
        if attend.s_aux is not None:
            raise ValueError("attention sinks: varlen does not support them; use model.attention: flex")
        return _varlen(*heads, packing, attend.scaling, attend.sliding_window)
    if packing.flex:
        return _flex(*heads, packing, attend)
    if packing.borders is None:
        return attend(*heads, packing.mask(attend.sliding_window)).transpose(1, 2).contiguous()
    return _by_document(*heads, packing.borders, attend)


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
    # Torch 2.11 shares key heads without this argument.
    has_argument = "enable_gqa" in _parameters(varlen_attn)
    shared: dict[str, Any] = {"enable_gqa": query_BHLN.shape[1] != key_BKLN.shape[1]} if has_argument else {}
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
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),  # without the token itself
        **shared,
    )
    assert isinstance(out_THN, torch.Tensor)
    return out_THN.unflatten(0, (batch, length))


def _flex(
    query_BHLN: torch.Tensor,
    key_BKLN: torch.Tensor,
    value_BKLN: torch.Tensor,
    packing: Packing,
    attend: _Attend,
) -> torch.Tensor:
    sinks_H = attend.s_aux
    out: Any = _compiled_flex()(
        query_BHLN,
        key_BKLN,
        value_BKLN,
        score_mod=None if attend.softcap is None else _cap(attend.softcap),
        block_mask=packing.block_mask(attend.sliding_window),
        scale=attend.scaling,
        enable_gqa=query_BHLN.shape[1] != key_BKLN.shape[1],
        return_aux=None if sinks_H is None else AuxRequest(lse=True),
    )
    if sinks_H is None:
        return out.transpose(1, 2).contiguous()
    out_BHLN, aux = out
    # With S the sum over the keys and s the sink, S / (S + exp(s)) = sigmoid(log S - s).
    kept_BHL = torch.sigmoid(aux.lse - sinks_H.to(aux.lse.dtype)[:, None])
    return (out_BHLN * kept_BHL[..., None]).to(out_BHLN.dtype).transpose(1, 2).contiguous()


@cache
def _compiled_flex() -> Callable[..., torch.Tensor]:
    # One graph per shape, with and without gradients. Beyond the limit, 8 by default, torch would run it uncompiled
    # and materialise all scores; with fullgraph that is an error.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


@cache  # one function per softcap, else it would be compiled for every layer
def _cap(softcap: float) -> Callable[..., torch.Tensor]:
    def capped(score: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


def _block_mask(document_BL: torch.Tensor, sliding_window: int | None) -> BlockMask:
    """Built from the first and last document of each block, as documents are in order: no [L, L] tensor exists."""
    length, device = document_BL.shape[1], document_BL.device
    # A tensor, not a number: numbers are compiled in, and windows differ between layers.
    window = torch.full((), length if sliding_window is None else sliding_window, dtype=torch.int32, device=device)

    def seen(b: torch.Tensor, _h: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (document_BL[b, query] == document_BL[b, key]) & (query >= key) & (query - key < window)

    first = torch.arange(0, length, _FLEX_BLOCK, device=device)
    last = (first + _FLEX_BLOCK - 1).clamp_max(length - 1)
    begin_BQ, end_BQ = document_BL[:, first], document_BL[:, last]
    earlier_QS = first[:, None] > first
    some_BQS = (begin_BQ[:, :, None] == end_BQ[:, None, :]) & earlier_QS & (first[:, None] - last < window)
    some_BQS = some_BQS | torch.eye(len(first), dtype=torch.bool, device=device)  # a token attends to itself
    whole_Q = first + _FLEX_BLOCK <= length
    all_BQS = (end_BQ[:, :, None] == begin_BQ[:, None, :]) & earlier_QS & (last[:, None] - first < window)
    all_BQS = all_BQS & whole_Q[:, None]
    return BlockMask.from_kv_blocks(
        *_listed(some_BQS & ~all_BQS),
        *_listed(all_BQS),
        BLOCK_SIZE=_FLEX_BLOCK,
        mask_mod=seen,
        seq_lengths=(length, length),
    )


def _listed(blocks_BQS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Number [B, 1, Q] and indices [B, 1, Q, S] of the true blocks, true ones first."""
    blocks_B1QS = blocks_BQS[:, None].to(torch.int32)
    order = blocks_B1QS.argsort(dim=-1, descending=True, stable=True)
    return blocks_B1QS.sum(-1, dtype=torch.int32), order.to(torch.int32).contiguous()


@dataclass(frozen=True)
class _Attend:
    """Causal attention of torch within one document or under a mask [B, 1, L, L]."""

    dropout: float = 0.0
    scaling: float | None = None
    sliding_window: int | None = None
    softcap: float | None = None
    s_aux: torch.Tensor | None = None  # sinks [H]

    @property
    def _scored(self) -> bool:
        """Whether the scores are computed here, for what torch's attention lacks."""
        return self.softcap is not None or self.s_aux is not None

    def __call__(
        self,
        query_BHLN: torch.Tensor,
        key_BKLN: torch.Tensor,
        value_BKLN: torch.Tensor,
        mask_B1LL: torch.Tensor | None = None,
    ) -> torch.Tensor:
        length, window = query_BHLN.shape[2], self.sliding_window
        if not self._scored and mask_B1LL is not None:
            return self._plain(query_BHLN, key_BKLN, value_BKLN, mask_B1LL)
        if not self._scored and (window is None or length <= window):
            return self._plain(query_BHLN, key_BKLN, value_BKLN, None)
        outs = []
        rows = self._rows(query_BHLN)
        for start in range(0, length, rows):
            stop = min(start + rows, length)
            first = 0 if window is None else max(0, start - window + 1)
            part = query_BHLN[:, :, start:stop], key_BKLN[:, :, first:stop], value_BKLN[:, :, first:stop]
            if not self._scored:
                outs.append(self._plain(*part, _seen(start, stop, first, window, query_BHLN.device)))
            else:
                seen = None if mask_B1LL is None else mask_B1LL[:, :, start:stop, first:stop]
                outs.append(self._recomputed(*part, seen, start, first))
        return torch.cat(outs, dim=2)

    def _rows(self, query_BHLN: torch.Tensor) -> int:
        batch, heads, length, _ = query_BHLN.shape
        if self._scored:
            return max(16, _SCORES // (batch * heads * length))
        assert self.sliding_window is not None
        return max(self.sliding_window, _ROWS)

    def _plain(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        groups = query.shape[1] // key.shape[1]
        if groups > 1 and not query.is_cpu:  # CUDA kernels with a mask or fp32 do not share key heads
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=self.dropout,
            scale=self.scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )

    def _recomputed(self, *part: Any) -> Any:
        """Recompute scores in the backward pass; saved, they would be H L^2 fp32 numbers per layer."""
        return checkpoint(self._by_scores, *part, use_reentrant=False, preserve_rng_state=self.dropout > 0.0)

    def _by_scores(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        seen: torch.Tensor | None,
        start: int,
        first: int,
    ) -> torch.Tensor:
        """Scores in fp32, rounded once at the end; the queries of a group are stacked for their key head."""
        batch, heads, rows, head_dim = query.shape
        kv_heads, keys = key.shape[1], key.shape[2]
        exact = torch.promote_types(query.dtype, torch.float32)
        scale = head_dim**-0.5 if self.scaling is None else self.scaling
        grouped = query.to(exact).reshape(batch, kv_heads, -1, head_dim)
        scores = grouped @ key.to(exact).transpose(-1, -2) * scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if seen is None:
            seen = _seen(start, start + rows, first, self.sliding_window, query.device)
        scores = scores.view(batch, heads, rows, keys).masked_fill(~seen, float("-inf"))
        if self.s_aux is not None:
            scores = torch.cat([scores, self.s_aux.to(exact).view(1, -1, 1, 1).expand(batch, -1, rows, 1)], dim=-1)
        weights = F.dropout(scores.softmax(-1)[..., :keys], self.dropout).reshape(batch, kv_heads, -1, keys)
        return (weights @ value.to(exact)).view(batch, heads, rows, head_dim).to(query.dtype)


def _by_document(
    query_BHLN: torch.Tensor, key_BKLN: torch.Tensor, value_BKLN: torch.Tensor, borders: list[int], attend: _Attend
) -> torch.Tensor:
    batch, heads, length, _ = query_BHLN.shape  # values may have another head dim
    if borders == list(range(0, batch * length + 1, length)):  # each block is one document
        return attend(query_BHLN, key_BKLN, value_BKLN).transpose(1, 2).contiguous()
    sizes = [stop - start for start, stop in itertools.pairwise(borders)]

    def documents(x_BHLN: torch.Tensor) -> list[torch.Tensor]:  # each [1, heads, tokens of the document, N]
        x_THN = x_BHLN.transpose(1, 2).flatten(0, 1)
        return [x.transpose(0, 1)[None] for x in x_THN.split(sizes)]

    outs_THN = [
        attend(query, key, value)[0].transpose(0, 1)
        for query, key, value in zip(*map(documents, (query_BHLN, key_BKLN, value_BKLN)), strict=True)
    ]
    return torch.cat(outs_THN).view(batch, length, heads, value_BKLN.shape[-1])


def _seen(start: int, stop: int, first: int, sliding_window: int | None, device: torch.device) -> torch.Tensor:
    """Which keys from `first` to `stop` the queries from `start` to `stop` attend to, within one document."""
    query, key = torch.arange(start, stop, device=device)[:, None], torch.arange(first, stop, device=device)
    causal = query >= key
    return causal if sliding_window is None else causal & (query - key < sliding_window)
