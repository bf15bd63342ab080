"""The name or address under which this host reaches a node of its Slurm job. Torch-free."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import re
import socket
import struct
import subprocess
import time
from dataclasses import replace

from dist_cpt.errors import ConfigError
from dist_cpt.runtime.env import ProcessEnv

SCONTROL_SECONDS = 30.0
RETRY_SECONDS = 30.0  # for a name server that does not answer
_SIOCGIFADDR = 0x8915  # Source: netdevice(7)


def with_address(env: ProcessEnv) -> ProcessEnv:
    """`env`, under srun with rank 0's host as this host resolves it; other launchers give an address of their own.

    Raises:
        ConfigError: it does not resolve.
    """
    if env.launcher != "srun" or env.master is None:
        return env
    return replace(env, master=(node_address(env.master[0]), env.master[1]))


def node_address(node: str, retry_seconds: float = RETRY_SECONDS) -> str:
    """`node` if it resolves on this host, else the first of Slurm's NodeAddr and NodeHostName of it that does.

    Raises:
        ConfigError: none of them resolves.
    """
    deadline = time.monotonic() + retry_seconds
    if _lookup_error(node) is None:
        return node
    names = [node, *slurm_names(node)]
    while True:
        errors = {name: _lookup_error(name) for name in names}
        for name, error in errors.items():
            if error is None:
                return name
        if time.monotonic() >= deadline or socket.EAI_AGAIN not in errors.values():
            break
        time.sleep(1.0)
    raise ConfigError(
        f"{socket.gethostname()} cannot resolve the first node, as {' or '.join(errors)}",
        remedy="the site must set NodeAddr=ADDRESS in slurm.conf or the names in DNS; or export MASTER_ADDR=ADDRESS",
    )


def interface_towards(host: str) -> str | None:
    """The network interface that leads to `host`; None if it is loopback, or if this host's own name says as much.

    gloo binds to the address of that name, hence to loopback where the name does not resolve or Debian's 127.0.1.1.
    """
    with contextlib.suppress(OSError):
        if not ipaddress.ip_address(socket.gethostbyname(socket.gethostname())).is_loopback:
            return None
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing
        own = socket.inet_aton(probe.getsockname()[0])
        if ipaddress.ip_address(own).is_loopback:
            return None
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                if fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))[20:24] == own:
                    return name
    return None


def slurm_names(node: str) -> list[str]:
    """NodeAddr and NodeHostName of a node by scontrol; empty if it does not say. Source: scontrol(1), slurm.conf(5)."""
    command = ["scontrol", "--oneliner", "show", "node", node]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=SCONTROL_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = [re.search(rf"\s{key}=(\S+)", done.stdout) for key in ("NodeAddr", "NodeHostName")]
    return [match[1] for match in found if match]


def _lookup_error(name: str) -> int | None:
    """The resolver's error for a name or address, None if it resolves."""
    try:
        socket.getaddrinfo(name, None)
    except socket.gaierror as error:
        return error.errno
    except UnicodeError:  # a label that no host name can have
        return socket.EAI_NONAME
    return None
