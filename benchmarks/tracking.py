"""What W&B costs a training step on the CPU: none, offline, and offline with a service that stands still.

Three runs of one recipe, in fresh processes and in turn: without tracking, with W&B in offline mode, and with its
service stopped (SIGSTOP) for good after FREEZE_STEP steps, as a file system or a network that hangs stops it. A run's
step time is the median of the steps after FREEZE_STEP in its metrics.jsonl; the ratios are against the run without
tracking. All three must end with exit code 0 and the same losses; `end_seconds` is from the last step's row to the
end of the process, and `messages` are what the frozen run said of W&B.

    python benchmarks/tracking.py [--rounds 3] [--steps 400] [--write]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

# Beside this file lies kernels.py: on the path it would be taken for Hugging Face's package of that name.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]

SIDES = ("untracked", "offline", "frozen")
FREEZE_STEP = 20
SEQ_LEN = 128
TOKENS_PER_STEP = 4 * SEQ_LEN


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--write", action="store_true", help="to benchmarks/results/")
    arguments = parser.parse_args()
    load_before = os.getloadavg()
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory(prefix="dist-cpt-bench-") as folder:
        write_text(Path(folder))
        for number in range(arguments.rounds):
            # The order changes, so that a drift of the machine favours no one.
            for side in sorted(SIDES, reverse=bool(number % 2)):
                runs[side].append(run_side(side, f"{side}-{number}", Path(folder), arguments.steps))
    if len({tuple(run["losses"]) for measured in runs.values() for run in measured}) != 1:
        raise SystemExit("not the same work: the losses differ")
    seconds = {side: statistics.median(run["step_seconds"] for run in measured) for side, measured in runs.items()}
    result = {
        "what": "median step time of a small run on the CPU, by what W&B does",
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "wandb")},
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "work": {"steps": arguments.steps, "frozen_after": FREEZE_STEP, "rounds": arguments.rounds},
        "step_seconds": {side: [run["step_seconds"] for run in measured] for side, measured in runs.items()},
        "against_untracked": {side: round(seconds[side] / seconds["untracked"], 3) for side in SIDES[1:]},
        "end_seconds": {side: [run["end_seconds"] for run in measured] for side, measured in runs.items()},
        "messages": [run["messages"] for run in runs["frozen"]],
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.write:
        target = Path(__file__).parent / "results" / f"{date.today().isoformat()}_cpu_tracking.json"
        target.write_text(text + "\n")


def write_text(folder: Path) -> None:
    """Python's documentation, and a tokenizer trained on it."""
    from pydoc_data.topics import topics

    lines = [json.dumps({"text": topics[name]}) for name in sorted(topics)]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    arguments = [str(folder / "text.jsonl"), "--vocab-size", "1024", "--out", str(folder / "tokenizer")]
    subprocess.run(dist_cpt("tokenizer", "train", *arguments), env=environment(), check=True, stdout=sys.stderr)


def run_side(side: str, name: str, folder: Path, num_steps: int) -> dict[str, Any]:
    recipe = {
        "name": name,
        "output_dir": str(folder / "runs"),
        "model": {
            "config": {
                "model_type": "llama",
                "hidden_size": 64,
                "intermediate_size": 192,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "max_position_embeddings": SEQ_LEN,
            },
            "weights": "fp32",
        },
        "adapter": {"kind": "none"},
        "data": {
            "seq_len": SEQ_LEN,
            "tokenizer": str(folder / "tokenizer"),
            "sources": [{"path": str(folder / "text.jsonl")}],
        },
        "batch": {"global_tokens": TOKENS_PER_STEP, "micro_batch": 4},
        "train": {"tokens": num_steps * TOKENS_PER_STEP},
        "optim": {"lr": 1.0e-3},
        "engine": "single",
        "track": {"wandb": {"mode": "disabled" if side == "untracked" else "offline"}},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    metrics = folder / "runs" / name / "metrics.jsonl"
    log = folder / f"{name}.log"
    with log.open("w") as output:
        worker = subprocess.Popen(dist_cpt("train", str(path)), env=environment(), stdout=output, stderr=output)
        frozen = side != "frozen"
        trained_at = None
        while worker.poll() is None:
            steps = len(read_rows(metrics))
            if not frozen and steps >= FREEZE_STEP:
                services = list(services_under(worker.pid))
                for pid in services:
                    os.kill(pid, signal.SIGSTOP)
                frozen = bool(services)
            if trained_at is None and steps == num_steps:
                trained_at = time.monotonic()
            time.sleep(0.2)
        ended_at = time.monotonic()
    if worker.returncode or not frozen or trained_at is None:
        raise SystemExit(f"{name} ended with exit code {worker.returncode}:\n{log.read_text()}")
    rows = read_rows(metrics)
    return {
        "losses": [row["loss"] for row in rows],
        "step_seconds": round(statistics.median(row["step_seconds"] for row in rows[FREEZE_STEP:]), 5),
        "end_seconds": round(ended_at - trained_at, 1),
        "messages": [line.replace(str(folder), "") for line in log.read_text().splitlines() if line.startswith("W&B")],
    }


def services_under(pid: int) -> Iterator[int]:
    """Processes of wandb below a process. Source: proc(5)."""
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, listed.read_text().split()):
            if Path(f"/proc/{child}/comm").read_text().startswith("wandb"):
                yield child
            yield from services_under(child)


def read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def dist_cpt(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dist_cpt.cli", *arguments]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


if __name__ == "__main__":
    main()
