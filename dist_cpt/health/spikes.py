"""Loss spikes: a loss far above the recent ones, and whether its update is applied."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Literal

from dist_cpt.config.schema import SpikeConfig

Decision = Literal["apply", "skip", "stop", "rollback"]

STD_FLOOR = 0.005  # nats: a loss that hardly varies has no spikes of a few hundredths


class SpikeDetector:
    """Compares each loss with the good ones before it; deterministic, so that all ranks decide alike."""

    def __init__(self, config: SpikeConfig, state: Sequence[float] = ()) -> None:
        self._config = config
        self._losses: deque[float] = deque(state, maxlen=config.window)

    def observe(self, loss: float, bad_in_a_row: int) -> bool:
        """Whether `loss` (nats per token) is a spike; a good one enters the window, a non-finite one never does.

        `bad_in_a_row` counts the bad steps before this one. After max_bad_steps of them a spike is accepted as the
        new level: under a policy that continues, a run would report spikes for ever.

        Source: the threshold of OLMo-core's SkipStepOptimizer, whose window a NaN would poison.
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
        """The window, oldest first, as the constructor takes it."""
        return list(self._losses)

    def _threshold(self) -> float:
        count = len(self._losses)
        mean = math.fsum(self._losses) / count
        std = math.sqrt(math.fsum((loss - mean) ** 2 for loss in self._losses) / count)
        return mean + self._config.sigmas * max(std, STD_FLOOR)


def decide(*, finite: bool, spike: bool, bad_in_a_row: int, rollbacks: int, config: SpikeConfig) -> Decision:
    """Whether a step's update is applied or skipped, or the run stops or rolls back.

    `bad_in_a_row` includes this step; `rollbacks` counts those already done. A non-finite update is never applied;
    under `off` and `stop`, optim.max_skipped_steps bounds how many in a row are tolerated.
    """
    if finite and not spike:
        return "apply"
    allowed: Decision = "apply" if finite and config.policy in ("off", "stop") else "skip"
    if config.policy == "off" or bad_in_a_row < config.max_bad_steps:
        return allowed
    return "rollback" if config.policy == "rollback" and rollbacks < config.max_rollbacks else "stop"
