"""`dist-cpt doctor`: what this machine has for a run, each part with its state and the remedy.

Checks that may hang (a file system, a GPU's driver, a server) run in a process of their own, which is abandoned at its
time limit. Only what every run needs makes the machine unfit.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from packaging.requirements import Requirement

from dist_cpt.run_folder.json_files import parse_row
from dist_cpt.runtime.versions import installed
from dist_cpt_launch.node_checks import gpu_state
from dist_cpt_launch.preflight_report import Limits
from dist_cpt_launch.slurm_query import query

DEVICE_SECONDS = 180.0  # loading torch from a slow disk, compiling kernels
FOLDER_SECONDS = 30.0
LOGIN_SECONDS = 30.0
CONNECT_SECONDS = 5.0
SLURM_SECONDS = 5.0
_ASK_WANDB = "import json; from dist_cpt.train.wandb import login_state; print(json.dumps(login_state()))"


@dataclass(frozen=True)
class Finding:
    """One part of the machine: `ok`, `note` (something a run can do without), or `broken`."""

    what: str
    state: Literal["ok", "note", "broken"]
    text: str
    fix: str = ""


def examine(folder: Path) -> list[Finding]:
    """Every finding; `folder` is where the file system is tried."""
    return [
        *package_findings(),
        *device_findings(ask(["-m", "dist_cpt.runtime.device_check"], DEVICE_SECONDS)),
        *folder_findings(folder, FOLDER_SECONDS),
        slurm_finding(SLURM_SECONDS),
        wandb_finding(ask(["-c", _ASK_WANDB], LOGIN_SECONDS)),
    ]


def as_text(findings: Sequence[Finding]) -> list[str]:
    """One line each, the remedy behind an arrow."""
    width = max(len(finding.what) for finding in findings)
    return [
        f"{finding.state:<7}{finding.what:<{width}}  {finding.text}" + (f" -> {finding.fix}" if finding.fix else "")
        for finding in findings
    ]


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """`ok` is whether every run has what it needs."""
    return {"ok": not any(map(is_broken, findings)), "findings": [asdict(finding) for finding in findings]}


def is_broken(finding: Finding) -> bool:
    return finding.state == "broken"


# -- packages ---------------------------------------------------------------------------------------------------------


def package_findings() -> list[Finding]:
    """The versions that every run needs, and each extra, against the package's own metadata."""
    required = [Requirement(line) for line in importlib.metadata.requires("dist-cpt") or ()]
    python = Finding("python", "ok", f"{sys.version.split()[0]}, {sys.executable}")
    needed = [one for one in required if one.marker is None or one.marker.evaluate({"extra": ""})]
    wrong = [text for one in needed if (text := _unmet(one))]
    if wrong:
        fix = "pip install 'dist-cpt' -c constraints.txt, in the environment that runs it"
        core = Finding("packages", "broken", "; ".join(wrong), fix)
    else:
        shown = ", ".join(f"{name} {installed(name)}" for name in ("dist-cpt", "transformers", "peft", "safetensors"))
        core = Finding("packages", "ok", f"{shown} and {len(needed) - 3} others")
    return [python, core, *(extra_finding(name, required) for name in _extras(required))]


def _extras(required: Sequence[Requirement]) -> list[str]:
    named = [name for one in required for name in re.findall(r"extra == ['\"]([\w-]+)['\"]", str(one.marker or ""))]
    return [name for name in dict.fromkeys(named) if name not in ("all", "dev")]


def extra_finding(name: str, required: Sequence[Requirement]) -> Finding:
    own = [
        one
        for one in required
        if one.marker is not None and one.marker.evaluate({"extra": name}) and not one.marker.evaluate({"extra": ""})
    ]
    wrong = [text for one in own if (text := _unmet(one))]
    if wrong:
        return Finding(f"extra {name}", "note", "; ".join(wrong), f"pip install 'dist-cpt[{name}]'")
    return Finding(f"extra {name}", "ok", ", ".join(f"{one.name} {installed(one.name)}" for one in own))


def _unmet(requirement: Requirement) -> str:
    version = installed(requirement.name)
    if version is None:
        return f"{requirement.name} is not installed"
    met = requirement.specifier.contains(version, prereleases=True)
    return "" if met else f"{requirement.name} {version}, not {requirement.specifier}"


# -- devices ----------------------------------------------------------------------------------------------------------


def device_findings(asked: dict[str, Any]) -> list[Finding]:
    """GPUs by the driver, torch on them, NCCL, and the kernels; `asked` is what device_check printed."""
    gpus, problems = gpu_state()
    if "failed" in asked:
        fix = "reinstall torch and transformers with constraints.txt"
        return [Finding("torch", "broken", asked["failed"], fix)]
    torch = Finding("torch", "ok", f"{asked['torch']}, built for CUDA {asked['cuda'] or '- (CPU only)'}")
    if not gpus and not problems and not asked["devices"]:
        text = "none: a run trains on the CPU, with gloo"
        fix = "model.weights: fp32 is many times faster: this CPU has no bf16 instructions"
        return [torch, Finding("GPU", "note", text, fix if asked["emulates_bf16"] else "")]
    driver = ", ".join(sorted({gpu["driver"] for gpu in gpus})) or "unknown"
    names = ", ".join(sorted({f"{gpu['name']}" for gpu in gpus}))
    found = [torch, Finding("GPU", "ok", f"{len(gpus)} x {names}, driver {driver}")]
    found += [Finding("GPU", "note", problem, "dist-cpt preflight names it per node") for problem in problems]
    if len(asked["devices"]) < len(gpus):
        fix = "install a torch for this driver's CUDA (https://pytorch.org/get-started), or unset CUDA_VISIBLE_DEVICES"
        return [*found, Finding("torch on GPU", "broken", f"torch sees {len(asked['devices'])} of {len(gpus)}", fix)]
    return [*found, Finding("NCCL", "ok", asked["nccl"]), _kernels(asked["kernels"])]


