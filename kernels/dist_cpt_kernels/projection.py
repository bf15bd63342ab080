"""One linear layer as the kernels take it: a plain or NF4 weight, and its adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


class NestedScales(NamedTuple):
    """How the scales themselves are stored."""

    code_map: torch.Tensor  # fp32 [256]
    absmax: torch.Tensor  # fp32 [ceil(number of scales / block)]
    offset: torch.Tensor  # fp32 []
    block: int = 256


@dataclass(frozen=True)
class Nf4Scales:
    """What turns NF4 codes into a weight of `shape`, rounded to `dtype`."""

    absmax: torch.Tensor  # fp32, or uint8 with `nested`: one for `block` elements
    shape: tuple[int, int]  # [O, I]
    nested: NestedScales | None = None
    block: int = 64
    dtype: torch.dtype = torch.bfloat16  # before the weight is cast to the dtype of its input


@dataclass(frozen=True)
class Projection:
    """The matrices of one linear layer, whole, as they are at the moment of the call."""

    weight: torch.Tensor  # [O, I], or with `scales` uint8 codes of NF4, two in a byte
    bias: torch.Tensor | None = None  # [O]
    lora_A: torch.Tensor | None = None  # [R, I]; None: no adapter
    lora_B: torch.Tensor | None = None  # [O, R]
    scaling: float = 1.0  # alpha / R, rank-stabilised alpha / sqrt(R)
    dropout: float = 0.0  # of the adapter's input alone
    scales: Nf4Scales | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(O, I)."""
        return tuple(self.weight.shape) if self.scales is None else self.scales.shape
