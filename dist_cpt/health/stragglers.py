"""Which rank is slow by itself, and which ones only wait for it?

A collective makes all ranks as slow as the slowest, so the time of a step says nothing. What counts is what a rank
does between collectives: getting its batches, and the forward pass inside the modules, where a sharding engine has
gathered the weights before and frees them after. The one with much of it holds the others up.
"""

from __future__ import annotations

import contextlib
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dist_cpt.config.schema import StragglerConfig
from dist_cpt.runtime.collectives import gather_json, rank, world_size
from dist_cpt.runtime.log import LOGGER

NAMED_RANKS = 8  # in one line
MIN_SHARE = 0.1  # of a step: a rank that is late by less holds nobody up, whatever the factor


@dataclass(frozen=True)
class RankPace:
    """The medians of one rank over a window."""

    rank: int
    host: str
    own_seconds: float  # per step, outside of collectives
    step_seconds: float  # from boundary to boundary


def timed_modules(layers: Sequence[nn.Module], engine: str) -> list[nn.Module]:
    """The modules inside which no collective runs: the layers, or under ZeRO-3 what is gathered as one."""
    if engine != "zero-3":
        return list(layers)
    inside = [module for layer in layers for module in layer.modules()]
    return [
        module
        for module in inside
        if getattr(module, "gathers_at_once", False) or next(module.parameters(recurse=False), None) is not None
    ]


class ComputeClock:
    """Adds up this rank's own seconds: the training forward of `modules`, and whatever `also` surrounds.

    On a GPU by events on the stream, which wait there for the gathered weights as the computation does; no host sync
    beyond that of the loss. Make it after the engine: its hooks must lie inside the engine's.
    """

    def __init__(self, modules: Sequence[nn.Module], device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = 0.0
        self._depth = 0
        self._began: Any = None
        self._events: list[tuple[Any, Any]] = []
        for module in modules:
            module.register_forward_pre_hook(self._enter)
            # Also when a recomputation leaves the module through an exception, having all that it needs.
            module.register_forward_hook(self._leave, prepend=True, always_call=True)

    def take(self) -> float:
        """Seconds since the last call; at a step boundary, where the device has done the forward passes."""
        for began, ended in self._events:
            ended.synchronize()
            self._seconds += began.elapsed_time(ended) / 1000
        seconds, self._seconds = self._seconds, 0.0
        self._events.clear()
        return seconds

    @contextlib.contextmanager
    def also(self) -> Iterator[None]:
        """Count what happens here on the host."""
        began = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - began

    def _enter(self, _module: nn.Module, _args: Any) -> None:
        if torch.is_grad_enabled():  # an evaluation is not a step
            self._depth += 1
            if self._depth == 1:
                self._began = self._now()

    def _leave(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        self._depth -= 1
        if self._depth == 0 and self._cuda:
            self._events.append((self._began, self._now()))
        elif self._depth == 0:
            self._seconds += time.perf_counter() - self._began

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class StragglerWatch:
    """Compares the ranks' own seconds every `window` steps; `say` gets a line on rank 0 when the answer changes."""

    def __init__(self, config: StragglerConfig, clock: ComputeClock, say: Callable[[str], None]) -> None:
        self._config, self._clock, self._say = config, clock, say
        self._own: list[float] = []
        self._whole: list[float] = []
        self._last: float | None = None
        self._named: list[int] = []

    def boundary(self) -> None:
        """Between two steps, before anything collective of the next one. Collective every `window` calls."""
        now, own = time.perf_counter(), self._clock.take()
        if self._last is not None:
            self._own.append(own)
            self._whole.append(now - self._last)
        self._last = now
        if len(self._own) == self._config.window:
            self._compare()

    def _compare(self) -> None:
        mine = [socket.gethostname(), statistics.median(self._own), statistics.median(self._whole)]
        self._own.clear()
        self._whole.clear()
        if world_size() == 1:
            return
        paces = [RankPace(number, *pace) for number, pace in enumerate(gather_json(mine))]
        slow = stragglers(paces, self._config.factor)
        numbers = [pace.rank for pace in slow]
        if numbers != self._named:
            text = straggler_line(slow, paces)
            self._say(text)
            if rank() in numbers:
                LOGGER.info("%s", text)
        self._named = numbers


def stragglers(paces: Sequence[RankPace], factor: float) -> list[RankPace]:
    """Ranks whose own time is more than `factor` times the median and matters for the step, slowest first.

    The lower of the two middle ones: of two ranks, the median would otherwise be half the slow one's.
    """
    usual = statistics.median_low(pace.own_seconds for pace in paces)
    slow = [
        pace
        for pace in paces
        if pace.own_seconds > factor * usual and pace.own_seconds - usual > MIN_SHARE * pace.step_seconds
    ]
    return sorted(slow, key=lambda pace: -pace.own_seconds)


def straggler_line(slow: Sequence[RankPace], paces: Sequence[RankPace]) -> str:
    """What a person is told; it starts with `straggler: `."""
    if not slow:
        return "straggler: no rank is slow any more"
    usual = statistics.median_low(pace.own_seconds for pace in paces)
    named = [
        f"rank {pace.rank} (host {pace.host}) works {pace.own_seconds:.3g} s a step by itself"
        for pace in slow[:NAMED_RANKS]
    ]
    more = f" and {len(slow) - NAMED_RANKS} more" if len(slow) > NAMED_RANKS else ""
    return (
        f"straggler: {'; '.join(named)}{more}; the median of {len(paces)} ranks is {usual:.3g} s, "
        f"a step takes {statistics.median_low(pace.step_seconds for pace in paces):.3g} s"
    )
