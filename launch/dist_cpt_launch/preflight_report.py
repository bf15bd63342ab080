"""The reports of all nodes combined: which nodes are unfit to train, and why."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Limits:
    """Limits of a fit node; each has its option."""

    write_mb_per_s: float = 20.0
    write_mib: int = 64
    skew_seconds: float = 5.0
    slow_factor: float = 2.0  # times slower than the median node, in matrix products or with both neighbours
    timeout_seconds: float = 120.0  # for all nodes to report, and again for the all-reduce


@dataclass
class NodeReport:
    """One node's findings about itself."""

    node: str
    host: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    write_mb_per_s: float | None = None
    skew_seconds: float | None = None  # this host's clock minus the file system's
    gpus: list[dict[str, Any]] = field(default_factory=list)
    matmul_seconds: float | None = None  # of the slowest GPU
    all_reduce_gb_per_s: float | None = None
    pairs: dict[str, float] = field(default_factory=dict)  # GB/s by neighbour
    stage: str = ""  # the last stage of the link check
    unresolved: str = ""  # why the first node has no name or address that this one resolves
    cut_off: str = ""  # why this node cannot reach the first one
    index: int = 0
    finished: bool = False
    problems: list[str] = field(default_factory=list)


Problems = list[tuple[str, str]]  # (node, reason)


def combine(
    reports: Mapping[str, NodeReport], num_nodes: int, limits: Limits, names: Sequence[str] = ()
) -> dict[str, Any]:
    """The shared report; a pure function, so that nodes with the same input agree."""
    reasons: dict[str, list[str]] = {name: list(report.problems) for name, report in sorted(reports.items())}
    general: list[str] = []
    missing = sorted(set(names) - reports.keys())
    reasons |= {name: [f"did not report within {limits.timeout_seconds:g} s"] for name in missing}
    if len(reports) < num_nodes and not missing:
        general.append(f"{num_nodes - len(reports)} of {num_nodes} nodes did not report")
    unfinished = [(name, "did not finish its checks") for name, report in reports.items() if not report.finished]
    odd_versions, differing = _odd_versions(reports)
    unresolved, nowhere = _unresolved(reports)
    general += differing + nowhere
    slow = _slow_nodes(reports, limits.slow_factor)
    for name, reason in [*unfinished, *odd_versions, *unresolved, *_cut_off(reports), *slow]:
        reasons[name].append(reason)
    stages = [f"{name}: {one.stage}" for name, one in sorted(reports.items()) if one.stage not in ("", "done")]
    if stages and not any(reasons.values()):
        last = ", ".join(stages)
        general.append(f"the all-reduce did not finish within {limits.timeout_seconds:g} s (last stage of {last})")
    speeds = [report.all_reduce_gb_per_s for report in reports.values() if report.all_reduce_gb_per_s is not None]
    return {
        "ok": not general and not any(reasons.values()),
        "reasons": general,
        "nodes": {name: {"ok": not failures, "reasons": failures} for name, failures in reasons.items()},
        "all_reduce_gb_per_s": min(speeds, default=None),
        "reports": {name: asdict(report) for name, report in sorted(reports.items())},
    }


def report_text(report: Mapping[str, Any]) -> str:
    """One line per problem."""
    lines = [f"preflight: {reason}" for reason in report["reasons"]]
    lines += [
        f"preflight: node {name}: {reason}" for name, node in report["nodes"].items() for reason in node["reasons"]
    ]
    if report["ok"]:
        speed = report.get("all_reduce_gb_per_s")
        measured = "" if speed is None else f", all-reduce {speed:.2f} GB/s"
        lines.append(f"preflight: {len(report['nodes'])} nodes are fit{measured}")
    return "\n".join(lines)


def _unresolved(reports: Mapping[str, NodeReport]) -> tuple[Problems, list[str]]:
    """(nodes that cannot resolve the first one though others can, why none can: that is the site's to mend)."""
    failed = [(name, report.unresolved) for name, report in sorted(reports.items()) if report.unresolved]
    resolve = any(not report.unresolved for report in reports.values() if report.index != 0)
    return (failed, []) if resolve or not failed else ([], [failed[0][1]])


def _cut_off(reports: Mapping[str, NodeReport]) -> Problems:
    """Nodes that cannot reach the first one; if none of several can, the first one is at fault."""
    cut_off = [(name, report.cut_off) for name, report in sorted(reports.items()) if report.cut_off]
    first = next((name for name, report in reports.items() if report.index == 0), None)
    others = [(name, reason) for name, reason in cut_off if name != first]
    if first is not None and len(others) > 1 and len(others) == len(reports) - 1:
        return [(first, f"no other node can reach it: {others[0][1]}")]
    return others or cut_off


def _odd_versions(reports: Mapping[str, NodeReport]) -> tuple[Problems, list[str]]:
    """(nodes whose versions differ from the majority's, differences without a majority)."""
    odd, general = [], []
    for package in sorted({name for report in reports.values() for name in report.versions}):
        versions = {node: report.versions.get(package, "-") for node, report in sorted(reports.items())}
        usual, count = Counter(versions.values()).most_common(1)[0]
        if 2 * count > len(versions):
            others = [(node, version) for node, version in versions.items() if version != usual]
            odd += [(node, f"{package} {version}, the other nodes have {usual}") for node, version in others]
        else:
            general.append(f"{package} differs: " + ", ".join(f"{node} {one}" for node, one in versions.items()))
    return odd, general


def _slow_nodes(reports: Mapping[str, NodeReport], factor: float) -> Problems:
    """Nodes much slower than the median in matrix products, or with both of their neighbours."""
    slow: Problems = []
    seconds = {node: report.matmul_seconds for node, report in sorted(reports.items()) if report.matmul_seconds}
    if len(seconds) > 1:
        usual = statistics.median_low(seconds.values())
        slowest = [(node, value) for node, value in seconds.items() if value > factor * usual]
        slow += [(node, f"slow: {value:.2g} s per matrix product, median {usual:.2g} s") for node, value in slowest]
    best = {node: max(report.pairs.values()) for node, report in sorted(reports.items()) if report.pairs}
    if len(best) > 2:  # of two nodes, either could be the slow one
        usual = statistics.median_high(best.values())
        slowest = [(node, speed) for node, speed in best.items() if factor * speed < usual]
        text = f"GB/s with its best neighbour, median {usual:.2g}"
        slow += [(node, f"slow network: {speed:.2g} {text}") for node, speed in slowest]
    return slow
