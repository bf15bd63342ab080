"""The files of a realistic run, without one having trained."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

HOSTILE = "<script>alert(1)</script>\"'&<img src=http://x.example/y>"


def make_run(folder: Path, num_steps: int = 400, name: str = "llama3-8b-legal") -> Path:
    """A realistic run: stopped at 180 under ZeRO-3, resumed under FSDP2, killed, resumed again, done."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    cuts = [0, round(num_steps * 0.45), round(num_steps * 0.7)]
    engines = [("zero-3", 8), ("fsdp-full", 4), ("fsdp-hybrid", 16)]
    steps, events = [], []

    def event(minute: float, kind: str, **fields: Any) -> None:
        stamp = f"2026-03-0{2 + int(minute // 1440)}T{int(minute // 60) % 24:02d}:{int(minute % 60):02d}:11.000+00:00"
        events.append({"time": stamp, "kind": kind, **fields})

    for attempt, (cut, (engine, ranks)) in enumerate(zip(cuts, engines, strict=True)):
        resumed = None if attempt == 0 else f"step-{cut:08d}"
        event(
            cut * 2.1,
            "resume" if resumed else "start",
            name=name,
            attempt=attempt,
            engine=engine,
            world_size=ranks,
            device="cuda",
            num_steps=num_steps,
            first_step=cut,
            resumed_from=resumed,
            wandb_run_id="0a1b2c3d",
        )
        if attempt == 0:
            event(1, "message", text="W&B: offline, run 0a1b2c3d; upload with: wandb sync runs/x/wandb/offline-run-*")
            event(
                cuts[1] * 2.1 - 1,
                "checkpoint",
                step=cuts[1],
                path=f"step-{cuts[1]:08d}",
                seconds=12.2,
                num_bytes=2_500_000_000,
            )
            event(cuts[1] * 2.1, "end", exit_code=75, reason="SIGTERM: stopped and saved", step=cuts[1])
        if attempt == 1:
            event(
                cuts[2] * 2.1 - 1,
                "checkpoint",
                step=cuts[2],
                path=f"step-{cuts[2]:08d}",
                seconds=14.9,
                num_bytes=2_500_000_000,
            )
    event(num_steps * 2.1, "end", exit_code=0, reason="done", step=num_steps)

    def row(step: int, attempt: int) -> dict[str, Any]:
        share = step / num_steps
        skipped = step in (round(num_steps * 0.31), round(num_steps * 0.62))
        warm = min(1.0, step / (0.03 * num_steps))
        rate = warm * (0.55 + 0.45 * math.cos(math.pi * share))
        speed = {0: 41_000, 1: 23_500, 2: 78_000}[attempt] * rng.gauss(1, 0.015)
        return {
            "step": step,
            "loss": 1.55 + 0.9 * math.exp(-7 * share) + rng.gauss(0, 0.05),
            "lr": {"adapter": 1e-4 * rate, "embeddings": 1e-5 * rate},
            "grad_norm": None if skipped else 0.4 * math.exp(rng.gauss(0, 0.3)) + 2 * math.exp(-30 * share),
            "skipped": skipped,
            "skipped_total": (share >= 0.31) + (share >= 0.62),
            "position": [128 * step - 128, 128 * step],
            "num_tokens": 520_000,
            "tokens": 520_000 * step,
            "tokens_by_source": {"legal": 470_000 + rng.randrange(3000), "general": 51_000},
            "tokens_per_second": speed,
            "step_seconds": 520_000 / speed,
            "memory_gib": {0: 61.2, 1: 74.8, 2: 55.0}[attempt] + 0.2 * rng.random(),
            "attempt": attempt,
        }

    def attempt_of(step: int) -> int:
        return sum(step > cut for cut in cuts) - 1

    steps = [row(step, attempt_of(step)) for step in range(1, num_steps + 1)]
    rewound = [row(step, 1) for step in range(cuts[2] + 1, cuts[2] + 10)]
    evaluations = []
    for step in range(0, num_steps + 1, max(1, num_steps // 10)):
        share = step / num_steps
        for held_out, role, loss in (
            ("legal", "domain", 1.6 + 0.85 * math.exp(-6 * share)),
            ("contracts", "domain", 1.9 + 0.5 * math.exp(-5 * share)),
            ("general", "retention", 2.02 + 0.03 * share),
        ):
            evaluations.append(
                {
                    "step": step,
                    "name": held_out,
                    "role": role,
                    "loss": loss,
                    "perplexity": math.exp(loss),
                    "num_tokens": 1_048_576,
                    "attempt": attempt_of(max(step, 1)),
                }
            )
    for file, rows in (
        ("metrics", steps),
        ("metrics.rewound", rewound),
        ("evaluations", evaluations),
        ("events", events),
    ):
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    sharding = "weights, masters and moments over 16 ranks"
    groups = [
        {
            "name": n,
            "num_tensors": t,
            "num_parameters": p,
            "compute_dtype": "bf16",
            "master_dtype": "fp32",
            "peak_lr": lr,
            "weight_decay": wd,
            "sharding": sharding,
            "tensors": [{"name": f"layers.{i}.{n}", "shape": [4096, 8]} for i in range(t)],
        }
        for n, t, p, lr, wd in (("adapter", 448, 335_544_320, 1e-4, 0.01), ("embeddings", 2, 1_050_673_152, 1e-5, 0.0))
    ]
    checks = [
        {
            "name": "every trainable tensor had a finite, non-zero gradient",
            "passed": True,
            "step": 2,
            "detail": "450 tensors",
        },
        {"name": "every trainable tensor moved", "passed": True, "step": 2, "detail": "450 tensors"},
        {"name": "every frozen tensor is unchanged", "passed": True, "step": 2, "detail": "by checksum"},
        {"name": "checked over the first two updates", "passed": None, "step": 1, "detail": "only 1 updates were made"},
    ]
    frozen = {
        "num_tensors": 291,
        "num_parameters_per_rank": [470_000_000] * 2,
        "dtype": ["bfloat16"],
        "checksum_rank_0": "0f",
    }
    contract = {
        "groups": groups,
        "frozen": frozen,
        "ties": [["lm_head.weight", "embed_tokens.weight"]],
        "checks": checks,
    }
    certificate = {
        "verdict": "pass",
        "failed": [],
        "step": cuts[2],
        "saved_by": {"engine": "fsdp-full", "world_size": 4},
        "restored_by": {"engine": "fsdp-hybrid", "world_size": 16},
        "checks": [
            {"name": "master", "passed": True, "detail": "450 of 450 bit-identical"},
            {
                "name": "replayed_loss",
                "passed": True,
                "detail": "recorded 1.75, replayed 1.75, difference 0, allowed 0.01",
            },
        ],
    }
    sample = {
        "prompt": "The party of the first part",
        "text": " shall indemnify\nthe party of the second part.",
        "step": num_steps,
    }
    for file, value in (
        ("contract", contract),
        ("certificate", certificate),
        ("sample", sample),
        ("exit", {"code": 0, "reason": "done", "step": num_steps}),
    ):
        (folder / f"{file}.json").write_text(json.dumps(value))
    (folder / "recipe.yaml").write_text(
        f"name: {name}\ndata:\n  seq_len: 4096\n  sources:\n"
        "  - {path: /corpus/legal.jsonl, name: legal, weight: 0.9, role: domain}\n"
        "  - {path: /corpus/general.jsonl, name: general, weight: 0.1, role: replay}\n"
    )
    kept = folder / "checkpoints" / f"step-{cuts[2]:08d}"
    kept.mkdir(parents=True, exist_ok=True)
    (kept / "manifest.json").write_text("{}")
    return folder
