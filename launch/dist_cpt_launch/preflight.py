"""Is every node fit to train, before a large model is loaded on all of them?

One process per node. Each writes what it found into `<run>/preflight/<id>/NODE.json`; all read all. Files, since a
node that is dead or has no network cannot take part in anything else, and training needs the shared folder anyway.
The first to have seen enough writes the verdict, `<run>/preflight/<id>.json`, and the others follow it:
{"ok": bool, "reasons": [...], "nodes": {NODE: {"ok": bool, "reasons": [...]}}}.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_cpt.errors import EXIT_DONE, ConfigError, DistCptError, NodeError, WriteError
from dist_cpt.runtime.env import first_host
from dist_cpt_launch.nodes import expand_hosts
from dist_cpt_launch.preflight_report import Limits, NodeReport, judge, verdict_text

PACKAGES = ("dist-cpt", "torch", "transformers", "peft", "deepspeed", "bitsandbytes", "triton", "safetensors")
POLL_SECONDS = 0.2
STAGES = ("started", "met", "computed", "reduced", "paired", "done")  # of the link check
GPU_FIELDS = "index,name,driver_version,memory.total,memory.used,ecc.errors.uncorrected.volatile.total"
BUSY_FRACTION = 0.05  # of a GPU's memory; the driver itself takes less


@dataclass(frozen=True)
class Place:
    """This node among the others."""

    node: str
    index: int
    num_nodes: int
    master: str
    names: tuple[str, ...] = ()  # of all nodes, where known: a dead one can then be named


def preflight(
    run_folder: Path,
    identifier: str,
    place: Place,
    *,
    limits: Limits | None = None,
    gpus: int | None = None,
    collective: bool = True,
) -> dict[str, Any]:
    """Check this node, wait for the others, and return the verdict that all share.

    `gpus` is how many this node must have; None takes what there is. `collective` False leaves the all-reduce out.

    Raises:
        WriteError: this node cannot write there; the other nodes find it missing.
    """
    limits = limits or Limits()
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,128}", identifier):
        raise ConfigError(f"--id {identifier!r}: letters, digits, '.', '_' and '-' only")
    folder = run_folder / "preflight" / identifier
    verdict = folder.with_name(f"{identifier}.json")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if place.num_nodes == 1:  # nobody else can be reading what an earlier check of this name has left
            verdict.unlink(missing_ok=True)
        report = examine(folder, place, limits, gpus)
        write_report(folder, report)
        if verdict.exists():  # this node is late: the others have decided without it
            return json.loads(verdict.read_text(encoding="utf-8"))
        seen = _wait(folder, place.num_nodes, limits.timeout_seconds, finished=False)
        something = place.num_nodes > 1 or report.gpus
        if collective and something and len(seen) == place.num_nodes:
            _measure_together(report, seen, place, limits, zlib.crc32(f"{identifier} {sorted(seen)}".encode()))
        report.finished = True
        write_report(folder, report)
        reports = _wait(folder, len(seen), limits.timeout_seconds, finished=True)
    except OSError as error:
        raise WriteError(f"{folder} cannot be written on {place.node}: {error.strerror}") from error
    return _publish(verdict, judge(reports, place.num_nodes, limits, place.names))


def examine(folder: Path, place: Place, limits: Limits, gpus: int | None) -> NodeReport:
    """What this node can say without the others."""
    report = NodeReport(place.node, socket.gethostname(), versions(), index=place.index)
    report.write_mb_per_s, report.skew_seconds = write_speed(folder, limits.write_mib)
    if report.write_mb_per_s < limits.write_mb_per_s:
        report.problems.append(
            f"writes {report.write_mb_per_s:.1f} MB/s into {folder.parent}, {limits.write_mb_per_s:g} are needed"
        )
    if abs(report.skew_seconds) > limits.skew_seconds:
        report.problems.append(f"its clock is {report.skew_seconds:+.1f} s off the file system's")
    report.gpus, problems = gpu_state()
    report.problems += problems
    if gpus is not None and len(report.gpus) != gpus:
        report.problems.append(f"{len(report.gpus)} GPUs visible, {gpus} expected")
    return report


def versions() -> dict[str, str]:
    """Package versions by name, and Python's; '-' for what is not installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "-"
    return found


