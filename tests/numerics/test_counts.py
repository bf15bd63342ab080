"""What a step costs a GPU, as far as it can be counted without one; and that what measures it there still runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def benchmark(*command: str) -> str:
    """What a file of benchmarks/ prints."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    arguments = [sys.executable, f"benchmarks/{command[0]}", *command[1:]]
    return subprocess.run(arguments, env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.matrix
def test_the_benchmark_of_a_step_on_a_gpu_runs_on_a_cpu(tmp_path):
    sides = ["dist_cpt", "hf_peft"]
    benchmark("gpu_step.py", "--tiny", "--sides", *sides, "--out", str(tmp_path / "out.json"))
    cases: dict[str, Any] = json.loads((tmp_path / "out.json").read_text())["results"]
    assert len(cases) == 4
    for name, measured in cases.items():
        assert all(measured[side].get("flops_per_step", 0) > 0 for side in sides), (name, measured)


def test_an_optimizer_step_is_a_few_launches():
    """448 LoRA matrices. One launch per tensor and operation were 4,484."""
    counted = json.loads(benchmark("counts.py", "--json"))
    assert 0 < counted["optimizer_launches"] <= 48
    assert 0 < counted["optimizer_launches_8bit"] <= 48
    assert 0 < counted["optimizer_calls_cpu"] <= 80
