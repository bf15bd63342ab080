"""Attention over blocks whose tokens are cut over several ranks.

Two all-to-alls around it turn a part of the tokens with all heads into all tokens with a part of the heads, and back,
so that every implementation of attention, with document borders, windows and softcap, computes as on one rank.

B batch, L sequence, P ranks that share a block, M = L / P tokens of a part, H heads, K kv heads, h, k those of one
rank, N head dim, W numbers per token.

Source: Jacobs et al. 2023, DeepSpeed Ulysses (arXiv 2309.14509).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from dist_cpt.errors import ConfigError
from dist_cpt.model.recurrence import recurrent_layers
from dist_cpt.plan.exchange import rank_heads

LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


class HeadExchange:
    """The exchange among the ranks of `group`, whose order is that of the parts of a block."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.num_ranks = group.size()

    def to_heads(
        self, query_BHMN: torch.Tensor, key_BKMN: torch.Tensor, value_BKMN: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """From all heads of this rank's tokens to this rank's heads of all tokens: [B, h or k, L, N] each.

        h = ceil(H / P): where the heads do not divide, the last ranks also get heads of zeros, which nobody reads.
        """
        heads, kv_heads = query_BHMN.shape[1], key_BKMN.shape[1]
        copies = rank_heads(heads, kv_heads, self.num_ranks).kv_copies
        if copies > 1:
            key_BKMN, value_BKMN = (x.repeat_interleave(copies, dim=1) for x in (key_BKMN, value_BKMN))
        sent = [self._by_rank(x) for x in (query_BHMN, key_BKMN, value_BKMN)]  # one collective is enough for all
        received_PBMW = _AllToAll.apply(torch.cat(sent, dim=-1), self._group)
        whole_BLW = received_PBMW.transpose(0, 1).flatten(1, 2)
        parts = whole_BLW.split([x.shape[-1] for x in sent], dim=-1)
        dims = (query_BHMN.shape[-1], key_BKMN.shape[-1], value_BKMN.shape[-1])
        query, key, value = (x.unflatten(-1, (-1, dim)).transpose(1, 2) for x, dim in zip(parts, dims, strict=True))
        return query, key, value

    def to_tokens(self, out_BLhN: torch.Tensor, num_heads: int) -> torch.Tensor:
        """Back from this rank's heads of all tokens to all heads of this rank's tokens, [B, M, H, N]."""
        sent_PBMW = out_BLhN.flatten(2).unflatten(1, (self.num_ranks, -1)).transpose(0, 1)
        received_PBMW = _AllToAll.apply(sent_PBMW, self._group)
        heads_BMHN = received_PBMW.permute(1, 2, 0, 3).flatten(2).unflatten(-1, (-1, out_BLhN.shape[-1]))
        return heads_BMHN[:, :, :num_heads]

    def own_heads(self, x_H: torch.Tensor) -> torch.Tensor:
        """Of one number per head those of this rank's heads, [h]."""
        per_rank = -(-len(x_H) // self.num_ranks)
        return F.pad(x_H, (0, per_rank * self.num_ranks - len(x_H)))[self._group.rank() * per_rank :][:per_rank]

    def _by_rank(self, x_BHMN: torch.Tensor) -> torch.Tensor:
        """[P, B, M, h N]: what each rank gets."""
        x_BMHN = x_BHMN.transpose(1, 2)
        missing = -x_BMHN.shape[2] % self.num_ranks
        x_BMHN = F.pad(x_BMHN, (0, 0, 0, missing)) if missing else x_BMHN
        return x_BMHN.unflatten(2, (self.num_ranks, -1)).flatten(3).permute(2, 0, 1, 3)


class _AllToAll(torch.autograd.Function):
    """Rank r's slice p goes to rank p's slice r; its transpose is itself."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        x = x.contiguous()
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _AllToAll.apply(grad_outputs[0], ctx.group), None


def check_context_parallel(hf_config: Any, num_ranks: int) -> None:
    """Refuse a model whose layers need more of a sequence than their attention does.

    Raises:
        ConfigError: recurrent layers, fewer heads than ranks, or a rotation by the longest sequence, of which each rank
            sees a part.
    """
    if num_ranks == 1:
        return
    if recurrent := recurrent_layers(hf_config):
        raise ConfigError(
            f"engine.context_parallel {num_ranks}: {hf_config.model_type} has layers of type {', '.join(recurrent)}, "
            "which carry a state from token to token",
            remedy="use engine.context_parallel: 1",
        )
    heads = hf_config.num_attention_heads
    if heads < num_ranks:
        raise ConfigError(
            f"engine.context_parallel {num_ranks}: each rank needs an attention head, and this model has {heads}",
            remedy=f"use at most {heads}",
        )
    rope = getattr(hf_config, "rope_parameters", None) or {}
    nested = [rope, *(value for value in rope.values() if isinstance(value, Mapping))]
    kinds = {kind for parameters in nested if (kind := parameters.get("rope_type")) in LENGTH_DEPENDENT_ROPE}
    if kinds:
        raise ConfigError(
            f"engine.context_parallel {num_ranks}: the rotation {', '.join(sorted(kinds))} depends on the longest "
            "sequence, of which a rank has a part",
            remedy="use engine.context_parallel: 1, or model.rope_scaling: {rope_type: yarn, ...}",
        )
