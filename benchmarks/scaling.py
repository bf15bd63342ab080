"""Weak and strong scaling from 8 to 4,096 GPUs, with failures and checkpoints: by the model of a step, not measured.

python benchmarks/scaling.py [--write]      print the tables, or write them into docs/scale.md
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator
from pathlib import Path

from dist_cpt.config.load import build
from dist_cpt.plan.devices import machine_of
from dist_cpt.plan.plan import Way, make_plan

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scale.md"
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
# Shapes, what trains, how the base is stored, and the bytes of masters and moments.
MODELS = {
    "8B, all parameters": (LLAMA_8B, {"kind": "none"}, "bf16", 96e9),
    "70B, all parameters": (LLAMA_70B, {"kind": "none"}, "bf16", 840e9),
    "70B, LoRA 64 on NF4": (LLAMA_70B, {"rank": 64}, "nf4", 9.9e9),
}
GPUS = (8, 64, 512, 1024, 4096)
SEQ_LEN = 4096
WEAK_TOKENS = 8 * SEQ_LEN  # of a step, for each GPU
STRONG_TOKENS = GPUS[-1] * SEQ_LEN  # of a step: one sequence for each of the most GPUs
GPU_HOURS_PER_FAILURE = 50_000  # 419 interruptions of 16,384 GPUs in 54 days. Source: arXiv 2407.21783, section 3.3.4
RESTART_SECONDS = 300.0  # assumed: noticed, requeued, loaded; the restore is added
HOST_COPY = 20e9  # assumed: bytes/s of a rank's state into host memory, for which training waits
DISK, STREAMS, NODE = 100e9, 4e9, 10e9  # bytes/s of the file system, a rank and a node, as in docs/scale.md


def best_way(name: str, gpus: int, step_tokens: int) -> Way | None:
    """The fastest way for a model of the table; None: it does not fit."""
    model, adapter, weights, _ = MODELS[name]
    config = build(
        {
            "name": "scaling",
            "model": {"path": "llama", "weights": weights},
            "adapter": adapter,
            "data": {"seq_len": SEQ_LEN, "sources": [{"path": "text"}]},
            "batch": {"global_tokens": step_tokens},
            "train": {"tokens": step_tokens},
        },
        "scaling",
    )
    ways = make_plan(config, model, machine_of("h100", gpus // 8, 8, "50GBps")).ways
    return next((way for way in ways if way.weights == weights), None)


def endurance(gpus: int, state_bytes: float) -> tuple[float, float, float, float]:
    """(hours between failures, seconds of a save, minutes between checkpoints, goodput) of a long run.

    Source: the interval is Young's, sqrt(2 x stall x time between failures) (1974), to which Daly's (2006) is equal
    where the stall is small; it is no shorter than a save takes.
    """
    between = GPU_HOURS_PER_FAILURE / gpus * 3600
    stall = state_bytes / gpus / HOST_COPY + 0.5
    disk = state_bytes / min(gpus * STREAMS, gpus / 8 * NODE, DISK)
    save, restart = 2 * disk, RESTART_SECONDS + 2 * disk
    interval = max(math.sqrt(2 * stall * between), save)
    lost = stall / interval + (interval / 2 + save + restart) / between  # work since the newest finished save
    return between / 3600, save, interval / 60, max(0.0, 1 - lost)


def rows(name: str, *, weak: bool) -> Iterator[str]:
    """One row for each number of GPUs."""
    state_bytes, first = MODELS[name][-1], None
    for gpus in GPUS:
        tokens = WEAK_TOKENS * gpus if weak else STRONG_TOKENS
        way = best_way(name, gpus, tokens)
        if way is None:
            yield f"| {name} | {gpus:,} | does not fit | | | | | | |"
            continue
        each = way.tokens_per_second / gpus
        first = each if first is None else first
        hours, save, interval, goodput = endurance(gpus, state_bytes)
        yield (
            f"| {name} | {gpus:,} | {way.engine}, {way.micro_batch} x {way.accumulation}, {way.checkpointing}"
            f"{', reduced once' if way.reduce == 'step' else ''}"
            f"{'' if way.offload == 'none' else f', {way.offload} on the host'} "
            f"| {way.tokens_per_second:,.0f} | {each / first:.0%} | {way.mfu:.0%} | {hours:,.1f} h "
            f"| {interval:.1f} min ({save:.1f} s) | {goodput:.1%} |"
        )


def tables() -> Iterator[str]:
    head = (
        "| model | GPUs | the fastest way: micro-batch, recomputed | tokens/s | efficiency | MFU | a failure every "
        "| a checkpoint every (save) | goodput |"
    )
    for title, weak in (("Weak", True), ("Strong", False)):
        size = f"{WEAK_TOKENS:,} tokens a step for each GPU" if weak else f"{STRONG_TOKENS:,} tokens a step in all"
        yield f"{title} scaling, {size}:\n"
        yield head
        yield "|---|---|---|---|---|---|---|---|---|"
        for name in MODELS:
            yield from rows(name, weak=weak)
        yield ""


def page_with_tables(text: str) -> str:
    """`text` with the tables between its two marks."""
    begin, end = "<!-- scaling: benchmarks/scaling.py --write -->\n", "<!-- end -->"
    body = "\n".join(tables())
    return re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: begin + body + end, text, flags=re.DOTALL)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help="into docs/scale.md")
    if parser.parse_args().write:
        PAGE.write_text(page_with_tables(PAGE.read_text()))
    else:
        print(*tables(), sep="\n")
