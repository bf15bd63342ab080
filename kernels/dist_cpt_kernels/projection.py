"""One linear layer as the kernels take it: a dense, NF4 or e4m3 weight, and its adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


class NestedScales(NamedTuple):
    """Double quantisation: how the scales of NF4 blocks are stored as 8-bit codes."""

    code_map: torch.Tensor  # fp32 [256]
    absmax: torch.Tensor  # fp32 [ceil(number of scales / block)]
    offset: torch.Tensor  # fp32 []
    block: int = 256


@dataclass(frozen=True)
class Nf4Scales:
    """The scales of an NF4 weight of `shape`, which decodes to bf16."""

    absmax: torch.Tensor  # one per 64 elements: fp32, or uint8 codes with `nested`
    shape: tuple[int, int]  # [O, I]
    nested: NestedScales | None = None


class QuantisedRows(NamedTuple):
    """A matrix [N, K] in e4m3."""

    codes: torch.Tensor  # uint8 [N, K]: what engines and collectives neither cast nor refuse
    scales: torch.Tensor  # fp32 [N]


@dataclass(frozen=True)
class RowScales:
    """The scales of an e4m3 weight of `shape`."""

    scales: torch.Tensor  # fp32 [O]
    shape: tuple[int, int]  # [O, I]


@dataclass(frozen=True)
class Projection:
    """The matrices of one linear layer, unsharded, at the moment of the call."""

    weight: torch.Tensor  # [O, I], or with `scales` uint8 codes: of NF4 two per byte, of e4m3 [O, I]
    bias: torch.Tensor | None = None  # [O]
    lora_A: torch.Tensor | None = None  # [R, I]; None: no adapter
    lora_B: torch.Tensor | None = None  # [O, R]
    scaling: float = 1.0  # alpha / R, or alpha / sqrt(R) if rank-stabilised
    dropout: float = 0.0  # of the adapter's input only
    scales: Nf4Scales | RowScales | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(O, I)."""
        return tuple(self.weight.shape) if self.scales is None else self.scales.shape
