"""Attention of the costliest rank over the mean, in stream order and shared out by cost. Counts, no times.

Documents have log-normal lengths: `web` is about what crawled text has (median 450 tokens, mean 925, 1 in 1,000 above
18,000), `books` a tenth of the tokens from texts of 100,000 on the mean beside it.

    python benchmarks/balance.py
"""

from __future__ import annotations

import numpy as np

from dist_cpt.data.order import FeistelOrder
from dist_cpt.data.packing import document_lengths, pack
from dist_cpt.train.divide import attended, divide, max_over_mean

TOKENS = 200_000_000
STEPS = 20
CASES = (  # seq_len, ranks, micro_batch, accumulation
    (4096, 8, 4, 4),
    (8192, 8, 1, 8),
    (8192, 64, 1, 2),
    (32768, 8, 1, 4),
    (131072, 8, 1, 2),
)


def documents(kind: str) -> np.ndarray:
    """Lengths in tokens, int64."""
    rng = np.random.default_rng(0)
    web = np.exp(rng.normal(np.log(450), 1.2, TOKENS // 925)).astype(np.int64) + 1
    if kind == "web":
        return web
    books = np.exp(rng.normal(np.log(85_000), 0.6, TOKENS // 10 // 100_000)).astype(np.int64)
    return np.concatenate([web, books])


def main() -> None:
    print("| documents | block | ranks | micro-batch x accumulation | in stream order | shared out |")
    print("|---|---|---|---|---|---|")
    for kind in ("web", "books"):
        lengths = documents(kind)
        for seq_len, ranks, micro_batch, accumulation in CASES:
            plan = pack(lengths, seq_len)
            order = FeistelOrder(plan.num_blocks, 0, kind)
            size = ranks * micro_batch * accumulation
            before, after = [], []
            for first in range(0, min(STEPS, plan.num_blocks // size) * size, size):
                blocks = [document_lengths(plan, int(order(first + n))) for n in range(size)]
                costs = [attended(block, {None: 1}) for block in blocks]
                before.append(max_over_mean(costs, divide([0] * size, ranks, micro_batch)))
                after.append(max_over_mean(costs, divide(costs, ranks, micro_batch)))
            print(
                f"| {kind} | {seq_len:,} | {ranks} | {micro_batch} x {accumulation} "
                f"| {np.mean(before):.2f} | {np.mean(after):.2f} |"
            )


if __name__ == "__main__":
    main()
