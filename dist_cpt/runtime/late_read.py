"""What the host learns of the device's work without holding it up: values and times that are read a step late."""

from __future__ import annotations

import time

import torch


class Moment:
    """When the device reaches what it is asked to do next; on a CPU, now."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        self._seconds = 0.0
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()
        else:
            self._seconds = time.perf_counter()

    def wait(self) -> None:
        """Until the device has reached it."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_until(self, later: Moment) -> float:
        """Of the device's time; both must have been reached."""
        if self._event is not None and later._event is not None:
            return self._event.elapsed_time(later._event) / 1000
        return later._seconds - self._seconds


class LateRead:
    """Numbers on their way to the host; the only door through which a training step's results leave the device."""

    def __init__(self, values: torch.Tensor) -> None:
        """Start the copy of `values`, fp64 [N], behind the work that computes them."""
        self._values = values
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
        self.arrived = Moment(values.device)

    def read(self) -> list[float]:
        """The numbers; waits for them if the device has not computed them yet."""
        self.arrived.wait()
        return self._values.tolist()  # host sync: the one of a step
