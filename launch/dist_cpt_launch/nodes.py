"""Slurm's lists of hosts, and how many of the nodes of a job a recipe can use."""

from __future__ import annotations

import re

from dist_cpt.config.resolve import step_shape
from dist_cpt.config.schema import RunConfig
from dist_cpt.errors import ConfigError


def expand_hosts(text: str) -> list[str]:
    """`gpu[003-005,9],login1` -> gpu003, gpu004, gpu005, gpu9, login1.

    Raises:
        ConfigError: this is no host list.
    """
    items = re.findall(r"(?:[^,\[\]]|\[[0-9,-]+\])+", text)
    hosts = [host for item in items for host in _expand(item)]
    if ",".join(items) != text or not hosts or not all(re.fullmatch(r"[A-Za-z0-9._-]+", host) for host in hosts):
        raise ConfigError(f"{text!r} is no list of Slurm nodes")
    return hosts


def _expand(item: str) -> list[str]:
    match = re.search(r"\[([0-9,-]+)\]", item)
    if match is None:
        return [item]
    numbers: list[str] = []
    for part in match[1].split(","):
        first, _, last = part.partition("-")
        numbers += [f"{number:0{len(first)}d}" for number in range(int(first), int(last or first) + 1)]
    head, tail = item[: match.start()], item[match.end() :]
    return [done for number in numbers for done in _expand(head + number + tail)]


def usable_nodes(config: RunConfig, nodes: int, procs_per_node: int) -> int:
    """The largest number of nodes up to `nodes` whose ranks divide the recipe's global batch.

    Raises:
        ConfigError: not even one node does.
    """
    if config.engine.kind == "single" and procs_per_node > 1:
        raise ConfigError(
            f"engine.kind: single runs on one rank, not on {procs_per_node}",
            remedy="use engine.kind: fsdp, zero or auto, or --procs-per-node 1",
        )
    most = 1 if config.engine.kind == "single" else nodes
    for count in range(most, 0, -1):
        try:
            step_shape(config, count * procs_per_node)
        except ConfigError:
            if count == 1:
                raise
            continue
        return count
    raise ConfigError(f"{nodes} nodes: at least 1 is needed")
