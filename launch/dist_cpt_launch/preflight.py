"""Is every node fit to train, before a large model is loaded on all of them?

One process per node. Each writes its findings to `<run>/preflight/<id>/NODE.json` and reads those of all: files, since
a node that is dead or has no network cannot take part in anything else, and training needs the shared folder anyway.
The first node that has seen enough writes the report, `<run>/preflight/<id>.json`, which the others adopt:
{"ok": bool, "reasons": [...], "nodes": {NODE: {"ok": bool, "reasons": [...]}}}.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from dist_cpt.errors import EXIT_DONE, ConfigError, NodeError, WriteError
from dist_cpt.run_folder.json_files import parse_row, read_object, write_object
from dist_cpt.run_folder.names import PREFLIGHT
from dist_cpt.runtime.env import slurm_hosts
from dist_cpt.runtime.node_address import node_address
from dist_cpt_launch.command_line import run_command
from dist_cpt_launch.node_checks import check_node
from dist_cpt_launch.preflight_report import Limits, NodeReport, combine, report_text

POLL_SECONDS = 0.2
STAGES = ("started", "met", "computed", "reduced", "paired", "done")  # of the link check
DEFAULT = Limits()


@dataclass(frozen=True)
class Place:
    """This node among the others."""

    node: str
    index: int
    num_nodes: int
    master: str
    names: tuple[str, ...] = ()  # of all nodes, if known: a dead one can then be named


def preflight(
    run_folder: Path,
    identifier: str,
    place: Place,
    *,
    limits: Limits = DEFAULT,
    num_gpus: int | None = None,
    collective: bool = True,
) -> dict[str, Any]:
    """Check this node, wait for the others, and return the report that all share.

    `num_gpus` is how many this node must have, None for any number; `collective` False skips the all-reduce.

    Raises:
        WriteError: this node cannot write the folder; the other nodes report it as missing.
    """
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,128}", identifier):
        raise ConfigError(f"--id {identifier!r}: letters, digits, '.', '_' and '-' only")
    folder = run_folder / PREFLIGHT / identifier
    shared = folder.with_name(f"{identifier}.json")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if place.num_nodes == 1:  # no other node can be reading the report of an earlier check with this id
            shared.unlink(missing_ok=True)
        node, own = NodeReport(place.node, index=place.index), folder / f"{place.node}.json"
        check_node(node, folder, limits, num_gpus)
        if collective and place.num_nodes > 1:
            try:
                place = replace(place, master=node_address(place.master))
            except ConfigError as error:
                node.unresolved = str(error)
        write_object(own, asdict(node))
        if shared.exists():  # this node is late: the others have finished without it
            return read_object(shared)
        seen = _wait_for_reports(folder, place.num_nodes, limits.timeout_seconds, finished=False)
        can_meet = len(seen) == place.num_nodes and not any(other.unresolved for other in seen.values())
        if collective and can_meet and (place.num_nodes > 1 or node.gpus):
            _check_links(node, seen, place, limits, zlib.crc32(f"{identifier} {sorted(seen)}".encode()))
        node.finished = True
        write_object(own, asdict(node))
        reports = _wait_for_reports(folder, len(seen), limits.timeout_seconds + 10.0, finished=True)
        return _publish(shared, combine(reports, place.num_nodes, limits, place.names))
    except OSError as error:
        raise WriteError(f"{folder} cannot be written on {place.node}: {error.strerror}") from error


def read_node_reports(folder: Path) -> dict[str, NodeReport]:
    """The readable reports by node."""
    reports = {}
    for path in folder.glob("*.json"):
        with suppress(TypeError):
            report = NodeReport(**read_object(path))
            reports[report.node] = report
    return reports


def this_place(
    environ: Mapping[str, str],
    node: str | None = None,
    num_nodes: int | None = None,
    index: int | None = None,
    master: str | None = None,
) -> Place:
    """This node's place by srun's variables; arguments override them.

    Raises:
        ConfigError: there are several nodes, and this one's index or the first one's host is unknown.
    """
    node = node or environ.get("SLURMD_NODENAME") or socket.gethostname()
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,253}", node):
        raise ConfigError(f"node name {node!r}: letters, digits, '.', '_' and '-' only")
    hosts, names = slurm_hosts(environ), ()
    if num_nodes is None:
        num_nodes = int(environ.get("SLURM_STEP_NUM_NODES") or environ.get("SLURM_NNODES") or 1)
        names = tuple(hosts) if len(hosts) == num_nodes else ()
    if num_nodes == 1:
        return Place(node, 0, 1, master or "127.0.0.1")
    if index is None:
        if not environ.get("SLURM_NODEID"):
            raise ConfigError(f"{num_nodes} nodes, but the index of this one is unknown", remedy="give --node-index")
        index = int(environ["SLURM_NODEID"])
    master = master or environ.get("MASTER_ADDR") or next(iter(hosts), None)
    if master is None:
        raise ConfigError(f"{num_nodes} nodes, but the host of the first one is unknown", remedy="give --master HOST")
    return Place(node, index, num_nodes, master, names)


# -- the link check --------------------------------------------------------------------------------------------------


def _check_links(node: NodeReport, seen: Mapping[str, NodeReport], place: Place, limits: Limits, seed: int) -> None:
    """Run this node's part of the link check, and record how far it came."""
    ranks = max(1, min(len(other.gpus) for other in seen.values()))
    port = 20000 + seed % 20000  # two checks on the same nodes must not meet
    children = []
    for local_rank in range(ranks):
        environ = os.environ | {
            "RANK": str(place.index * ranks + local_rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(place.num_nodes * ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": place.master,
            "MASTER_PORT": str(port),
        }
        command = [sys.executable, "-m", "dist_cpt.runtime.link_check", str(0.9 * limits.timeout_seconds)]
        children.append(subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    node.stage = "done"
    deadline = time.monotonic() + limits.timeout_seconds
    if place.num_nodes > 1:
        node.cut_off = _unreachable(place.master, port, children, deadline)
    for child in children:
        try:
            out, err = child.communicate(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            out, err = child.communicate()
        _record_links(node, out, err.decode(errors="replace"), child.returncode)


def _unreachable(master: str, port: int, children: Sequence[subprocess.Popen[bytes]], deadline: float) -> str:
    """Why the first node could not be reached before the deadline or the end of the children; empty if it could."""
    problem = "no answer"
    while time.monotonic() < deadline and any(child.poll() is None for child in children):
        try:
            socket.create_connection((master, port), timeout=2.0).close()
            return ""
        except OSError as error:  # refused while its process is still starting
            problem = error.strerror or str(error)
        time.sleep(POLL_SECONDS)
    return f"{master}:{port} is unreachable ({problem})"


def _record_links(node: NodeReport, out: bytes, err: str, code: int) -> None:
    """Add the measurements that one rank of the link check printed."""
    stage = "started"
    for row in filter(None, map(parse_row, out.splitlines())):
        stage = row["stage"] if row.get("stage") in STAGES else stage
        if not row.get("matmul_right", True):
            node.problems.append(f"rank {row.get('rank')}: a matrix product is wrong: broken GPU or memory")
        node.matmul_seconds = max(node.matmul_seconds or 0.0, row.get("matmul_seconds", 0.0)) or None
        node.all_reduce_gb_per_s = row.get("all_reduce_gb_per_s", node.all_reduce_gb_per_s)
        node.pairs |= row.get("pair_gb_per_s", {})
    node.stage = min(node.stage, stage, key=STAGES.index)
    if code > 0 and stage == "started" and "could not meet" not in err:
        lines = [line for line in err.splitlines() if line.strip()]
        node.problems.append(f"the link check does not start: {lines[-1][:300] if lines else f'exit code {code}'}")


# -- files -----------------------------------------------------------------------------------------------------------


def _wait_for_reports(folder: Path, num_nodes: int, seconds: float, *, finished: bool) -> dict[str, NodeReport]:
    """The reports once `num_nodes` are there (and finished), or those that are there after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        reports = read_node_reports(folder)
        ready = [report for report in reports.values() if report.finished or not finished]
        if len(ready) >= num_nodes or time.monotonic() >= deadline:
            return reports
        time.sleep(POLL_SECONDS)


def _publish(path: Path, report: dict[str, Any]) -> dict[str, Any]:
    """Write the shared report unless another node has; the one that is there then."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        try:
            os.link(temporary, path)
        except FileExistsError:
            return read_object(path)
        except OSError:  # a file system without hard links
            os.replace(temporary, path)
        return report
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


# -- the command -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreflightOptions:
    """Is every node fit to train? Exit code 69 if one is not."""

    run_folder: Annotated[Path, typer.Option(help="On a file system that all nodes share.")]
    id: Annotated[str | None, typer.Option(help="Of this start; default: Slurm's job and restart count.")] = None
    node: Annotated[str | None, typer.Option(help="This node's name; default: Slurm's, else the host's.")] = None
    nodes: Annotated[int | None, typer.Option(min=1, help="Default: Slurm's.")] = None
    node_index: Annotated[int | None, typer.Option(min=0, help="Default: Slurm's.")] = None
    master: Annotated[str | None, typer.Option(help="The first node's host; default: Slurm's.")] = None
    gpus: Annotated[int | None, typer.Option(help="GPUs that each node must have.")] = None
    no_collective: Annotated[bool, typer.Option("--no-collective", help="Skip the all-reduce.")] = False
    write_mb_per_s: float = DEFAULT.write_mb_per_s
    write_mib: int = DEFAULT.write_mib
    skew_seconds: float = DEFAULT.skew_seconds
    slow_factor: float = DEFAULT.slow_factor
    timeout: Annotated[float, typer.Option(help="Seconds.")] = DEFAULT.timeout_seconds


def main(argv: Sequence[str]) -> int:
    """`dist-cpt preflight` and `python -m dist_cpt_launch.preflight`: 0 if the job may start, 69 if not."""
    return run_command(PreflightOptions, _run, argv, "dist-cpt preflight")


def _run(options: PreflightOptions) -> int:
    measures = options.write_mb_per_s, options.write_mib, options.skew_seconds, options.slow_factor, options.timeout
    place = this_place(os.environ, options.node, options.nodes, options.node_index, options.master)
    job = os.environ.get("SLURM_JOB_ID")
    identifier = options.id or (f"{job}.{os.environ.get('SLURM_RESTART_COUNT', '0')}" if job else "alone")
    collective = not options.no_collective
    limits = Limits(*measures)
    report = preflight(
        options.run_folder, identifier, place, limits=limits, num_gpus=options.gpus, collective=collective
    )
    if report["ok"]:
        if place.index == 0:
            print(report_text(report), flush=True)
        return EXIT_DONE
    if place.index == 0 or not report["nodes"].get(place.node, {"ok": False})["ok"]:
        print(report_text(report), file=sys.stderr, flush=True)
    raise NodeError(f"{place.node}: not every node of this job is fit to train, see {PREFLIGHT}/{identifier}.json")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
