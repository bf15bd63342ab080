"""Where a kernel can run, and the one place that imports Triton: without it the torch references still work."""

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

# Triton decides so when a kernel is decorated, its own library's when it is imported: the first import counts.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Interpreted kernels are far slower than torch, so tensors on the CPU go there only where a test asks for it.
interpret_cpu_tensors = False


def jit(function: Callable[..., Any]) -> Any:
    """triton.jit, launched on its arguments' device; without Triton, what raises ImportError when it is launched."""
    if tl is None:
        return _Missing(function.__name__)
    kernel = triton.jit(function)
    if not INTERPRETED:
        kernel.run = _on_their_device(kernel.run)
    return kernel


def available(tensor: torch.Tensor) -> bool:
    """Whether kernels take this tensor: on a GPU, or in a test on the CPU, in Triton's interpreter."""
    return tl is not None and (tensor.is_cuda or (interpret_cpu_tensors and tensor.device.type == "cpu"))


def _on_their_device(run: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, with the stream of that one, wherever the tensors are."""

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


__all__ = ["INTERPRETED", "available", "jit", "tl"]
