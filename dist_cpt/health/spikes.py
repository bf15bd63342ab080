"""Loss spikes: a loss far above the recent ones, and what becomes of its update."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Literal

from dist_cpt.config.schema import SpikeConfig

Decision = Literal["apply", "skip", "stop", "rollback"]

STD_FLOOR = 0.005  # nats: a loss that hardly varies has no spikes of a few hundredths


class SpikeDetector:
    """Compares each loss with the good ones before it; every rank that sees the same losses says the same."""

    def __init__(self, config: SpikeConfig, state: Sequence[float] = ()) -> None:
        self._config = config
        self._losses: deque[float] = deque(state, maxlen=config.window)

    def observe(self, loss: float, bad_in_a_row: int) -> bool:
        """Whether `loss` (nats per token) is a spike; a good one enters the window, a non-finite one never does.

        `bad_in_a_row` counts the bad steps before this one. After max_bad_steps of them a spike is taken as the
        new level, so that a run whose policy lets it go on does not complain for ever.

        Source: the threshold of OLMo-core's SkipStepOptimizer, without its window that a NaN poisons.
        """
        if not math.isfinite(loss):
            return False
        spike = len(self._losses) >= self._config.min_history and loss > self._threshold()
        if spike and bad_in_a_row >= self._config.max_bad_steps:
            self._losses.clear()
            spike = False
        if not spike:
            self._losses.append(loss)
        return spike

    def state(self) -> list[float]:
        """The window, oldest first; the constructor takes it back."""
        return list(self._losses)

    def _threshold(self) -> float:
        number = len(self._losses)
        mean = math.fsum(self._losses) / number
        std = math.sqrt(math.fsum((loss - mean) ** 2 for loss in self._losses) / number)
        return mean + self._config.sigmas * max(std, STD_FLOOR)


def decide(*, finite: bool, spike: bool, bad_in_a_row: int, rollbacks: int, config: SpikeConfig) -> Decision:
    """What becomes of a step's update, from its loss and gradient norm.

    `bad_in_a_row` counts this step too; `rollbacks` are those already done. A non-finite step is never applied;
    under `off` and `stop`, how many of them a run bears is optim.max_skipped_steps.
    """
    if finite and not spike:
        return "apply"
    allowed: Decision = "apply" if finite and config.policy in ("off", "stop") else "skip"
    if config.policy == "off" or bad_in_a_row < config.max_bad_steps:
        return allowed
    return "rollback" if config.policy == "rollback" and rollbacks < config.max_rollbacks else "stop"