def write_speed(folder: Path, mib: int) -> tuple[float, float]:
    """(MB/s of writing and syncing `mib` MiB, seconds that this host's clock is ahead of the file system's).

    Raises:
        OSError: the folder does not take the file.
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
    """The GPUs of this host by nvidia-smi, and what is wrong with them; none without the tool and the devices."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        devices = list(Path("/dev").glob("nvidia[0-9]*"))
        return [], [f"{len(devices)} GPU devices but no nvidia-smi"] if devices else []
    try:
        done = subprocess.run(
            [tool, f"--query-gpu={GPU_FIELDS}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return [], ["nvidia-smi does not answer"]
    if done.returncode != 0:
        said = (done.stdout + done.stderr).strip().splitlines()
        return [], [f"nvidia-smi fails: {said[0] if said else f'exit code {done.returncode}'}"]
    return read_gpus(done.stdout, os.environ.get("CUDA_VISIBLE_DEVICES"))


def read_gpus(table: str, visible: str | None) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of nvidia-smi for the GPUs that this job sees, and their problems."""
    wanted = None if visible is None or not re.fullmatch(r"[0-9,]*", visible) else set(visible.split(","))
    gpus, problems = [], []
    for line in table.strip().splitlines():
        index, name, driver, total, used, errors = ([part.strip() for part in line.split(",")] + [""] * 6)[:6]
        if wanted is not None and index not in wanted:
            continue
        total_mib, used_mib, bad = _number(total), _number(used), _number(errors)
        gpus.append({"index": index, "name": name, "driver": driver, "memory_mib": total_mib, "used_mib": used_mib})
        if total_mib is None:
            problems.append(f"GPU {index} is not readable ({line.strip()})")
        elif used_mib is not None and used_mib > BUSY_FRACTION * total_mib:
            problems.append(f"GPU {index}: {used_mib:.0f} of {total_mib:.0f} MiB are in use by another process")
        if bad:
            problems.append(f"GPU {index}: {bad:.0f} uncorrected ECC errors")
    return gpus, problems


def write_report(folder: Path, report: NodeReport) -> None:
    """Replace this node's file."""
    _write_json(folder / f"{report.node}.json", asdict(report))


def read_reports(folder: Path) -> dict[str, NodeReport]:
    """Every node's report that is whole."""
    found = {}
    for path in folder.glob("*.json"):
        with suppress(OSError, ValueError, TypeError):
            report = NodeReport(**json.loads(path.read_text(encoding="utf-8")))
            found[report.node] = report
    return found


def this_place(
    environ: Mapping[str, str],
    node: str | None = None,
    nodes: int | None = None,
    index: int | None = None,
    master: str | None = None,
) -> Place:
    """This node by srun's variables, or as told.

    Raises:
        ConfigError: several nodes, and nothing says which one this is or where they meet.
    """
    node = node or environ.get("SLURMD_NODENAME") or socket.gethostname()
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,253}", node):
        raise ConfigError(f"node name {node!r}: letters, digits, '.', '_' and '-' only")
    names: tuple[str, ...] = ()
    if nodes is None:
        nodes = int(environ.get("SLURM_STEP_NUM_NODES") or environ.get("SLURM_NNODES") or 1)
        names = _node_names(environ)
    if nodes == 1:
        return Place(node, 0, 1, master or "127.0.0.1")
    if index is None:
        if not environ.get("SLURM_NODEID"):
            raise ConfigError(f"{nodes} nodes, but nothing says which one this is", remedy="give --node-index")
        index = int(environ["SLURM_NODEID"])
    master = master or environ.get("MASTER_ADDR")
    if master is None and not (environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")):
        raise ConfigError(f"{nodes} nodes, but nothing says where they meet", remedy="give --master HOST")
    return Place(node, index, nodes, master or first_host(environ), names if len(names) == nodes else ())


def _node_names(environ: Mapping[str, str]) -> tuple[str, ...]:
    """All nodes of this step; none where Slurm does not say."""
    listed = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    return tuple(expand_hosts(listed)) if listed else ()


def main(argv: Sequence[str]) -> int:
    """`python -m dist_cpt_launch.preflight`: 0 if the job may start, 69 if a node must not take part."""
    limits = Limits()
    parser = argparse.ArgumentParser(prog="dist-cpt preflight", description="Is every node fit to train?")
    parser.add_argument("--run-folder", type=Path, required=True)
    parser.add_argument("--id", default=None, help="of this start; default: Slurm's job and restart count")
    parser.add_argument("--node", default=None, help="this node's name; default: Slurm's, else the host's")
    parser.add_argument("--nodes", type=int, default=None, help="default: Slurm's")
    parser.add_argument("--node-index", type=int, default=None, help="default: Slurm's")
    parser.add_argument("--master", default=None, help="the first node's host; default: Slurm's")
    parser.add_argument("--gpus", type=int, default=None, help="GPUs that each node must show")
    parser.add_argument("--no-collective", action="store_true", help="leave out the all-reduce")
    parser.add_argument("--write-mb-per-s", type=float, default=limits.write_mb_per_s)
    parser.add_argument("--write-mib", type=int, default=limits.write_mib)
    parser.add_argument("--skew-seconds", type=float, default=limits.skew_seconds)
    parser.add_argument("--slow-factor", type=float, default=limits.slow_factor)
    parser.add_argument("--timeout", type=float, default=limits.timeout_seconds)
    asked = parser.parse_args(list(argv))
    limits = Limits(asked.write_mb_per_s, asked.write_mib, asked.skew_seconds, asked.slow_factor, asked.timeout)
    try:
        place = this_place(os.environ, asked.node, asked.nodes, asked.node_index, asked.master)
        identifier = asked.id or default_id(os.environ)
        collective = not asked.no_collective
        verdict = preflight(asked.run_folder, identifier, place, limits=limits, gpus=asked.gpus, collective=collective)
        if not verdict["ok"]:
            if place.index == 0 or not verdict["nodes"].get(place.node, {"ok": False})["ok"]:
                print(verdict_text(verdict), file=sys.stderr, flush=True)
            raise NodeError(f"{place.node}: the nodes of this job are not all fit, see preflight/{identifier}.json")
        if place.index == 0:
            print(verdict_text(verdict), flush=True)
    except DistCptError as error:
        print(f"dist-cpt: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return EXIT_DONE


def default_id(environ: Mapping[str, str]) -> str:
    """`JOB.RESTARTS` under Slurm, else `alone`."""
    job = environ.get("SLURM_JOB_ID")
    return f"{job}.{environ.get('SLURM_RESTART_COUNT', '0')}" if job else "alone"


# -- together --------------------------------------------------------------------------------------------------------


def _measure_together(
    report: NodeReport, seen: Mapping[str, NodeReport], place: Place, limits: Limits, seed: int
) -> None:
    """Start this node's part of the link check, and take down how far it came."""
    each = max(1, min(len(other.gpus) for other in seen.values()))
    port = 20000 + seed % 20000  # two checks on the same nodes must not meet each other
    children = []
    for local in range(each):
        environ = os.environ | {
            "RANK": str(place.index * each + local),
            "LOCAL_RANK": str(local),
            "WORLD_SIZE": str(place.num_nodes * each),
            "LOCAL_WORLD_SIZE": str(each),
            "MASTER_ADDR": place.master,
            "MASTER_PORT": str(port),
        }
        command = [sys.executable, "-m", "dist_cpt.runtime.link_check", str(0.9 * limits.timeout_seconds)]
        children.append(subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    report.stage = "done"
    deadline = time.monotonic() + limits.timeout_seconds
    if place.num_nodes > 1:
        report.cut_off = _not_reached(place.master, port, children, deadline)
    for child in children:
        try:
            out, err = child.communicate(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            out, err = child.communicate()
        _take_down(report, out.decode(errors="replace"), err.decode(errors="replace"), child.returncode)


def _not_reached(master: str, port: int, children: Sequence[subprocess.Popen[bytes]], deadline: float) -> str:
    """Why the first node could not be reached until the time or the children were over; empty if it could."""
    why = "no answer"
    while time.monotonic() < deadline and any(child.poll() is None for child in children):
        try:
            socket.create_connection((master, port), timeout=2.0).close()
            return ""
        except OSError as error:  # refused: its process has not come so far yet
            why = error.strerror or str(error)
        time.sleep(POLL_SECONDS)
    return f"{master}:{port} cannot be reached ({why})"


def _take_down(report: NodeReport, out: str, err: str, code: int) -> None:
    stage = "started"
    for line in out.splitlines():
        try:
            said = json.loads(line)
        except ValueError:
            continue
        stage = said["stage"] if said.get("stage") in STAGES else stage
        if not said.get("matmul_right", True):
            report.problems.append(f"rank {said.get('rank')}: a matrix product is wrong: broken GPU or memory")
        report.matmul_seconds = max(report.matmul_seconds or 0.0, said.get("matmul_seconds", 0.0)) or None
        report.all_reduce_gb_per_s = said.get("all_reduce_gb_per_s", report.all_reduce_gb_per_s)
        report.pairs |= said.get("pair_gb_per_s", {})
    report.stage = min(report.stage, stage, key=STAGES.index)
    if code > 0 and stage == "started" and "could not meet" not in err:
        lines = [line for line in err.splitlines() if line.strip()]
        report.problems.append(f"the link check does not start: {lines[-1][:300] if lines else f'exit code {code}'}")


# -- files -----------------------------------------------------------------------------------------------------------


def _wait(folder: Path, num_nodes: int, seconds: float, *, finished: bool) -> dict[str, NodeReport]:
    """The reports once `num_nodes` are there (and finished), or those that are when the time is over."""
    deadline = time.monotonic() + seconds + (10.0 if finished else 0.0)  # the others' all-reduce has the same limit
    while True:
        reports = read_reports(folder)
        there = [report for report in reports.values() if report.finished or not finished]
        if len(there) >= num_nodes or time.monotonic() >= deadline:
            return reports
        time.sleep(POLL_SECONDS)


def _publish(path: Path, verdict: dict[str, Any]) -> dict[str, Any]:
    """Write the verdict unless another node has; the one that stands."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        temporary.write_text(json.dumps(verdict, indent=1) + "\n", encoding="utf-8")
        try:
            os.link(temporary, path)
        except FileExistsError:
            return json.loads(path.read_text(encoding="utf-8"))
        except OSError:  # a file system without hard links
            os.replace(temporary, path)
        return verdict
    except OSError as error:
        raise WriteError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # [N/A], or an error in words
        return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
