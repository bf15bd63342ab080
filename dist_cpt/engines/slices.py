"""The training state as flat slices: which part of each tensor a rank holds, and how the parts travel.

An engine states once which elements of every flattened tensor this rank holds, and how they are read and written.
Export sends the parts of one tensor to its owner; import touches local parts only, so that no collective comes between
two reads and a rank that fails does not leave the others waiting. A snapshot copies this rank's parts to the CPU, to be
exported from another thread while training continues.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from dist_cpt.adapters.quantize import quantisation_state
from dist_cpt.errors import CheckpointError
from dist_cpt.runtime.collectives import agree, current_group, gather_json, rank, world_size
from dist_cpt.runtime.liveness import made_progress
from dist_cpt.training_state import STATE_KINDS, ExportedTensor, ExportState, OwnerOf, ReadState, StateKind

NORM_ELEMENTS = 1 << 16  # of one fp32 sum of squares

Read = Callable[[StateKind, str], torch.Tensor]  # fp32 [stop - start]: this rank's elements, live or a copy
Write = Callable[[StateKind, str, torch.Tensor], None]  # replaces them by fp32 CPU values [stop - start]


class SlicedState:
    """`ranges[name]` = (start, stop) of this rank in the flattened tensor; the ranks' ranges tile it.

    `primary` is False on a rank whose ranges repeat those of another: it imports but never sends. Collective.
    """

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        ranges: Mapping[str, tuple[int, int]],
        read: Read,
        write: Write,
        device: torch.device,
        primary: bool = True,
    ) -> None:
        self.shapes = dict(shapes)
        self.ranges = dict(ranges)
        self._read = read
        self._write = write
        self._device = device
        self._copies: dict[tuple[StateKind, str], torch.Tensor] = {}
        mine = [list(ranges[name]) if primary else [0, 0] for name in shapes]
        by_rank = gather_json(mine)
        self._layout = {
            name: [(r, *by_rank[r][i]) for r in range(len(by_rank)) if by_rank[r][i][0] < by_rank[r][i][1]]
            for i, name in enumerate(shapes)
        }
        for name, shape in self.shapes.items():
            covered = sum(stop - start for _, start, stop in self._layout[name])
            assert covered == shape.numel(), f"{name}: the ranks' parts cover {covered} of {shape.numel()} elements"

    def export(self, owner_of: OwnerOf, kinds: Sequence[StateKind] = STATE_KINDS) -> Iterator[ExportedTensor]:
        """Yield every tensor of `kinds`, whole on its owner's CPU. Collective."""
        return self._export(self._read, self._device, owner_of, kinds)

    def snapshot(self) -> ExportState:
        """Copy the parts this rank sends to the CPU (pinned for a GPU), and return an `export` of the copies.

        The next snapshot overwrites them, so the export must have ended by then. It may run on another thread, over
        that thread's process group.
        """
        for name, parts in self._layout.items():
            if all(sender != rank() for sender, _, _ in parts):
                continue
            for kind in STATE_KINDS:
                values = self._read(kind, name)
                copy = self._copies.get((kind, name))
                if copy is None:
                    pinned = self._device.type == "cuda"
                    copy = self._copies[kind, name] = torch.empty(values.shape, dtype=torch.float32, pin_memory=pinned)
                copy.copy_(values, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # host sync: the step that follows overwrites
        return partial(self._export, lambda kind, name: self._copies[kind, name], torch.device("cpu"))

    def import_(self, read: ReadState) -> None:
        """Overwrite this rank's part of every tensor.

        Raises:
            CheckpointError: on all ranks if `read` failed on one; the state is then undefined.
        """
        error: CheckpointError | None = None
        try:
            self._read_all(read)
        except CheckpointError as raised:
            error = raised
        except Exception as raised:
            error = CheckpointError(f"reading the training state: {type(raised).__name__}: {raised}")
            error.__cause__ = raised
        agree(error, "import of the training state")

    def _read_all(self, read: ReadState) -> None:
        for kind in STATE_KINDS:
            for name, (start, stop) in self.ranges.items():
                if start == stop:
                    continue
                values = read(kind, name, start, stop)
                if values.numel() != stop - start:
                    raise CheckpointError(
                        f"{kind}.{name}: asked for elements {start} to {stop}, got {values.numel()} values"
                    )
                self._write(kind, name, values.reshape(-1))

    def _export(
        self, read: Read, device: torch.device, owner_of: OwnerOf, kinds: Sequence[StateKind] = STATE_KINDS
    ) -> Iterator[ExportedTensor]:
        for kind in kinds:
            for name, shape in self.shapes.items():
                local = partial(read, kind, name)
                whole = _assemble(shape.numel(), self._layout[name], local, device, owner_of(kind, name))
                yield ExportedTensor(kind, name, None if whole is None else whole.view(shape))
                made_progress()


def _assemble(
    num_elements: int,
    parts: Sequence[tuple[int, int, int]],
    local: Callable[[], torch.Tensor],
    device: torch.device,
    owner: int,
) -> torch.Tensor | None:
    """The flat tensor on its owner's CPU; parts are sent as tensors on `device`."""
    me = rank()
    whole = torch.empty(num_elements, dtype=torch.float32) if me == owner else None
    for sender, start, stop in parts:
        if whole is not None and sender == owner:
            whole[start:stop].copy_(local())
        elif whole is not None:
            _receive(whole[start:stop], sender, device)
        elif me == sender:
            dist.send(local().contiguous(), owner, group=current_group())
    return whole


def _receive(part: torch.Tensor, source: int, device: torch.device) -> None:
    if device.type == "cpu":
        dist.recv(part, source, group=current_group())
        return
    staged = torch.empty(part.numel(), dtype=part.dtype, device=device)
    dist.recv(staged, source, group=current_group())
    part.copy_(staged)


def global_norm(grads: Iterable[torch.Tensor], device: torch.device, replicas: int = 1) -> float:
    """Euclidean norm over all tensors of all ranks, where each is counted `replicas` times; the same on every rank."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for grad in grads:
        total += _sum_of_squares(grad)
    if world_size() > 1:
        dist.all_reduce(total)
    return math.sqrt(total.item() / replicas)  # host sync: whether the step is skipped depends on this value


def probe(
    grads: Mapping[str, torch.Tensor | None], device: torch.device, replicas: int = 1
) -> dict[str, tuple[float, float]]:
    """(norm, max abs) by name over all ranks; a NaN gives norm NaN and max infinity. Collective."""
    nothing = torch.zeros(0, device=device)
    local = [nothing if grad is None else grad for grad in grads.values()]
    squares = torch.stack([_sum_of_squares(grad).to(device) for grad in local])
    largest = torch.stack([_largest(grad).to(device) for grad in local])
    if world_size() > 1:
        dist.all_reduce(squares)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    norms = (squares / replicas).sqrt().tolist()
    return {name: (norms[i], value) for i, (name, value) in enumerate(zip(grads, largest.tolist(), strict=True))}


def clip_factor(norm: float, max_norm: float) -> float:
    """The factor of every gradient. Source: torch.nn.utils.clip_grad_norm_, the same constant."""
    return min(1.0, max_norm / (norm + 1e-6))


def frozen_tensors(
    module: nn.Module,
    trained: Iterable[torch.Tensor],
    local: Callable[[torch.Tensor], torch.Tensor] = lambda parameter: parameter.data,
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, this rank's storage) of every parameter that is not in `trained`, and of every quantisation scale."""
    ids = {id(parameter) for parameter in trained}
    for name, parameter in module.named_parameters():
        if id(parameter) not in ids:
            yield name, local(parameter)
    yield from quantisation_state(module)


def storage_bytes(**groups: Iterable[torch.Tensor]) -> dict[str, int]:
    """Bytes of the distinct storages behind each group of local tensors; a shared one counts in the first group."""
    counted: set[int] = set()
    totals = dict.fromkeys(groups, 0)
    for name, tensors in groups.items():
        for storage in (tensor.untyped_storage() for tensor in tensors):
            if storage.nbytes() and storage.data_ptr() not in counted:
                counted.add(storage.data_ptr())
                totals[name] += storage.nbytes()
    return totals


def _sum_of_squares(grad: torch.Tensor) -> torch.Tensor:
    """fp64 [] over fp32 norms of slices: one fp32 sum over 2e6 elements on the CPU is 1e-4 too low. No host sync."""
    flat = grad.detach().reshape(-1)
    rows = flat.numel() // NORM_ELEMENTS
    whole, rest = flat.split([rows * NORM_ELEMENTS, flat.numel() - rows * NORM_ELEMENTS])
    # All slices in one call: on a GPU a launch for each would take longer than the sums.
    norms = torch.linalg.vector_norm(whole.view(rows, NORM_ELEMENTS), dim=1, dtype=torch.float32)
    last = torch.linalg.vector_norm(rest, dtype=torch.float32)
    return torch.cat([norms, last[None]]).double().square().sum()


def _largest(grad: torch.Tensor) -> torch.Tensor:
    if grad.numel() == 0:
        return torch.zeros((), dtype=torch.float32)
    # MAX reductions may drop a NaN.
    return grad.detach().abs().amax().float().nan_to_num(nan=math.inf, posinf=math.inf)
