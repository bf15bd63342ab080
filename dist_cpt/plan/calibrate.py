"""Rates that were measured on this machine, in place of those that are assumed of its device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from dist_cpt.errors import NodeError, WriteError
from dist_cpt.plan.devices import CPU, DEVICES, Device

RATES = ("gemm", "attention_forward", "attention_backward", "copy")
SECONDS = 300.0


def rates_file() -> Path:
    """Where the rates of this user's machine are kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "dist-cpt" / "rates.json"


def calibrate(path: Path | None = None) -> dict[str, Any]:
    """Measure in a process of its own, and keep the result.

    Raises:
        NodeError: the measurement fails or takes too long.
        WriteError: the result cannot be kept.
    """
    command = [sys.executable, "-m", "dist_cpt.runtime.rate_check"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise NodeError(f"--calibrate: no result within {SECONDS:g} s", remedy="dist-cpt doctor") from None
    if done.returncode:
        line = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise NodeError(f"--calibrate fails: {line[:300]}", remedy="dist-cpt doctor")
    measured = json.loads(done.stdout.splitlines()[-1])
    target = path or rates_file()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise WriteError(f"{target} cannot be written: {error.strerror}") from error
    return measured


def calibrated(device: Device, path: Path | None = None) -> Device:
    """`device` with the rates that were measured on this machine, if they are of it."""
    target = path or rates_file()
    try:
        measured = json.loads(target.read_text(encoding="utf-8"))
        rates = {name: float(measured[name]) for name in RATES}
    except (OSError, ValueError, KeyError, TypeError):
        return device
    if not _is_of(device, str(measured.get("name"))) or min(rates.values()) <= 0:
        return device
    peak = rates["gemm"] if device.name == CPU else device.peak
    return replace(device, **rates, peak=peak, source=f"measured on this machine by plan --calibrate ({target})")


def _is_of(device: Device, name: str) -> bool:
    """Whether a driver's name is that of the device: NVIDIA H100 80GB HBM3 is our H100 SXM 80 GB."""
    in_table = any(device.name == known.name for known in DEVICES.values())
    return name == device.name or (in_table and device.name.split()[0] in name.split())
