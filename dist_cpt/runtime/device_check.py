"""torch, its devices, NCCL and the kernels on this machine: `python -m dist_cpt.runtime.device_check`.

It runs as a separate process, because a broken driver can hang or kill the process that loads it, and prints one JSON
object.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.cuda.nccl

SHAPE = {"dim": 256, "ffn": 512, "heads": 4, "kv_heads": 2, "head_dim": 64}


def check_devices() -> dict[str, Any]:
    """Versions, the names of the GPUs that torch sees, and how far each kernel is from its specification."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if count else None,
        "devices": [torch.cuda.get_device_name(index) for index in range(count)],
        "emulates_bf16": emulates_bf16(torch.device("cpu")),
    }
    return found | ({"kernels": _kernels()} if count else {})


def emulates_bf16(device: torch.device) -> bool:
    """Whether products in bf16 run on a CPU that has no instructions for them."""
    return device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _kernels() -> dict[str, Any]:
    try:
        from dist_cpt_kernels.self_test import ALLOWED, self_test

        errors = self_test(torch.device("cuda", 0), torch.bfloat16, **SHAPE)
    except Exception as error:  # Triton, its compiler and the driver raise errors of their own
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    return {"errors": errors, "allowed": ALLOWED[torch.bfloat16]}


if __name__ == "__main__":
    print(json.dumps(check_devices()))
