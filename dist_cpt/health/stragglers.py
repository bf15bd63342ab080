"""Which rank is slow by itself, and which ones only wait for it?

Collectives make every rank as slow as the slowest, so step times cannot tell. Compared is the time that a rank spends
outside of collectives: getting its batches, and the forward pass inside modules whose weights are gathered before and
freed after.
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
from dist_cpt.runtime.collectives import gather_json, rank
from dist_cpt.runtime.late_read import Moment
from dist_cpt.runtime.log import LOGGER

NAMED_RANKS = 8  # in one line
MIN_SHARE = 0.1  # of a step; a smaller delay does not matter, whatever the factor


@dataclass(frozen=True)
class RankPace:
    """The medians of one rank over a window."""

    rank: int
    host: str
    own_seconds: float  # per step, outside of collectives
    step_seconds: float  # from boundary to boundary


def timed_modules(layers: Sequence[nn.Module], engine: str, context_parallel: int = 1) -> list[nn.Module]:
    """The modules without a collective inside: the layers, or under ZeRO-3 what it gathers as one; under context
    parallel without attention, which waits for the other tokens."""
    if engine != "zero-3" and context_parallel == 1:
        return list(layers)

    def computes_alone(module: nn.Module) -> bool:
        waits = context_parallel > 1 and hasattr(module, "layer_idx")  # as transformers' attention modules have
        as_one = getattr(module, "gathers_at_once", False) or next(module.parameters(recurse=False), None) is not None
        return as_one and not waits

    return [module for layer in layers for module in layer.modules() if computes_alone(module)]


class ComputeClock:
    """Adds up this rank's own seconds: the training forward of `modules`, and the blocks inside `also()`.

    GPU time is measured with events on the stream, after the wait for the gathered weights, and read a step later, when
    the device has passed them. Create it after the engine: its hooks must run inside the engine's.
    """

    def __init__(self, modules: Sequence[nn.Module], device: torch.device) -> None:
        self._device = device
        self._seconds = self._seconds_before = 0.0  # of blocks: since the last call of `take`, and of the one before
        self._passes: list[tuple[Moment, Moment]] = []
        self._passes_before: list[tuple[Moment, Moment]] = []
        self._depth = 0
        self._began: Any = None
        for module in modules:
            module.register_forward_pre_hook(self._enter)
            # always_call: recomputation leaves a module by an exception once it has what it needs.
            module.register_forward_hook(self._leave, prepend=True, always_call=True)

    def take(self) -> float:
        """Own seconds between the two calls before this one, 0 until then; for step boundaries, where the forward
        passes of the step before the last one are done."""
        seconds = self._seconds_before
        for began, ended in self._passes_before:
            ended.wait()
            seconds += began.seconds_until(ended)
        self._seconds_before, self._seconds = self._seconds, 0.0
        self._passes_before, self._passes = self._passes, []
        return seconds

    @contextlib.contextmanager
    def also(self) -> Iterator[None]:
        """Count the wall time of a block on the host."""
        began = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - began

    def _enter(self, _module: nn.Module, _args: Any) -> None:
        if torch.is_grad_enabled():  # an evaluation is not a step
            self._depth += 1
            if self._depth == 1:
                self._began = Moment(self._device)

    def _leave(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        self._depth -= 1
        if self._depth == 0:
            self._passes.append((self._began, Moment(self._device)))


class StragglerWatch:
    """Compares the ranks' own seconds every `window` steps; `report` receives a line when the slow ranks change."""

    def __init__(self, config: StragglerConfig, clock: ComputeClock, report: Callable[[str], None]) -> None:
        self._config, self._clock, self._report = config, clock, report
        self._own_seconds: list[float] = []
        self._step_seconds: list[float] = []
        self._boundaries: list[float] = []  # when the last two were
        self._slow_ranks: list[int] = []

    def boundary(self) -> None:
        """Call between two steps, before the first collective of the next. Collective every `window` calls."""
        now, own = time.perf_counter(), self._clock.take()
        if len(self._boundaries) == 2:
            self._own_seconds.append(own)
            self._step_seconds.append(self._boundaries[1] - self._boundaries[0])
        self._boundaries = [*self._boundaries[-1:], now]
        if len(self._own_seconds) == self._config.window:
            self._compare()

    def _compare(self) -> None:
        mine = [socket.gethostname(), statistics.median(self._own_seconds), statistics.median(self._step_seconds)]
        self._own_seconds.clear()
        self._step_seconds.clear()
        paces = [RankPace(number, *pace) for number, pace in enumerate(gather_json(mine))]
        slow = stragglers(paces, self._config.factor)
        slow_ranks = [pace.rank for pace in slow]
        if slow_ranks != self._slow_ranks:
            line = straggler_line(slow, paces)
            self._report(line)
            if rank() in slow_ranks:
                LOGGER.info("%s", line)
        self._slow_ranks = slow_ranks


def stragglers(paces: Sequence[RankPace], factor: float) -> list[RankPace]:
    """Ranks whose own time is more than `factor` times the median and a tenth of a step above it, slowest first.

    The lower median: between two ranks, the mean of both would hide the slow one.
    """
    usual = statistics.median_low(pace.own_seconds for pace in paces)
    slow = [
        pace
        for pace in paces
        if pace.own_seconds > factor * usual and pace.own_seconds - usual > MIN_SHARE * pace.step_seconds
    ]
    return sorted(slow, key=lambda pace: -pace.own_seconds)


def straggler_line(slow: Sequence[RankPace], paces: Sequence[RankPace]) -> str:
    """The message about the slow ranks; `status` recognises it by its first word."""
    if not slow:
        return "straggler: no rank is slow any more"
    usual = statistics.median_low(pace.own_seconds for pace in paces)
    named = [
        f"rank {pace.rank} (host {pace.host}) spends {pace.own_seconds:.3g} s per step outside of collectives"
        for pace in slow[:NAMED_RANKS]
    ]
    more = f" and {len(slow) - NAMED_RANKS} more" if len(slow) > NAMED_RANKS else ""
    return (
        f"straggler: {'; '.join(named)}{more}; the median of {len(paces)} ranks is {usual:.3g} s, "
        f"a step takes {statistics.median_low(pace.step_seconds for pace in paces):.3g} s"
    )
