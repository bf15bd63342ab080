"""Tensors with a shape and a dtype but one element of memory, in place of weights that are not read yet.

They pass through what only looks at a model: adapters, fused classes, vocabulary, sharding. Unlike meta tensors they
may be replaced in place (`parameter.data = ...`), so ties and every reference to a parameter survive. Floating-point
ones are NaN: computing with a weight that nobody has filled in shows in the first loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def placeholder(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """A tensor of `shape` whose elements are all the same one: NaN, or 0 for integers."""
    return torch.full((), math.nan if dtype.is_floating_point else 0, dtype=dtype, device=device).expand(*shape)


def is_placeholder(tensor: torch.Tensor) -> bool:
    """Whether `tensor` has less memory than elements."""
    return tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size()


def converted(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor` in `dtype`; a placeholder stays one."""
    return placeholder(tensor.shape, dtype, tensor.device) if is_placeholder(tensor) else tensor.to(dtype)


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`; a placeholder stays one."""
    return placeholder(tensor.shape, tensor.dtype, device) if is_placeholder(tensor) else tensor.to(device)
