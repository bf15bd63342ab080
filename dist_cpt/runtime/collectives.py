"""Collectives for small values: exact integers, JSON, and whether a rank failed.

All of them work without a process group, as a world of one. JSON travels as bytes in tensors, so nothing is ever
unpickled. A thread beside the training loop needs a process group of its own (`over_group`): collectives of two
threads on one group would be matched with each other's.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dist_cpt import errors
from dist_cpt.errors import ConfigError, DistCptError
from dist_cpt.storage import explained

_SHOWN, _SHOWN_LENGTH = 3, 80  # facts in one message, characters of a value
T = TypeVar("T")
_thread = threading.local()


def rank() -> int:
    """Rank of this process; 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks; 1 when alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def over_group(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Run this thread's collectives over `group`, which contains every rank; None is the default group."""
    _thread.group = group
    try:
        yield
    finally:
        _thread.group = None


def current_group() -> dist.ProcessGroup | None:
    """The group of this thread's collectives; None is the default group."""
    return getattr(_thread, "group", None)


def all_reduce_ints(values: list[int]) -> list[int]:
    """Element-wise sum over all ranks, exact in int64."""
    return _all_reduce(values, torch.int64)


def all_reduce_floats(values: list[float]) -> list[float]:
    """Element-wise sum over all ranks in fp64."""
    return _all_reduce(values, torch.float64)


def all_reduce_max_int(value: int) -> int:
    """The largest `value` of any rank."""
    return _all_reduce([value], torch.int64, dist.ReduceOp.MAX)[0]


def broadcast_json(value: Any, src: int = 0) -> Any:
    """The `value` of rank `src` on every rank; those of other ranks are ignored."""
    if world_size() == 1:
        return value
    payload = _encode(value) if rank() == src else b""
    length = torch.tensor([len(payload)], dtype=torch.int64, device=_device())
    dist.broadcast(length, src, group=current_group())
    buffer = _buffer(payload, int(length.item()))
    dist.broadcast(buffer, src, group=current_group())
    return _decode(buffer)


def gather_json(value: Any) -> list[Any]:
    """Every rank's `value`, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    payload = _encode(value)
    sizes = _lengths(payload)
    mine = _buffer(payload, max(sizes))
    buffers = [torch.empty_like(mine) for _ in sizes]
    dist.all_gather(buffers, mine, group=current_group())
    return [_decode(buffer[:size]) for buffer, size in zip(buffers, sizes, strict=True)]


def gather_json_to_rank_zero(value: Any) -> list[Any] | None:
    """Every rank's `value`, in rank order, on rank 0; None on the others, which receive only the lengths."""
    if world_size() == 1:
        return [value]
    payload = _encode(value)
    sizes = _lengths(payload)
    mine = _buffer(payload, max(sizes))
    buffers = [torch.empty_like(mine) for _ in sizes] if rank() == 0 else None
    dist.gather(mine, buffers, dst=0, group=current_group())
    if buffers is None:
        return None
    return [_decode(buffer[:size]) for buffer, size in zip(buffers, sizes, strict=True)]


def agree(error: BaseException | None, what: str) -> None:
    """If any rank failed at `what`, raise the same error on all ranks; it names the failed one.

    Call it where a single rank may have failed, before the next collective: the others would wait until the timeout.

    Raises:
        DistCptError: the first failed rank's error, of the same class; DistCptError itself for foreign exceptions.
    """
    reports = gather_json(None if error is None else _describe(error))
    failed = [(index, report) for index, report in enumerate(reports) if report is not None]
    if not failed:
        return
    report = failed[0][1]
    message = report["message"]
    same = [str(index) for index, other in failed if other == report]
    if len(same) < len(reports):
        message = f"{what}: {'rank' if len(same) == 1 else 'ranks'} {', '.join(same)}: {message}"
    agreed = _rebuild(report, message)
    agreed.agreed = True
    raise agreed from error


def require_equal(facts: Mapping[str, Any]) -> None:
    """Refuse JSON values by name in which the ranks differ. Collective.

    Raises:
        ConfigError: on every rank; names the facts, the ranks and their values.
    """
    digest = int.from_bytes(hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()[:7])
    if all_reduce_max_int(digest) == -all_reduce_max_int(-digest):
        return
    everyone = gather_json(dict(facts))
    lines = []
    for key in sorted({key for given in everyone for key in given}):
        ranks: dict[str, list[int]] = {}
        for index, given in enumerate(everyone):
            ranks.setdefault(str(given.get(key, "absent"))[:_SHOWN_LENGTH], []).append(index)
        if len(ranks) > 1:
            lines.append(f"{key} is " + ", ".join(f"{value} on {named_ranks(those)}" for value, those in ranks.items()))
    more = f" (and {len(lines) - _SHOWN} more)" if len(lines) > _SHOWN else ""
    error = ConfigError(
        f"the ranks would not train the same thing: {'; '.join(lines[:_SHOWN])}{more}",
        remedy="give every node the same recipe, files and packages",
    )
    error.agreed = True
    raise error


def ranks_that_see(value: Any) -> list[int]:
    """The ranks with the same JSON `value`, this one included; they can divide work on it. Collective."""
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    return [index for index, other in enumerate(gather_json(digest)) if other == digest]


def on_rank_zero(what: str, function: Callable[[], Any]) -> Any:
    """Run `function` on rank 0 and return its JSON-serialisable result on every rank.

    Raises:
        DistCptError: on every rank, if it failed on rank 0.
    """
    result, error = None, None
    if rank() == 0:
        try:
            result = function()
        except Exception as caught:
            error = caught
    agree(error, what)
    return broadcast_json(result)


def on_every_rank(what: str, function: Callable[[], T]) -> T:
    """Run `function` on every rank and return this rank's result.

    Raises:
        DistCptError: on every rank, if it failed on any.
    """
    try:
        result = function()
    except Exception as error:
        agree(error, what)
        raise
    agree(None, what)
    return result


def barrier() -> None:
    """Wait for every rank."""
    all_reduce_max_int(0)


def named_ranks(ranks: Sequence[int]) -> str:
    """`rank 3`, or `ranks 0-5, 7`."""
    runs: list[list[int]] = []
    for index in ranks:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def _all_reduce(values: list[Any], dtype: torch.dtype, op: Any = dist.ReduceOp.SUM) -> list[Any]:
    if world_size() == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=dtype, device=_device())
    dist.all_reduce(tensor, op=op, group=current_group())
    return tensor.tolist()  # host sync


