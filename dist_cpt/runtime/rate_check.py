"""The rates of this machine that the model of a step assumes of others: `python -m dist_cpt.runtime.rate_check`.

Measured on one device in bf16: a large matrix product, causal attention both ways, a copy. It prints one JSON object.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

GEMM = {"cuda": 8192, "cpu": 768}
ATTENTION = {"cuda": (32, 4096, 128), "cpu": (4, 512, 64)}  # heads, tokens, head dim
COPY_BYTES = {"cuda": 2 << 30, "cpu": 64 << 20}
REPEATS = 7


def measure() -> dict[str, Any]:
    """FLOP/s and bytes/s, as `plan.devices.Device` has them; the best of a few runs."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    size, (heads, tokens, dim) = GEMM[device.type], ATTENTION[device.type]
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    heads_of = (1, heads, tokens, dim)
    query, key, value = (
        torch.randn(heads_of, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    )
    flops = 2.0 * heads * tokens**2 * dim  # two products over the lower triangle
    output = scaled_dot_product_attention(query, key, value, is_causal=True)
    gradient = torch.randn_like(output)
    data = torch.empty(COPY_BYTES[device.type], device=device, dtype=torch.uint8)

    def backward() -> None:
        torch.autograd.grad(output, (query, key, value), gradient, retain_graph=True)

    def forward() -> None:
        with torch.no_grad():
            scaled_dot_product_attention(query, key, value, is_causal=True)

    return {
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "gemm": 2.0 * size**3 / _seconds(lambda: left @ right, device),
        "attention_forward": flops / _seconds(forward, device),
        "attention_backward": 2.5 * flops / _seconds(backward, device),
        "copy": 2.0 * data.nbytes / _seconds(data.clone, device),
    }


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times)


if __name__ == "__main__":
    print(json.dumps(measure()))
