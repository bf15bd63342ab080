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
    """triton.jit, or without Triton a function that raises ImportError when it is launched."""
    return _Missing(function.__name__) if tl is None else triton.jit(function)


def available(tensor: torch.Tensor) -> bool:
    """Whether kernels take this tensor: on a GPU, or in a test on the CPU, in Triton's interpreter."""
    return tl is not None and (tensor.is_cuda or (interpret_cpu_tensors and tensor.device.type == "cpu"))


class _Missing:
    def __init__(self, name: str) -> None:
        self.name = name

    def __getitem__(self, grid: Any) -> Any:
        raise ImportError(f"the kernel {self.name} needs Triton, which is not installed: pip install triton")


__all__ = ["INTERPRETED", "available", "jit", "tl"]
