"""Loss spikes: a loss far above the recent ones, and what follows from bad steps.

The device decides whether an update is applied, and the host reads the loss of a step while the next one is computed:
what is a spike at step n follows from the losses up to step n - 2, wherever a run was stopped and resumed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from dist_cpt.config.schema import SpikeConfig

Verdict = Literal["continue", "stop", "rollback"]

STD_FLOOR = 0.005  # nats: a loss that hardly varies has no spikes of a few hundredths


@dataclass(frozen=True)
class SpikeWindow:
    """The good losses up to step n, in nats per token, and the limits of the steps that follow."""

    losses: tuple[float, ...] = ()  # oldest first
    limit: float = math.inf  # of step n + 1: from the losses up to step n - 1

    def limit_after_next(self, config: SpikeConfig) -> float:
        """The limit of step n + 2."""
        if len(self.losses) < config.min_history:
            return math.inf
        mean = math.fsum(self.losses) / len(self.losses)
        std = math.sqrt(math.fsum((loss - mean) ** 2 for loss in self.losses) / len(self.losses))
        return mean + config.sigmas * max(std, STD_FLOOR)

    def observe(self, loss: float, bad_in_a_row: int, config: SpikeConfig) -> tuple[bool, SpikeWindow]:
        """(whether the loss of step n + 1 is a spike; the window after it). A non-finite loss never enters the window.

        `bad_in_a_row` counts the bad steps before this one. After max_bad_steps of them a spike is accepted as the
        new level: under a policy that continues, a run would report spikes for ever.

        Source: the threshold of OLMo-core's SkipStepOptimizer, whose window a NaN would poison.
        """
        spike = math.isfinite(loss) and loss > self.limit
        if spike and bad_in_a_row >= config.max_bad_steps:
            return False, SpikeWindow((loss,))
        good = math.isfinite(loss) and not spike
        losses = (*self.losses, loss)[-config.window :] if good else self.losses
        return spike, SpikeWindow(losses, self.limit_after_next(config))


def limit_on_device(window: SpikeWindow, unread: int, config: SpikeConfig) -> float:
    """The loss above which the next step's update is dropped, while the losses of `unread` steps, 0 or 1, that came
    after the window are not known; infinite under policies that apply it."""
    if config.policy not in ("skip", "rollback"):
        return math.inf
    return window.limit_after_next(config) if unread else window.limit


def verdict(bad_in_a_row: int, rollbacks: int, config: SpikeConfig) -> Verdict:
    """Whether a run continues after `bad_in_a_row` spikes or non-finite steps and `rollbacks` that were done.

    Under `off` and `stop`, optim.max_skipped_steps bounds how many steps in a row may be skipped as well.
    """
    if config.policy == "off" or bad_in_a_row < config.max_bad_steps:
        return "continue"
    return "rollback" if config.policy == "rollback" and rollbacks < config.max_rollbacks else "stop"
