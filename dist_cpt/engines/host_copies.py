"""Layer inputs in host memory from forward to backward, copied on a stream of their own and fetched one layer ahead.

At most two inputs are on the device on their way out, and two on their way back. On a CPU the copies are plain ones
and save nothing.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


class HostCopies:
    """The inputs of a model's layers: the last one copied is the first one back. The graph owns the copies."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._newest: Any = _nothing

    def of(self, tensor: torch.Tensor) -> HostCopy:
        """Begin to copy `tensor`; the one copied before leaves the device."""
        before = self._newest
        if (older := before()) is not None:
            older.leave_device()
        copy = HostCopy(tensor, before, self._stream)
        self._newest = weakref.ref(copy)
        return copy


class HostCopy:
    """One tensor; `on_device` brings it back, and begins to fetch the one that was copied before it."""

    def __init__(self, tensor: torch.Tensor, before: Any, stream: Any) -> None:
        self._like = tensor.device, tensor.requires_grad
        self._before, self._stream = before, stream
        self._tensor: torch.Tensor | None = tensor.detach()
        self._host = torch.empty_like(self._tensor, device="cpu", pin_memory=stream is not None)
        self._arrived: Any = None
        with self._beside():
            self._host.copy_(self._tensor, non_blocking=True)
            self._copied = _event(stream)

    def leave_device(self) -> None:
        """Free the tensor: what is computed next may use its memory, and so waits for the copy."""
        _wait(self._copied)
        self._tensor = None

    def on_device(self) -> torch.Tensor:
        """The tensor, as a leaf."""
        self.fetch()
        if (older := self._before()) is not None:
            older.fetch()
        _wait(self._arrived)
        tensor, self._tensor = self._tensor, None  # a second backward fetches it again
        assert tensor is not None
        device, requires_grad = self._like
        if self._arrived is not None:
            tensor.record_stream(torch.cuda.current_stream(device))  # it was allocated on the other one
        return tensor.requires_grad_(requires_grad)

    def fetch(self) -> None:
        """Begin to copy it back, unless it is on the device."""
        if self._tensor is None:
            with self._beside():
                self._tensor = self._host.to(self._like[0], copy=True, non_blocking=True)
                self._arrived = _event(self._stream)

    def _beside(self) -> AbstractContextManager[Any]:
        """On the other stream, after what the current one has been given."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._like[0]))
        return torch.cuda.stream(self._stream)


def _nothing() -> None:
    """A reference to no copy."""


def _event(stream: Any) -> Any:
    return None if stream is None else stream.record_event()


def _wait(event: Any) -> None:
    if event is not None:
        torch.cuda.current_stream().wait_event(event)
