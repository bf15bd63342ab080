"""Under which name or address rank 0's node is reached, by what `scontrol show node` says of it."""

from __future__ import annotations

import os
import socket

import pytest

from dist_cpt.errors import ConfigError
from dist_cpt.runtime.env import ProcessEnv
from dist_cpt.runtime.node_address import interface_towards, node_address, slurm_names, with_address

NODE = (  # Slurm 22.05 --oneliner, shortened
    "NodeName=gpu-07 Arch=x86_64 CoresPerSocket=4 CPUAlloc=0 CPUTot=4 CPULoad=1.48 AvailableFeatures=(null) "
    "Gres=gpu:fake:2 {} Port=21001 Version=22.05.8 OS=Linux 4.4.0 #1 SMP Sun Jan 10 15:06:54 PST 2016  "
    "RealMemory=4000 State=IDLE ThreadsPerCore=1 Partitions=low,high  Reason=was NodeAddr=9.9.9.9 [root@2026-11-30]"
)


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """Says what scontrol prints; the command stands in PATH."""

    def says(text: str, code: int = 0) -> None:
        (tmp_path / "text").write_text(text + "\n")
        tool = tmp_path / "scontrol"
        tool.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/calls; cat {tmp_path}/text; exit {code}\n')
        tool.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return says


def test_a_name_that_resolves_is_kept_and_slurm_not_asked(scontrol, tmp_path):
    scontrol(NODE.format("NodeAddr=10.1.2.3 NodeHostName=gpu-07"))
    assert node_address("localhost") == "localhost"
    assert node_address("10.0.0.7") == "10.0.0.7"
    assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize(
    ("fields", "address"),
    [
        ("NodeAddr=10.1.2.3 NodeHostName=gpu-07.invalid", "10.1.2.3"),
        ("NodeAddr=fd00::17 NodeHostName=gpu-07.invalid", "fd00::17"),
        ("NodeAddr=gpu-07.invalid NodeHostName=localhost", "localhost"),
    ],
)
def test_slurm_says_where_a_name_that_resolves_nowhere_is(scontrol, tmp_path, fields, address):
    scontrol(NODE.format(fields))
    assert node_address("gpu-07.invalid") == address
    assert (tmp_path / "calls").read_text() == "--oneliner show node gpu-07.invalid\n"
    env = ProcessEnv(0, 0, 2, 1, "srun", ("gpu-07.invalid", 20007))
    assert with_address(env).master == (address, 20007)
    assert with_address(ProcessEnv(0, 0, 2, 1, "torchrun", ("gpu-07.invalid", 20007))).master[0] == "gpu-07.invalid"


@pytest.mark.parametrize(
    ("text", "code"),
    [(NODE.format("NodeAddr=gpu-07.invalid NodeHostName=gpu-07.invalid"), 0), ("Node gpu-07 not found", 1), ("", 0)],
)
def test_where_nobody_knows_the_site_is_told_what_to_set(scontrol, text, code):
    scontrol(text, code)
    with pytest.raises(ConfigError, match=r"gpu-07\.invalid.*NodeAddr=.*MASTER_ADDR="):
        node_address("gpu-07.invalid", retry_seconds=60.0)  # an authoritative no is not asked again


def test_a_name_server_that_does_not_answer_is_asked_again(scontrol, monkeypatch):
    scontrol("")
    errors = [socket.EAI_AGAIN, socket.EAI_AGAIN]

    def getaddrinfo(*_):
        if errors:
            raise socket.gaierror(errors.pop(), "Temporary failure in name resolution")

    monkeypatch.setattr("dist_cpt.runtime.node_address.socket.getaddrinfo", getaddrinfo)
    monkeypatch.setattr("dist_cpt.runtime.node_address.time.sleep", lambda _: None)
    assert node_address("gpu-07") == "gpu-07"
    errors[:] = [socket.EAI_AGAIN] * 9
    with pytest.raises(ConfigError, match="gpu-07"):
        node_address("gpu-07", retry_seconds=0.0)


def test_without_slurms_commands_nothing_is_known(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm_names("gpu-07") == []


@pytest.mark.parametrize(("own", "rank_zero"), [("127.0.1.1", "127.0.0.1"), ("10.1.2.3", "10.1.2.4")])
def test_gloo_finds_its_interface_by_itself_on_one_host_and_by_a_good_name(monkeypatch, own, rank_zero):
    monkeypatch.setattr("dist_cpt.runtime.node_address.socket.gethostbyname", lambda _: own)
    assert interface_towards(rank_zero) is None