def _kernels(errors: dict[str, Any]) -> Finding:
    fix = "--set model.kernels=reference does without them"
    if "failed" in errors:
        return Finding("kernels", "note", errors["failed"], fix)
    if wrong := {name: error for name, error in errors["errors"].items() if not error <= errors["allowed"]}:
        text = ", ".join(f"{name} {error:.1e}" for name, error in wrong.items())
        return Finding("kernels", "note", f"relative errors above {errors['allowed']:.0e}: {text}", fix)
    return Finding("kernels", "ok", f"{len(errors['errors'])} agree with their specification")


# -- the file system --------------------------------------------------------------------------------------------------


def folder_findings(folder: Path, seconds: float) -> list[Finding]:
    """What a run folder needs of its file system, tried in `folder` and removed again."""
    asked = ask(["-m", "dist_cpt_launch.folder_check", str(folder.absolute())], seconds)
    where = f"folder {folder}"
    if "failed" in asked:
        return [Finding(where, "broken", asked["failed"], "choose another output_dir, or repair the mount")]
    found = [Finding(where, "ok", f"{asked['type']}, {asked['free_gb']:.1f} GB free; fsync and rename work")]
    if asked["problem"]:
        fix = "choose another output_dir: checkpoints are published by a rename"
        return [Finding(where, "broken", asked["problem"], fix)]
    if asked["locks"]:
        found.append(Finding("flock", "ok", "two starts on one host exclude each other at once"))
    else:
        found.append(Finding("flock", "note", "not supported: heartbeats tell a live attempt", "mount with -o flock"))
    speed, slow = asked["mb_per_s"], Limits().write_mb_per_s
    text = f"writes and syncs {asked['mib']} MiB at {speed:.0f} MB/s"
    fix = f"preflight refuses below {slow:g} MB/s; use a faster output_dir" if speed < slow else ""
    found.append(Finding("speed", "note" if fix else "ok", text, fix))
    skew = asked["skew_seconds"]
    if abs(skew) > Limits().skew_seconds:
        found.append(Finding("clock", "note", f"{skew:+.1f} s off the file system's", "run NTP or chrony"))
    return found


# -- services ---------------------------------------------------------------------------------------------------------


def slurm_finding(seconds: float) -> Finding:
    if shutil.which("sbatch") is None:
        return Finding("Slurm", "note", "no sbatch here: --on slurm needs a login node, --on local does not")
    version = query(["sbatch", "--version"], timeout_seconds=seconds, quiet=True)
    if version is None:
        return Finding("Slurm", "note", "sbatch does not answer", "ask the cluster's administrators")
    partitions = query(["sinfo", "--noheader", "--format=%P"], timeout_seconds=seconds, quiet=True)
    if partitions is None:
        return Finding("Slurm", "note", f"{version}, but its controller does not answer", "scontrol ping")
    return Finding("Slurm", "ok", f"{version}, partitions {', '.join(partitions.split())}")


def wandb_finding(asked: dict[str, Any]) -> Finding:
    if "failed" in asked:
        return Finding("W&B", "note", asked["failed"], "track.wandb.mode: offline asks no server")
    if not asked["installed"]:
        return Finding("W&B", "note", "not installed: runs are not tracked there", "pip install 'dist-cpt[wandb]'")
    if not asked["credentials"]:
        return Finding("W&B", "note", f"no login for {asked['server']}: runs are offline", "wandb login")
    place = urlsplit(asked["server"])
    try:
        port = place.port or (80 if place.scheme == "http" else 443)
        socket.create_connection((place.hostname or "", port), CONNECT_SECONDS).close()
    except OSError as error:
        text = f"{asked['server']} is not reached ({error.strerror or error}): runs are offline"
        return Finding("W&B", "note", text, "wandb sync uploads them later")
    return Finding("W&B", "ok", f"logged in at {asked['server']}")


def ask(arguments: Sequence[str], seconds: float) -> dict[str, Any]:
    """The JSON object that a Python process prints last; `failed` says why there is none."""
    child = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    try:
        out, err = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        with suppress(subprocess.TimeoutExpired):  # a process that waits for a dead file server cannot even be killed
            child.communicate(timeout=1.0)
        return {"failed": f"no answer within {seconds:g} s"}
    rows = [row for row in map(parse_row, out.splitlines()) if row is not None]
    if rows:
        return rows[-1]
    lines = [line for line in err.decode(errors="replace").splitlines() if line.strip()]
    return {"failed": lines[-1][:300] if lines else f"ended with code {child.returncode}"}


def show(folder: Path, *, as_json_: bool) -> bool:
    """Print every finding; whether nothing is broken."""
    findings = examine(folder)
    print(*([json.dumps(as_json(findings), indent=1)] if as_json_ else as_text(findings)), sep="\n")
    return not any(map(is_broken, findings))
