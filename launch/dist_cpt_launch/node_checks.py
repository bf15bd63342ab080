"""What one node can check about itself before training: package versions, disk, clock, GPUs."""

from __future__ import annotations

import os
import platform
import re
import secrets
import shutil
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from dist_cpt.runtime.versions import installed
from dist_cpt_launch.preflight_report import Limits, NodeReport

PACKAGES = ("dist-cpt", "torch", "transformers", "peft", "deepspeed", "bitsandbytes", "triton", "safetensors")
GPU_FIELDS = "index,name,driver_version,memory.total,memory.used,ecc.errors.uncorrected.volatile.total"
BUSY_FRACTION = 0.05  # of a GPU's memory; the driver itself uses less
NVIDIA_SMI_SECONDS = 30


def check_node(report: NodeReport, folder: Path, limits: Limits, num_gpus: int | None) -> None:
    """Fill in a node's report; `num_gpus` is how many it must have, None for any number.

    Raises:
        OSError: the folder cannot be written.
    """
    report.host, report.versions = socket.gethostname(), package_versions()
    report.write_mb_per_s, report.skew_seconds = write_speed(folder, limits.write_mib)
    if report.write_mb_per_s < limits.write_mb_per_s:
        report.problems.append(
            f"writes {report.write_mb_per_s:.1f} MB/s into {folder.parent}, below {limits.write_mb_per_s:g} MB/s"
        )
    if abs(report.skew_seconds) > limits.skew_seconds:
        report.problems.append(f"its clock differs by {report.skew_seconds:+.1f} s from the file system's")
    report.gpus, gpu_problems = gpu_state()
    report.problems += gpu_problems
    if num_gpus is not None and len(report.gpus) != num_gpus:
        report.problems.append(f"{len(report.gpus)} GPUs visible, {num_gpus} expected")


def package_versions() -> dict[str, str]:
    """Versions by package name, and Python's; '-' for packages that are not installed."""
    return {"python": platform.python_version()} | {name: installed(name) or "-" for name in PACKAGES}


def write_speed(folder: Path, mib: int) -> tuple[float, float]:
    """(MB/s of writing and syncing `mib` MiB, seconds that this host's clock is ahead of the file system's).

    Raises:
        OSError: the file cannot be written.
    """
    path = folder / f".write-{secrets.token_hex(8)}"
    block = os.urandom(1 << 20)
    try:
        began = time.perf_counter()
        with path.open("wb") as file:
            for _ in range(mib):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        seconds = time.perf_counter() - began
        path.touch()
        skew = time.time() - path.stat().st_mtime
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
    return mib * len(block) / seconds / 1e6, skew


def gpu_state() -> tuple[list[dict[str, Any]], list[str]]:
    """(this host's GPUs by nvidia-smi, problems); both empty on a host without GPUs."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        devices = list(Path("/dev").glob("nvidia[0-9]*"))
        return [], [f"{len(devices)} GPU devices but no nvidia-smi"] if devices else []
    command = [tool, f"--query-gpu={GPU_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return [], ["nvidia-smi does not answer"]
    if done.returncode != 0:
        output = (done.stdout + done.stderr).strip().splitlines()
        return [], [f"nvidia-smi fails: {output[0] if output else f'exit code {done.returncode}'}"]
    return read_gpus(done.stdout, os.environ.get("CUDA_VISIBLE_DEVICES"))


def read_gpus(table: str, visible: str | None) -> tuple[list[dict[str, Any]], list[str]]:
    """(rows of nvidia-smi's table for the GPUs that are visible to this job, their problems)."""
    indices = None if visible is None or not re.fullmatch(r"[0-9,]*", visible) else visible.split(",")
    gpus, problems = [], []
    for line in table.strip().splitlines():
        index, name, driver, total, used, errors = ([part.strip() for part in line.split(",")] + [""] * 6)[:6]
        if indices is not None and index not in indices:
            continue
        total_mib, used_mib, num_errors = _number(total), _number(used), _number(errors)
        gpus.append({"index": index, "name": name, "driver": driver, "memory_mib": total_mib, "used_mib": used_mib})
        if total_mib is None:
            problems.append(f"GPU {index} cannot be read ({line.strip()})")
        elif used_mib is not None and used_mib > BUSY_FRACTION * total_mib:
            problems.append(f"GPU {index}: {used_mib:.0f} of {total_mib:.0f} MiB are in use by another process")
        if num_errors:
            problems.append(f"GPU {index}: {num_errors:.0f} uncorrected ECC errors")
    return gpus, problems


def _number(text: str) -> float | None:
    with suppress(ValueError):  # [N/A], or an error message
        return float(text)
    return None
