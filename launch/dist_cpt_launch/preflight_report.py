"""What the reports of several nodes say together: which of them are not fit to train, and why."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Limits:
    """What a node may be; each has its option."""

    write_mb_per_s: float = 20.0
    write_mib: int = 64
    skew_seconds: float = 5.0
    slow_factor: float = 2.0  # times slower than the median node, in products, writes or with both neighbours
    timeout_seconds: float = 120.0  # for the nodes to appear, and again for the all-reduce


@dataclass
class NodeReport:
    """What one node found out about itself."""

    node: str
    host: str
    versions: dict[str, str] = field(default_factory=dict)
    write_mb_per_s: float | None = None
    skew_seconds: float | None = None  # this host's clock against the file system's
    gpus: list[dict[str, Any]] = field(default_factory=list)
    matmul_seconds: float | None = None  # of the slowest GPU
    all_reduce_gb_per_s: float | None = None
    pairs: dict[str, float] = field(default_factory=dict)  # GB/s by neighbour
    stage: str = ""  # how far the collective part came
    cut_off: str = ""  # why this node does not reach the first one
    index: int = 0
    finished: bool = False
    problems: list[str] = field(default_factory=list)


def judge(
    reports: Mapping[str, NodeReport], num_nodes: int, limits: Limits, names: Sequence[str] = ()
) -> dict[str, Any]:
    """The verdict from all reports: pure, so that all nodes that saw the same say the same."""
    reasons: dict[str, list[str]] = {name: list(report.problems) for name, report in sorted(reports.items())}
    general: list[str] = []
    silent = sorted(set(names) - reports.keys())
    reasons |= {name: [f"did not report within {limits.timeout_seconds:g} s"] for name in silent}
    if len(reports) < num_nodes and not silent:
        general.append(f"{num_nodes - len(reports)} of {num_nodes} nodes did not report")
    for name, report in reports.items():
        if not report.finished:
            reasons[name].append("did not come to the end of the checks")
    odd, differing = _odd_versions(reports)
    general += differing
    for name, text in odd + _cut_off(reports) + _slow_nodes(reports, limits.slow_factor):
        reasons[name].append(text)
    unfinished = {name: report.stage for name, report in sorted(reports.items()) if report.stage not in ("", "done")}
    if unfinished and not any(reasons.values()):
        stages = ", ".join(f"{name}: {stage}" for name, stage in unfinished.items())
        general.append(f"the all-reduce did not end within {limits.timeout_seconds:g} s (last stage of {stages})")
    nodes = {name: {"ok": not found, "reasons": found} for name, found in reasons.items()}
    speeds = [report.all_reduce_gb_per_s for report in reports.values() if report.all_reduce_gb_per_s is not None]
    return {
        "ok": not general and all(node["ok"] for node in nodes.values()),
        "reasons": general,
        "nodes": nodes,
        "all_reduce_gb_per_s": min(speeds, default=None),
        "reports": {name: asdict(report) for name, report in sorted(reports.items())},
    }


def verdict_text(verdict: Mapping[str, Any]) -> str:
    """One line per finding, the nodes by name."""
    lines = [f"preflight: {reason}" for reason in verdict["reasons"]]
    lines += [
        f"preflight: node {name}: {reason}" for name, node in verdict["nodes"].items() for reason in node["reasons"]
    ]
    if verdict["ok"]:
        speed = verdict.get("all_reduce_gb_per_s")
        measured = "" if speed is None else f", all-reduce {speed:.2f} GB/s"
        lines.append(f"preflight: {len(verdict['nodes'])} nodes are fit{measured}")
    return "\n".join(lines)


def _cut_off(reports: Mapping[str, NodeReport]) -> list[tuple[str, str]]:
    """Nodes that do not reach the first one; if none of several does, it is the first one's own fault."""
    lost = [(name, report.cut_off) for name, report in sorted(reports.items()) if report.cut_off]
    first = next((name for name, report in reports.items() if report.index == 0), None)
    others = [found for found in lost if found[0] != first]
    if first is not None and len(others) > 1 and len(others) == len(reports) - 1:
        return [(first, f"no other node reaches it: {others[0][1]}")]
    return others or lost


def _odd_versions(reports: Mapping[str, NodeReport]) -> tuple[list[tuple[str, str]], list[str]]:
    """(nodes whose versions are not those of most nodes, differences of which nobody can say who is wrong)."""
    found, general = [], []
    for name in sorted({key for report in reports.values() for key in report.versions}):
        held = {node: report.versions.get(name, "-") for node, report in sorted(reports.items())}
        usual, count = Counter(held.values()).most_common(1)[0]
        odd = [
            (node, f"{name} {version}, the others have {usual}") for node, version in held.items() if version != usual
        ]
        if 2 * count > len(held):
            found += odd
        else:
            general.append(f"{name} differs: " + ", ".join(f"{node} {version}" for node, version in held.items()))
    return found, general


def _slow_nodes(reports: Mapping[str, NodeReport], factor: float) -> list[tuple[str, str]]:
    """Nodes much slower than the median in products, or with both of their neighbours."""
    found = []
    times = {node: report.matmul_seconds for node, report in reports.items() if report.matmul_seconds}
    if len(times) > 1:
        usual = statistics.median_low(times.values())
        found += [
            (node, f"slow: a matrix product takes {seconds:.2g} s, on the median node {usual:.2g} s")
            for node, seconds in sorted(times.items())
            if seconds > factor * usual
        ]
    best = {node: max(report.pairs.values()) for node, report in reports.items() if report.pairs}
    if len(best) > 2:  # of two nodes nobody can say which one is slow
        usual = statistics.median_high(best.values())
        found += [
            (node, f"slow network: {speed:.2g} GB/s with its best neighbour, the median node has {usual:.2g}")
            for node, speed in sorted(best.items())
            if factor * speed < usual
        ]
    return found
