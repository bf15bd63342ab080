"""What the model of a step assumes of a device: rates that real kernels reach on it, not those of its data sheet."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace

from dist_cpt.errors import ConfigError


@dataclass(frozen=True)
class Device:
    """Rates in FLOP/s and bytes/s of one device, sustained in bf16; `source` says where they are from."""

    name: str
    memory_bytes: int
    peak: float  # of the data sheet, dense: what MFU is measured against
    gemm: float
    attention_forward: float  # FlashAttention 2, causal FLOPs
    attention_backward: float
    copy: float  # bytes read and written
    link: float  # bytes to other devices of the node, each way
    host: float  # bytes to host memory, each way
    source: str
    e4m3: float = 1.6  # the rate of e4m3 products by that of bf16 ones, of 2 on the data sheet; 0: there are none


@dataclass(frozen=True)
class Machine:
    """Nodes with equal devices; `network` is bytes/s of one device to other nodes, each way."""

    device: Device
    nodes: int
    node_devices: int
    network: float
    host_bytes: int | None = None  # memory of a node's host; None: not known, 0: it is the devices' own

    @property
    def ranks(self) -> int:
        return self.nodes * self.node_devices


# Fractions of the H100's data sheet that it is assumed to reach, and that others are scaled by.
_GEMM, _COPY, _LINK, _PCIE = 690 / 989, 3.0 / 3.35, 0.82, 0.8  # of PCIe: 51 of 64 GB/s
_FORWARD, _BACKWARD = 345 / 690, 285 / 690


def _scaled(name: str, memory: float, peak: float, bandwidth: float, link: float, pcie: float, why: str = "") -> Device:
    gemm = peak * _GEMM
    source = f"data sheet x the fractions that the H100 is assumed to reach{why}"
    rates = (gemm, gemm * _FORWARD, gemm * _BACKWARD, bandwidth * _COPY, link * _LINK, pcie * _PCIE)
    return Device(name, int(memory), peak, *rates, source)


_HOPPER = "assumed from published kernels: 70 % of peak for large GEMMs, FlashAttention 2 at head_dim 128, 90 % of HBM"
DEVICES = {
    "h100": Device("H100 SXM 80 GB", 80 * 10**9, 989e12, 690e12, 345e12, 285e12, 3.0e12, 370e9, 51e9, _HOPPER),
    "h200": Device("H200 SXM 141 GB", 141 * 10**9, 989e12, 690e12, 345e12, 285e12, 4.3e12, 370e9, 51e9, _HOPPER),
    "b200": _scaled("B200 180 GB", 180e9, 2250e12, 8.0e12, 900e9, 64e9),
    "a100": replace(_scaled("A100 SXM 80 GB", 80e9, 312e12, 2.04e12, 300e9, 32e9), e4m3=0.0),
    "l40s": _scaled("L40S 48 GB", 48e9, 362e12, 0.864e12, 32e9, 32e9, "; PCIe 4 between devices"),
}
CPU = "CPU"  # its name as a device
_CPU_CORE = 5e10  # FLOP/s in fp32, and in bf16 where it has instructions for it
_CPU_COPY = 1e10
NETWORK = 50e9  # bytes/s of one GPU to other nodes, where nothing is said


def machine_of(gpu: str, nodes: int, gpus: int | None, network: str) -> Machine:
    """The machine of `--gpu`, `--nodes`, `--gpus` on each (default 8, of cpu 1) and `--network`, such as 50GBps.

    Raises:
        ConfigError: an unknown device, or no rate.
    """
    if gpu != "cpu" and gpu not in DEVICES:
        raise ConfigError(f"--gpu {gpu}: use {', '.join(DEVICES)} or cpu")
    rate = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GBps|GB/s|Gbps|Gb/s)", network)
    if rate is None or not float(rate[1]):
        raise ConfigError(f"--network {network}: give bytes or bits per second, such as 50GBps or 400Gbps")
    bytes_per_second = float(rate[1]) * 1e9 / (8 if "b" in rate[2] else 1)
    device = _this_cpu() if gpu == "cpu" else DEVICES[gpu]
    devices, host = (gpus or 1, 0) if gpu == "cpu" else (gpus or 8, None)
    return Machine(device, nodes, devices, bytes_per_second, host)


def machine_here(gpu: str | None, gpu_bytes: int, ranks: int, node_ranks: int) -> Machine:
    """The machine of a running job: rates by the name of its GPU, else those of an H100; the memory is its own.

    `gpu` is None without one: the ranks of a host then share its memory.
    """
    nodes = -(-ranks // node_ranks)
    if gpu is None:
        cpu = _this_cpu()
        device = replace(cpu, memory_bytes=cpu.memory_bytes // node_ranks)
        return Machine(device, nodes, min(ranks, node_ranks), _CPU_COPY, host_bytes=0)
    device = replace(known_device(gpu) or DEVICES["h100"], name=gpu, memory_bytes=gpu_bytes)
    return Machine(device, nodes, min(ranks, node_ranks), NETWORK, _host_memory())


def known_device(gpu: str) -> Device | None:
    """The device that a driver's name of a GPU stands for; None: not in the table."""
    return next((device for key, device in DEVICES.items() if key in gpu.lower().replace(" ", "")), None)


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _this_cpu() -> Device:
    memory = _host_memory()
    gemm = _CPU_CORE * (os.cpu_count() or 1)
    source = "a guess of 50 GFLOP/s per core; the memory is this machine's"
    return Device(CPU, memory, gemm, gemm, gemm / 4, gemm / 4, _CPU_COPY, _CPU_COPY, _CPU_COPY, source, e4m3=0.25)
