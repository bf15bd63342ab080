"""The training state as flat slices: which part of each tensor a rank holds, and how the parts travel.

An engine states once which elements of every flattened tensor this rank holds, and how they are read and written.
Export sends the parts of each tensor to its owner, import sends what one rank has read to all that hold parts of it.
Both keep several tensors for each rank under way: ranks that take turns write, hash or read at the same time, and none
waits for another's disk. Parts travel from host memory over gloo, also where the collectives of training are
NCCL's, which would need a communicator for every pair of ranks. A snapshot copies this rank's parts to the CPU, to be
exported from another thread while training continues.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from dist_cpt.adapters.quantize import quantisation_state
from dist_cpt.errors import CheckpointError, DistCptError
from dist_cpt.runtime.collectives import agree, current_group, gather_json, rank, world_size
from dist_cpt.runtime.liveness import made_progress
from dist_cpt.runtime.mesh import host_group
from dist_cpt.runtime.threads import enough_under_way, one_ahead
from dist_cpt.training_state import (
    STATE_KINDS,
    ExportedTensor,
    ExportState,
    OwnerOf,
    ReadingOrder,
    ReadState,
    StateKind,
)

# Under way at a time, or four times as many while they are small (`enough_under_way`).
TENSORS_PER_RANK = 4  # in all: tensors differ in size, and a rank with a large one must not hold up others
WHOLE_TENSORS = 2  # at one rank: one arrives, or leaves, while another one is written or read

_ITEM_BYTES = 4  # the state travels as fp32

Read = Callable[[StateKind, str], torch.Tensor]  # fp32 [stop - start]: this rank's elements, live or a copy
Write = Callable[[StateKind, str, torch.Tensor], None]  # replaces them by fp32 CPU values [stop - start]
Part = tuple[int, int, int]  # (rank, start, stop) in the flattened tensor


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
        self._host_group = host_group(device)
        by_rank = gather_json([primary, [list(ranges[name]) for name in shapes]])
        self._holders: dict[str, list[Part]] = {name: [] for name in shapes}
        self._senders: dict[str, list[Part]] = {name: [] for name in shapes}
        for number, (sends, parts) in enumerate(by_rank):
            for name, (start, stop) in zip(shapes, parts, strict=True):
                if start < stop:
                    self._holders[name].append((number, start, stop))
                    if sends:
                        self._senders[name].append((number, start, stop))
        for name, shape in self.shapes.items():
            covered = sum(stop - start for _, start, stop in self._senders[name])
            assert covered == shape.numel(), f"{name}: the ranks' parts cover {covered} of {shape.numel()} elements"

    def export(self, owner_of: OwnerOf, kinds: Sequence[StateKind] = STATE_KINDS) -> Iterator[ExportedTensor]:
        """Yield every tensor of `kinds`, whole on its owner's CPU. Collective."""
        return self._export(self._read, owner_of, kinds)

    def snapshot(self) -> ExportState:
        """Copy the parts this rank sends to the CPU (pinned for a GPU), and return an `export` of the copies.

        The next snapshot overwrites them, so the export must have ended by then. It may run on another thread, over
        that thread's process group.
        """
        for name, parts in self._senders.items():
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
        return partial(self._export, lambda kind, name: self._copies[kind, name])

    def import_(self, read: ReadState, order: ReadingOrder | None = None) -> None:
        """Overwrite this rank's part of every tensor. Collective.

        With an `order`, each tensor is read by one rank, which sends the others their parts; without, every rank
        reads its own parts.

        Raises:
            CheckpointError or StorageError: on all ranks if `read` failed on one; the state is then undefined.
        """
        error: Exception | None = None
        if order is not None:
            error = self._scatter_all(read, order)
        else:
            try:
                self._read_all(read)
            except Exception as raised:
                error = raised
        if error is not None and not isinstance(error, DistCptError):
            cause = error
            error = CheckpointError(f"reading the training state: {type(cause).__name__}: {cause}")
            error.__cause__ = cause
        agree(error, "import of the training state")

    def _read_all(self, read: ReadState) -> None:
        for kind in STATE_KINDS:
            for name, (start, stop) in self.ranges.items():
                if start == stop:
                    continue
                self._write(kind, name, _checked(read, kind, name, start, stop))

    def _scatter_all(self, read: ReadState, order: ReadingOrder) -> Exception | None:
        """The first error here; after it this rank still sends what the others wait for, as zeros."""
        error: Exception | None = None
        under_way: deque[_UnderWay] = deque()

        def write_oldest() -> None:
            nonlocal error
            oldest = under_way.popleft()
            part = oldest.wait()
            try:
                if part is not None and error is None:
                    self._write(oldest.kind, oldest.name, part)
            except Exception as raised:
                error = raised

        mine = [(kind, name, 0, self.shapes[name].numel()) for reader, kind, name in order if reader == rank()]
        with closing(one_ahead(partial(_checked, read, *what) for what in mine)) as reads:
            for reader, kind, name in order:
                while _is_full(under_way, reader):
                    write_oldest()
                whole: torch.Tensor | None = None
                if reader == rank():
                    try:
                        whole = None if error else next(reads).result()
                    except Exception as raised:
                        error = raised
                    whole = torch.zeros(self.shapes[name].numel()) if whole is None else whole
                under_way.append(self._scatter(kind, name, whole, reader))
        while under_way:
            write_oldest()
        return error

    def _export(
        self, read: Read, owner_of: OwnerOf, kinds: Sequence[StateKind] = STATE_KINDS
    ) -> Iterator[ExportedTensor]:
        under_way: deque[_UnderWay] = deque()
        for name in self.shapes:
            for kind in kinds:
                owner = owner_of(kind, name)
                while _is_full(under_way, owner):
                    yield self._exported(under_way.popleft())
                under_way.append(self._gather(kind, name, read, owner))
        while under_way:
            yield self._exported(under_way.popleft())

    def _exported(self, arriving: _UnderWay) -> ExportedTensor:
        values = arriving.wait()
        shape = self.shapes[arriving.name]
        return ExportedTensor(arriving.kind, arriving.name, None if values is None else values.view(shape))

    def _gather(self, kind: StateKind, name: str, read: Read, owner: int) -> _UnderWay:
        """Send this rank's part of a tensor to its owner, or receive all of them there."""
        me, group = rank(), current_group() or self._host_group
        whole = torch.empty(self.shapes[name].numel(), dtype=torch.float32) if me == owner else None
        tensor = _UnderWay(kind, name, owner, self.shapes[name].numel() * _ITEM_BYTES, whole)
        for sender, start, stop in self._senders[name]:
            if whole is not None and sender == owner:
                whole[start:stop].copy_(read(kind, name))
            elif whole is not None:
                tensor.works.append(dist.irecv(whole[start:stop], sender, group=group))
            elif sender == me:
                tensor.source = read(kind, name).cpu().contiguous()
                tensor.works.append(dist.isend(tensor.source, owner, group=group))
        return tensor

    def _scatter(self, kind: StateKind, name: str, whole: torch.Tensor | None, reader: int) -> _UnderWay:
        """Send each rank its part of a tensor from the reader, or receive it from there."""
        me, group = rank(), current_group() or self._host_group
        tensor = _UnderWay(kind, name, reader, self.shapes[name].numel() * _ITEM_BYTES, None, whole)
        for holder, start, stop in self._holders[name]:
            if whole is not None and holder == reader:
                tensor.result = whole[start:stop]
            elif whole is not None:
                tensor.works.append(dist.isend(whole[start:stop], holder, group=group))
            elif holder == me:
                tensor.result = torch.empty(stop - start, dtype=torch.float32)
                tensor.works.append(dist.irecv(tensor.result, reader, group=group))
        return tensor


