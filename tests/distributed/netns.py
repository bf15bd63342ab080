"""Two hosts on one: network namespaces with a cable between them, each with its own name and /etc/hosts."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import secrets
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.run_ranks import MODULES, RunningRanks, _rank

PORT = 29555
_NEWNS, _NEWUTS, _NEWNET = 0x00020000, 0x04000000, 0x40000000
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x40000


@dataclass(frozen=True)
class Cable:
    """Two namespaces by name; the first one's host is node-a, the second one's node-b."""

    namespaces: tuple[str, str]
    hosts: Path

    def cut(self) -> None:
        _ip("-n", self.namespaces[1], "link", "set", "cable", "down")

    def mend(self) -> None:
        _ip("-n", self.namespaces[1], "link", "set", "cable", "up")


def why_not() -> str | None:
    """What this host lacks for two namespaces, or None."""
    if shutil.which("ip") is None:
        return "no `ip` (package iproute2)"
    name = f"cpt-{secrets.token_hex(3)}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        return f"no network namespaces here: {tried.stderr.strip()}"
    _ip("netns", "del", name)
    return None


def lay_cable(folder: Path) -> Cable:
    """Make both namespaces and connect them; `unplug` takes all of it away."""
    mark = secrets.token_hex(3)
    names = (f"cpt-{mark}-a", f"cpt-{mark}-b")
    for name in names:
        _ip("netns", "add", name)
        _ip("-n", name, "link", "set", "lo", "up")
    _ip("-n", names[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", names[1])
    for number, name in enumerate(names):
        _ip("-n", name, "address", "add", f"10.177.0.{number + 1}/30", "dev", "cable")
        _ip("-n", name, "link", "set", "cable", "up")
    hosts = folder / "hosts"
    hosts.write_text("127.0.0.1 localhost\n10.177.0.1 node-a\n10.177.0.2 node-b\n")
    return Cable(names, hosts)


def unplug(cable: Cable) -> None:
    for name in cable.namespaces:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


class RanksOnTwoHosts(RunningRanks):
    """One rank in each namespace, that meet by rank 0's host name; otherwise as RunningRanks."""

    def __init__(self, cable: Cable, recipe: Path, *, log: Path, **environment: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(MODULES))
        self.processes: list[Any] = []
        for rank, (namespace, host) in enumerate(zip(cable.namespaces, ("node-a", "node-b"), strict=True)):
            given = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
            given |= {"MASTER_ADDR": "node-a", "MASTER_PORT": str(PORT)} | environment
            arguments = (namespace, str(cable.hosts), host, ["train", str(recipe)], given, str(log))
            process = context.Process(target=_rank_there, args=arguments)
            process.start()
            self.processes.append(process)


def _rank_there(
    namespace: str, hosts: str, host: str, arguments: list[str], environment: dict[str, str], log: str
) -> None:
    _enter(namespace, hosts, host)
    _rank(arguments, environment, log, None)


def _enter(namespace: str, hosts: str, host: str) -> None:
    """Move this process, which has one thread, to the other host."""
    libc = ctypes.CDLL(None, use_errno=True)
    network = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    _done(libc.setns(network, _NEWNET))
    os.close(network)
    _done(libc.unshare(_NEWNS | _NEWUTS))
    _done(libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))
    _done(libc.mount(hosts.encode(), b"/etc/hosts", None, _MS_BIND, None))
    socket.sethostname(host)


def _done(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
