"""The model of a step as tables: nothing is measured, no GPU and no torch is needed.

Llama-3.1-8B by part on an H100 and an H200; each recipe of recipes/ on its GPUs; and what others have published beside
what the model says of the same setting. `--write` puts the tables into docs/performance.md, and figures into the
headers of the recipes.

    python benchmarks/roofline.py [--json | --write]
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dist_cpt.config.load import build, load_recipe
from dist_cpt.config.schema import RunConfig
from dist_cpt.plan.devices import DEVICES, machine_of
from dist_cpt.plan.memory import Placement, RankStep, peak_memory, state_bytes
from dist_cpt.plan.plan import Way, make_plan
from dist_cpt.plan.recomputation import POLICIES, Policy, again, host_bytes, kept_bytes
from dist_cpt.plan.shapes import shapes_of
from dist_cpt.plan.step_model import StepTime, step_time, token_work
from dist_cpt.plan.tensors import training_of

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
GPUS = ("h100", "h200")
NETWORK = "50GBps"


def llama(hidden: int, ffn: int, layers: int, heads: int, key_heads: int, vocab: int) -> dict[str, Any]:
    """The config.json of a Llama."""
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": vocab,
    }


LLAMA_8B = llama(4096, 14336, 32, 32, 8, 128256)
LLAMA_70B = llama(8192, 28672, 80, 64, 8, 128256)
GEMMA2_9B = llama(3584, 14336, 42, 16, 8, 256000) | {
    "model_type": "gemma2",
    "head_dim": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
QWEN25_7B = llama(3584, 18944, 28, 28, 4, 152064) | {"model_type": "qwen2"}
# by the beginning of a recipe's file name: the hub has their config.json, and this needs no network
MODELS = {"llama3-8b": LLAMA_8B, "gemma2-9b": GEMMA2_9B, "gpt2-124m": {"model_type": "gpt2"}}


@dataclass(frozen=True)
class Published:
    """A figure of others, and the setting in which the model predicts it."""

    who: str
    tokens_per_second: int  # of one GPU
    gpu: str
    model: Mapping[str, Any]
    placement: Placement
    step: RankStep
    rank: int | None  # None: every parameter trains
    differs: str


ONE, EIGHT = Placement("single", 1, 1, 1), Placement("fsdp-full", 8, 8, 8)
# Source: NVIDIA NeMo AutoModel, performance summary; KempnerForge, README; torchtitan, benchmarks of December 2024
PUBLISHED = (
    Published("AutoModel, Llama-3-8B LoRA", 12_473, "h100", LLAMA_8B, ONE, RankStep(4096, 1, 32), 16, ""),
    Published("AutoModel, Qwen2.5-7B LoRA", 14_110, "h100", QWEN25_7B, ONE, RankStep(4096, 1, 32), 16, ""),
    Published(
        *("KempnerForge, 7B full", 10_471, "h200", llama(4096, 11008, 32, 32, 32, 32000), ONE),
        *(RankStep(4096, 1, 16, "full"), None, "its exact shapes are not stated: Llama-2-7B"),
    ),
    Published(
        *("torchtitan, Llama-3.1-8B full, 8 GPUs", 6_667, "h100", LLAMA_8B, EIGHT, RankStep(8192, 1, 1), None),
        "recomputes in part; torch.compile in place of fused kernels",
    ),
    Published(
        *("AutoModel, Llama-3-70B LoRA, 8 GPUs", 1_092, "h100", LLAMA_70B, EIGHT, RankStep(4096, 1, 4, "full"), 16),
        "tensor parallel over 2",
    ),
    Published(
        *("AutoModel, Llama-3-70B full, 64 GPUs", 867, "h100", LLAMA_70B, Placement("fsdp-full", 64, 64, 8)),
        *(RankStep(8192, 1, 1, "full"), None, "tensor and pipeline parallel"),
    ),
)


def recipe_of(model: str, rank: int | None, weights: str = "bf16", **sections: Any) -> RunConfig:
    """A recipe for `training_of`: its data and length are not read."""
    values = {
        "name": "roofline",
        "model": {"path": model, "weights": weights},
        "adapter": {"rank": rank} if rank else {"kind": "none"},
        "data": {"seq_len": 4096, "sources": [{"path": "text"}]},
        "batch": {"global_tokens": 65536},
        "train": {"tokens": 65536},
    }
    return build(values | sections, "roofline")


def by_part(accumulation: int = 8) -> dict[str, dict[str, StepTime]]:
    """Seconds of a step of 65,536 tokens of Llama-3.1-8B on one GPU: by case and GPU."""
    both = {"embeddings": {"train": ["embed_tokens", "lm_head"]}}
    shapes = shapes_of(LLAMA_8B)
    cases: dict[str, tuple[RunConfig, Policy]] = {
        "LoRA r=64": (recipe_of("llama", 64), "none"),
        "selective": (recipe_of("llama", 64), "selective"),
        "full": (recipe_of("llama", 64), "full"),
        "NF4": (recipe_of("llama", 64, "nf4"), "none"),
        "fp8": (recipe_of("llama", 64, "fp8"), "none"),
        "+ embeddings, head": (recipe_of("llama", 64, **both), "none"),
    }
    return {
        case: {
            gpu: step_time(
                training_of(config, shapes), ONE, DEVICES[gpu], 50e9, RankStep(4096, 2, accumulation, recompute)
            )
            for gpu in GPUS
        }
        for case, (config, recompute) in cases.items()
    }


@cache
def recipes() -> list[tuple[str, int, dict[str, tuple[Way | None, Way | None]]]]:
    """(recipe, GPUs of its header, by GPU: its own way and the fastest that keeps its weights)."""
    rows = []
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        config = load_recipe(path)
        stated = re.search(r"--procs-per-node (\d+)", path.read_text())
        assert stated is not None
        gpus = int(stated[1])
        named = [model for name, model in MODELS.items() if path.stem.startswith(name)]
        values = config.model.config or named[0]
        plans = {gpu: make_plan(config, values, machine_of(gpu, 1, gpus, NETWORK)) for gpu in GPUS}
        rows.append((path.stem, gpus, {gpu: (plan.own, _fastest(plan.ways, config)) for gpu, plan in plans.items()}))
    return rows


def _fastest(ways: tuple[Way, ...], config: RunConfig) -> Way | None:
    return next((way for way in ways if way.weights == config.model.weights), None)


def published() -> Iterator[tuple[Published, float]]:
    """(what others state, tokens/s of one GPU by the model)."""
    for row in PUBLISHED:
        training = training_of(recipe_of("model", row.rank), shapes_of(row.model))
        seconds = step_time(training, row.placement, DEVICES[row.gpu], 50e9, row.step).total
        yield row, row.step.micro_batch_tokens * row.step.accumulation / seconds


def tables() -> Iterator[tuple[str, list[str]]]:
    """(name, lines of a Markdown table)."""
    yield "step", list(_step_table())
    yield "policies", list(_policy_table())
    yield "recipes", list(_recipe_table())
    yield "published", list(_published_table())


def _step_table() -> Iterator[str]:
    cases = by_part()
    columns = [(case, gpu) for case in cases for gpu in GPUS]
    yield "| us per token | " + " | ".join(f"{case}, {gpu.upper()}" for case, gpu in columns) + " |"
    yield "|---|" + "---|" * len(columns)
    for part in vars(cases["NF4"]["h100"]):
        micros = [getattr(cases[case][gpu], part) / 65536 * 1e6 for case, gpu in columns]
        if any(micros):
            yield f"| {part} | " + " | ".join(f"{value:.2f}" if value else "" for value in micros) + " |"
    totals = [cases[case][gpu].total for case, gpu in columns]
    yield "| **tokens/s** | " + " | ".join(f"**{65536 / seconds:,.0f}**" for seconds in totals) + " |"


def _policy_table() -> Iterator[str]:
    """Per token and layer of Llama-3.1-8B, LoRA r=64; what 80 GB hold of one sequence."""
    training = training_of(recipe_of("llama", 64), shapes_of(LLAMA_8B))
    layer, state = training.widths[0], state_bytes(training, ONE)
    work = token_work(training, 4096)
    forward = (work.gemm_forward + work.attention_forward) / training.shapes.num_layers
    yield (
        "| activation_checkpointing | KB kept on the device | in host memory | MFLOP of products again | of attention "
        "| of the forward pass | us per token, H100 | H200 | tokens on 80 GB |"
    )
    yield "|---|" + "---|" * 8
    for policy in POLICIES:
        repeated = again(layer, training, policy)
        attention = work.attention_forward / training.shapes.num_layers if repeated.attention else 0.0
        share = (repeated.gemm + attention) / forward
        micros = [
            step_time(training, ONE, DEVICES[gpu], 50e9, RankStep(4096, 2, 8, policy)).recomputation / 65536 * 1e6
            for gpu in GPUS
        ]
        none, some = (peak_memory(training, ONE, state, RankStep(n, 1, 8, policy)).total for n in (50_000, 60_000))
        tokens = 50_000 + (80e9 - none) / ((some - none) / 10_000)
        host = host_bytes(training, policy) / training.shapes.num_layers
        yield (
            f"| `{policy}` | {kept_bytes(layer, training, policy) / 1e3:.1f} | {host / 1e3:.1f} "
            f"| {(repeated.gemm + repeated.lora) / 1e6:.1f} | {attention / 1e6:.1f} | {share:.0%} "
            f"| {micros[0]:.1f} | {micros[1]:.1f} | {tokens / 1e3:,.0f}k |"
        )


def _recipe_table() -> Iterator[str]:
    yield "| recipe | GPUs | memory per GPU | tokens/s, H100 | H200 | fastest on H100, same weights | tokens/s |"
    yield "|---|---|---|---|---|---|---|"
    for name, gpus, ways in recipes():
        own, best = ways["h100"]
        large = ways["h200"][0]
        assert own is not None
        assert large is not None
        rates = [f"{way.tokens_per_second:,.0f}" if way.fits else "does not fit" for way in (own, large)]
        found = ["nothing fits", ""] if best is None else [_short(best), f"{best.tokens_per_second:,.0f}"]
        cells = [f"`{name}`", str(gpus), f"{own.peak_bytes / 1e9:.1f} GB", *rates, *found]
        yield "| " + " | ".join(cells) + " |"


def _short(way: Way) -> str:
    return f"{way.engine}, micro-batch {way.micro_batch}{way.options}, {way.peak_bytes / 1e9:.0f} GB"


def _published_table() -> Iterator[str]:
    yield "| published | tokens/s per GPU | by the model | ratio | the setting differs |"
    yield "|---|---|---|---|---|"
    for row, rate in published():
        ratio = f"{rate / row.tokens_per_second:.2f}"
        ratio = ratio if abs(rate / row.tokens_per_second - 1) <= 0.15 else f"**{ratio}**"
        yield f"| {row.who}, {row.gpu.upper()} | {row.tokens_per_second:,} | {rate:,.0f} | {ratio} | {row.differs} |"


def page_with_tables(text: str) -> str:
    """`text` with each table between its two marks."""
    for name, lines in tables():
        body = "\n".join(lines)
        block = f"<!-- {name}: benchmarks/roofline.py --write -->\n{body}\n<!-- end -->"
        text = re.sub(rf"<!-- {name}: .*?<!-- end -->", lambda _, block=block: block, text, flags=re.DOTALL)
    return text


def headers() -> Iterator[tuple[Path, str]]:
    """(recipe, its text with the model's figures in the line on its hardware)."""
    for name, _, ways in recipes():
        path, own = ROOT / "recipes" / f"{name}.yaml", ways["h100"][0]
        assert own is not None
        figures = f"{own.peak_bytes / 1e9:.1f} GB each, {own.tokens_per_second:,.0f} tokens/s on H100s"
        yield path, re.sub(r"(By the model of a step, not measured:).*", rf"\1 {figures}.", path.read_text(), count=1)


def as_json() -> dict[str, Any]:
    """Every figure, unrounded."""
    ways = {name: {gpu: own and vars(own.memory) for gpu, (own, _) in by.items()} for name, _, by in recipes()}
    rates = {n: {g: own and own.tokens_per_second for g, (own, _) in by.items()} for n, _, by in recipes()}
    return {
        "measured": False,
        "step_seconds": {case: {gpu: vars(t) for gpu, t in by.items()} for case, by in by_part().items()},
        "recipe_memory_bytes": ways,
        "recipe_tokens_per_second": rates,
        "published": {row.who: {"published": row.tokens_per_second, "model": rate} for row, rate in published()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true", help="into docs/performance.md and recipes/")
    arguments = parser.parse_args()
    if arguments.json:
        print(json.dumps(as_json(), indent=1))
    elif arguments.write:
        PAGE.write_text(page_with_tables(PAGE.read_text()))
        for path, text in headers():
            path.write_text(text)
    else:
        for name, lines in tables():
            print(f"{name} (by the model, not measured)", *lines, "", sep="\n")


if __name__ == "__main__":
    main()