def _device() -> torch.device:
    if dist.get_backend(current_group()) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _lengths(payload: bytes) -> list[int]:
    """Bytes of every rank's payload."""
    mine = [0] * world_size()
    mine[rank()] = len(payload)
    return all_reduce_ints(mine)


def _encode(value: Any) -> bytes:
    return json.dumps(value).encode()


def _decode(buffer: torch.Tensor) -> Any:
    return json.loads(buffer.cpu().numpy().tobytes())


def _buffer(payload: bytes, size: int) -> torch.Tensor:
    """uint8 [size]: `payload`, zero-padded."""
    padded = bytearray(payload.ljust(size, b"\0"))
    return torch.frombuffer(padded, dtype=torch.uint8).to(_device())


def _describe(error: BaseException) -> dict[str, Any]:
    error = explained(error)
    if isinstance(error, DistCptError):
        classes = [cls.__name__ for cls in type(error).__mro__]
        return {"classes": classes, "message": error.message, "remedy": error.remedy}
    message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return {"classes": ["DistCptError"], "message": message, "remedy": None}


def _rebuild(report: dict[str, Any], message: str) -> DistCptError:
    """The reported error, made without its class's constructor, which may take other arguments."""
    known = (getattr(errors, name, None) for name in report["classes"])
    cls = next(c for c in known if isinstance(c, type) and issubclass(c, DistCptError))
    error = cls.__new__(cls)
    DistCptError.__init__(error, message, remedy=report["remedy"])
    return error
