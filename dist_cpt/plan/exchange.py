"""What ranks that share a sequence send one another around attention (`engine.context_parallel`).

B batch, L tokens of a whole block, P ranks that share it, H heads, K kv heads, h and k those of one rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class RankHeads:
    """The heads that one of P ranks attends with: all tokens, a part of the heads."""

    heads: int  # h = ceil(H / P)
    kv_heads: int  # k
    kv_copies: int  # how often each kv head is sent, so that every rank has those of its heads

    def numbers_per_token(self, head_dim: int) -> tuple[int, int]:
        """What a rank sends per token of the whole blocks: queries, keys and values in, the result out."""
        return (self.heads + 2 * self.kv_heads) * head_dim, self.heads * head_dim


def rank_heads(heads: int, kv_heads: int, num_ranks: int) -> RankHeads:
    """Once each, if kv heads divide by the ranks. Where heads do not, the last ranks also get heads of zeros."""
    if heads % num_ranks:
        h = -(-heads // num_ranks)
        return RankHeads(h, h, heads // kv_heads)  # the first head of a rank may be anywhere in a group
    copies = num_ranks // math.gcd(kv_heads, num_ranks)
    return RankHeads(heads // num_ranks, kv_heads * copies // num_ranks, copies)