@dataclass
class _UnderWay:
    """A tensor whose parts travel to or from the rank that has it whole."""

    kind: StateKind
    name: str
    at: int  # that rank
    num_bytes: int  # whole
    result: torch.Tensor | None  # here, after `wait`: whole or a part
    source: torch.Tensor | None = None  # must live until it has left
    works: list[dist.Work | None] = field(default_factory=list)

    def wait(self) -> torch.Tensor | None:
        for work in self.works:
            assert work is not None, "this rank is not in the group"
            work.wait()
        made_progress()
        return self.result


def _is_full(under_way: Iterable[_UnderWay], at: int) -> bool:
    """Whether the oldest tensor must arrive before another one, whole on rank `at`, may start."""
    if at == rank() and enough_under_way([other.num_bytes for other in under_way if other.at == at], WHOLE_TENSORS):
        return True
    return enough_under_way([other.num_bytes for other in under_way], TENSORS_PER_RANK * world_size())


def _checked(read: ReadState, kind: StateKind, name: str, start: int, stop: int) -> torch.Tensor:
    """Flat values [stop - start]."""
    values = read(kind, name, start, stop)
    if values.numel() != stop - start:
        raise CheckpointError(f"{kind}.{name}: asked for elements {start} to {stop}, got {values.numel()} values")
    return values.reshape(-1)


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
