"""What the data order and the model say at a position of the stream, for a checkpoint and for its proof."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dist_cpt.config.resolve import StepShape
from dist_cpt.data.loader import PADDING, BlockLoader
from dist_cpt.engines.engine import Engine
from dist_cpt.runtime.env import ProcessEnv
from dist_cpt.train.evaluate import evaluate
from dist_cpt.train.loop import past_windows

PROBE_BLOCKS = 4


@dataclass(frozen=True)
class Stream:
    """The training stream under the model as it is now."""

    engine: Engine
    loader: BlockLoader
    shape: StepShape
    env: ProcessEnv

    def next_block_ids(self, position: int, windows: Sequence[tuple[int, int]]) -> list[int]:
        """(source, epoch, block) of the next step's blocks, flat: what the data order gives, not what was asked."""
        ids: list[int] = []
        start = past_windows(position, windows)
        for at in range(start, start + self.shape.blocks_per_step):
            source, epoch, block = self.loader.describe(at)
            ids += [self.loader.source_names.index(source), epoch, block]
        return ids

    def probe_loss(self, positions: Sequence[int]) -> float:
        """Mean loss of a few blocks of the training stream, without a gradient."""
        return evaluate(
            self.engine,
            self.loader.batch,
            positions,
            PADDING,
            rank=self.env.rank,
            world_size=self.env.world_size,
            micro_batch=1,
        ).loss
