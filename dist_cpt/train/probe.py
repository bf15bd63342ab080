"""The data order at a position and the model's loss there: recorded by a checkpoint, replayed on a resume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dist_cpt.config.resolve import StepShape
from dist_cpt.data.loader import PADDING
from dist_cpt.data.stream_loader import Loader
from dist_cpt.engines.engine import Engine
from dist_cpt.runtime.env import ProcessEnv
from dist_cpt.train.evaluate import evaluate
from dist_cpt.train.progress import Progress

PROBE_BLOCKS = 4


@dataclass(frozen=True)
class Stream:
    """The training stream under the model as it is now."""

    engine: Engine
    loader: Loader
    shape: StepShape
    env: ProcessEnv

    def next_block_ids(self, progress: Progress) -> list[int]:
        """The ids of the next step's blocks, flat: what the data order gives, not what was asked for."""
        ids: list[int] = []
        start = progress.next_position
        for position in range(start, start + self.shape.blocks_per_step):
            ids += self.loader.block_id(position)
        return ids

    def probe_loss(self, positions: Sequence[int]) -> float:
        """Mean loss of a few blocks of the training stream, in nats per target token, without gradients. Collective."""
        share = self.shape.share(self.env.rank)
        return evaluate(self.engine, self.loader.batch, positions, PADDING, share, micro_batch=1).loss
