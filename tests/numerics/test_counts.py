"""What a step costs a GPU, as far as it can be counted without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_an_optimizer_step_is_a_few_launches():
    """448 LoRA matrices. One launch per tensor and operation were 4,484."""
    command = [sys.executable, "benchmarks/counts.py", "--json"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    counted = json.loads(subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, check=True).stdout)
    assert 0 < counted["optimizer_launches"] <= 48
    assert 0 < counted["optimizer_launches_8bit"] <= 48
    assert 0 < counted["optimizer_calls_cpu"] <= 80
