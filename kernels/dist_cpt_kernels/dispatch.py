"""Where a kernel can run, and the one place that imports Triton: without it the torch reference runs instead."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import triton
    import triton.language as tl
else:
    try:
        import triton
        import triton.language as tl
    except ImportError:
        triton = tl = None

# Triton reads the variable when it is first imported, so later changes to it have no effect.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Set by tests only: interpreted kernels are far slower than torch on a CPU.
interpret_cpu_tensors = False
# All kernels compute in fp32, so fp64 is left to the reference.
DTYPES = (torch.bfloat16, torch.float32)


def jit(function: Callable[..., Any]) -> Any:
    """triton.jit that launches on the device of its arguments; without Triton, a launch raises ImportError."""
    if tl is None:
        return _Missing(function.__name__)
    kernel = triton.jit(function)
    if not INTERPRETED:
        kernel.run = _on_their_device(kernel.run)
    return kernel


def available(tensor: torch.Tensor) -> bool:
    """Whether kernels run on the device of `tensor`: a GPU, or under test the CPU through Triton's interpreter."""
    return tl is not None and (tensor.is_cuda or (interpret_cpu_tensors and tensor.device.type == "cpu"))


def can_fuse(*tensors: torch.Tensor) -> bool:
    """Whether kernels run on the device of the first of `tensors` and support the dtypes of all of them."""
    return available(tensors[0]) and all(tensor.dtype in DTYPES for tensor in tensors)


def _on_their_device(run: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device and its stream, wherever the tensors are."""

    def run_there(*args: Any, **kwargs: Any) -> Any:
        device = next((arg.device for arg in args if isinstance(arg, torch.Tensor)), None)
        if device is None or device.index == torch.cuda.current_device():
            return run(*args, **kwargs)
        with torch.cuda.device(device):
            return run(*args, **kwargs)

    return run_there


class _Missing:
    def __init__(self, name: str) -> None:
        self.name = name

    def __getitem__(self, grid: Any) -> Any:
        raise ImportError(f"the kernel {self.name} needs Triton, which is not installed: pip install triton")


__all__ = ["INTERPRETED", "available", "can_fuse", "jit", "tl"]
