"""The vocabulary in which engines and checkpoints exchange a training state.

A state crosses the seam by canonical name, as full fp32 tensors on the CPU, one at a time, so that any engine at
any world size can read what another one wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import torch

StateKind = Literal["master", "exp_avg", "exp_avg_sq"]
STATE_KINDS: tuple[StateKind, ...] = ("master", "exp_avg", "exp_avg_sq")
TensorKey = tuple[StateKind, str]  # (kind, canonical name)

# (kind, canonical name, start, stop) -> flat fp32 CPU values [stop - start] of the full tensor in C order
ReadState = Callable[[StateKind, str, int, int], "torch.Tensor"]

# (rank that reads, kind, canonical name) of every tensor, the same on every rank
ReadingOrder = Sequence[tuple[int, StateKind, str]]

OwnerOf = Callable[[StateKind, str], int]  # the rank that gets the whole tensor


@dataclass(frozen=True)
class TensorSpec:
    """One trainable tensor; `dtype` is its compute dtype, the stored state is always fp32."""

    name: str  # canonical
    shape: tuple[int, ...]
    dtype: str
    group: str


@dataclass(frozen=True)
class ExportedTensor:
    """One full tensor of the training state; `values` is None on every rank but its owner."""

    kind: StateKind
    name: str
    values: torch.Tensor | None  # fp32, CPU, full shape


class ExportState(Protocol):
    """Yields every trainable tensor's `kinds`, name by name in the groups' order, whole on its owner. Collective."""

    def __call__(self, owner_of: OwnerOf, kinds: Sequence[StateKind] = STATE_KINDS) -> Iterator[ExportedTensor]: ...
