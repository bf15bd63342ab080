"""What keeps a small model from forgetting, on the demo's base and corpora: docs/forgetting.md has the table.

A base that knows documentation learns source code, with the same recipe, tokens and seeds: without replay, with a tenth
of its blocks from the base's own text, and with a tenth sampled from the base. The runs without replay are also scaled
and averaged after training. Everything is measured in fp32 by what `dist-cpt evaluate` and `merge --sweep` call. What
is finished in WORK is kept, so the command can be given again after a stop.

    python benchmarks/forgetting.py WORK [--seeds 0,1,2] [--write]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import statistics
import sys
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Beside this file lies kernels.py: on the path it would be taken for Hugging Face's package of that name.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]

ROOT = Path(__file__).resolve().parent.parent
PAGE, MARK = ROOT / "docs" / "forgetting.md", "<!-- experiment: benchmarks/forgetting.py --write -->"
GLOBAL_TOKENS, STEPS, BASE_STEPS = 4096, 72, 300
SCALES = (0.25, 0.5, 0.75)
LAST = 3
REPLAY_TOKENS = 30_000
VARIANTS = {
    "no replay": None,
    "10 % true replay": "corpus/documentation.jsonl",
    "10 % self-generated replay": "sampled-{seed}",
}

Losses = dict[str, float]  # by held-out set


def train(recipe: dict[str, Any]) -> Path:
    """Train a recipe to its end, unless it is finished; its run folder."""
    from dist_cpt.checkpoint.finished import says_finished
    from dist_cpt.config.load import build
    from dist_cpt.config.resolve import resolve_paths, run_folder
    from dist_cpt.runtime.stop import StopRequest
    from dist_cpt.train.run import train as train_run

    config = resolve_paths(build(recipe, where=recipe["name"]))
    if not says_finished(config):
        code, _ = train_run(config, StopRequest())
        if code:
            raise SystemExit(code)
    return run_folder(config)


def make_base(work: Path) -> None:
    """Corpora, tokenizer and the base that knows documentation."""
    from dist_cpt import demo
    from dist_cpt.export.merge import merge

    if (work / "base-model").is_dir():
        return
    if not (work / "tokenizer").is_dir():
        demo._write_corpus(work / "corpus")
        demo._train_tokenizer(work / "corpus" / "documentation.jsonl", work / "tokenizer")
    recipe = demo._base_recipe(work, BASE_STEPS * GLOBAL_TOKENS)
    run = train(recipe | {"checkpoint": {"every_minutes": 2}})
    merge(newest(run), work / "base-model", "fp32")


def newest(run: Path) -> Path:
    from dist_cpt.run_folder.checkpoints import published

    return published(run)[0]


def learn_code(work: Path, seed: int, name: str, replay: str | None) -> Path:
    """The run of one variant and seed."""
    from dist_cpt import demo

    recipe = demo._code_recipe(work, "single", STEPS * GLOBAL_TOKENS)
    sources = [{"path": str(work / "corpus" / "code.jsonl"), "weight": 0.9 if replay else 1.0}]
    if replay:
        sources.append({"path": str(work / replay.format(seed=seed)), "weight": 0.1, "role": "replay"})
    recipe |= {
        "name": f"{re.sub('[^a-z]+', '-', name.lower()).strip('-')}-{seed}",
        "seed": seed,
        "model": {"path": str(work / "base-model"), "weights": "fp32"},
        "checkpoint": {"every_steps": STEPS // 6, "keep": LAST, "trial": False},
        "evaluate": {"max_blocks": 64},
        "track": {"wandb": {"mode": "disabled"}},
    }
    recipe["data"] = recipe["data"] | {"sources": sources}
    return train(recipe)


def sample_replay(work: Path, seed: int) -> None:
    """Text from the base, begun with nothing but what begins a document."""
    from dist_cpt import demo
    from dist_cpt.config.load import build
    from dist_cpt.config.resolve import resolve_paths
    from dist_cpt.export.replay import ProgressLine, ReplayOptions, replay

    out = work / f"sampled-{seed}"
    if (out / "documents.jsonl").is_file():
        return
    recipe = demo._code_recipe(work, "single", GLOBAL_TOKENS) | {"seed": seed}
    recipe["model"] = {"path": str(work / "base-model"), "weights": "fp32"}
    config = resolve_paths(build(recipe, where="replay"))
    replay(config, REPLAY_TOKENS, out, ReplayOptions(seed), 64, ProgressLine(REPLAY_TOKENS))


def measure(work: Path, seed: int) -> Iterator[tuple[str, Losses]]:
    """(variant, losses) of one seed; `base` among them."""
    from dist_cpt.export.sweep import sweep
    from dist_cpt.run_folder.checkpoints import published

    sample_replay(work, seed)
    runs = {name: learn_code(work, seed, name, source) for name, source in VARIANTS.items()}
    plain = runs["no replay"]
    for scale, losses in sweep(newest(plain), [0.0, *SCALES, 1.0]):
        yield {0.0: "base", 1.0: "no replay"}.get(scale, f"no replay, merged at scale {scale:g}"), losses
    checkpoints = published(plain)[:LAST]
    (averaged,) = sweep(checkpoints[0], [1.0], others=checkpoints[1:])
    yield f"no replay, mean of the last {LAST} checkpoints", averaged[1]
    for name, run in runs.items():
        if name != "no replay":
            ((_, losses),) = sweep(newest(run), [1.0])
            yield name, losses


def of_seed(work: Path, seed: int) -> dict[str, Losses]:
    """The losses of one seed, from WORK if they are there."""
    path = work / f"losses-{seed}.json"
    if not path.is_file():
        path.write_text(json.dumps(dict(measure(work, seed)), indent=1))
    return json.loads(path.read_text())


def table(by_seed: dict[str, dict[str, Losses]]) -> list[str]:
    """Mean and standard deviation over the seeds of both perplexities."""
    lines = ["| | code (target) | documentation (retention) | retention loss over the base |", "|---|---|---|---|"]
    variants = next(iter(by_seed.values()))
    for name in sorted(variants, key=lambda name: (name != "base", "scale" in name or "mean" in name, name)):
        cells = []
        for dataset in ("code", "documentation"):
            values = [math.exp(losses[name][dataset]) for losses in by_seed.values()]
            cells.append(spread(values, ".2f"))
        rises = [losses[name]["documentation"] - losses["base"]["documentation"] for losses in by_seed.values()]
        lines.append(f"| {name} | {' | '.join(cells)} | {'' if name == 'base' else spread(rises, '+.3f')} |")
    return lines


def spread(values: list[float], form: str) -> str:
    mean, deviation = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{mean:{form}} ± {deviation:{form.lstrip('+')}}" if deviation else f"{mean:{form}}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--write", action="store_true", help="into benchmarks/results and docs/forgetting.md")
    arguments = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    work = arguments.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    make_base(work)
    by_seed = {seed: of_seed(work, int(seed)) for seed in arguments.seeds.split(",")}
    lines = table(by_seed)
    print("\n".join(lines))
    if not arguments.write:
        return
    sizes = {
        "steps": STEPS,
        "base_steps": BASE_STEPS,
        "global_tokens": GLOBAL_TOKENS,
        "replay_tokens": REPLAY_TOKENS,
    }
    machine = {"processor": platform.machine(), "torch": version("torch"), "python": platform.python_version()}
    content = {"settings": sizes, "machine": machine, "losses_by_seed": by_seed}
    result = ROOT / "benchmarks" / "results" / f"{date.today()}_cpu_forgetting.json"
    result.write_text(json.dumps(content, indent=1) + "\n")
    before, mark, after = PAGE.read_text().partition(MARK)
    rest = after.partition("\n\n")[2] if mark else ""
    PAGE.write_text(f"{before}{MARK}\n" + "\n".join(lines) + f"\n\n{rest}")


if __name__ == "__main__":
    main()
