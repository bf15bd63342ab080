"""One value per kind of row that a run records."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_cpt.config.schema import RunConfig
from dist_cpt.run_folder.train_state import SourceCounts


@dataclass(frozen=True)
class SourceSize:
    """A training source, and how often the whole run reads it."""

    name: str
    blocks: int  # sequences of data.seq_len
    tokens: int  # in them, padding aside
    epochs: float  # planned


@dataclass(frozen=True)
class RunStart:
    """The start of one attempt of a run: a fresh one at step 0, or a resumed one."""

    config: RunConfig
    folder: Path
    engine: str  # "single", "fsdp-full", "zero-3" ...
    world_size: int
    device: str
    num_steps: int
    first_step: int  # steps already done
    resumed_from: str | None  # checkpoint folder name
    wandb_run_id: str
    contract: dict[str, Any]  # the content of contract.json
    attempt: int  # as in StepRecord
    sources: tuple[SourceSize, ...] = ()


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step; a row of metrics.jsonl."""

    step: int  # from 1
    loss: float  # mean over the step's target tokens, nats
    grad_norm: float | None  # None when it was not finite
    skipped: bool  # the update was not applied
    skipped_total: int
    lr: dict[str, float]  # by group
    position: tuple[int, int]  # global blocks consumed before and after
    num_tokens: int  # target tokens of this step, all ranks
    tokens: int  # target tokens since step 0
    tokens_by_source: dict[str, int]  # non-padding tokens of this step
    tokens_per_second: float  # all ranks, this step
    step_seconds: float
    memory_gib: float  # peak of this rank: CUDA allocated, or resident set on CPU
    attempt: int  # 0 for the first start, +1 with every resume
    spike: bool = False  # the loss was far above the recent ones
    batch_tokens: int = 0  # since step 0, padding and tokens without a target included
    totals_by_source: Mapping[str, SourceCounts] = field(default_factory=dict)  # [blocks, tokens, targets] since step 0
    epochs_by_source: Mapping[str, float] | None = None  # of streamed sources; of others the blocks say it
    attention_max_over_mean: float | None = None  # over the groups of ranks, in each forward; None: one group
    mfu: float | None = None  # of the device's dense bf16 peak; None: no known denominator
    memory_bytes: Mapping[str, int] | None = None  # of this rank's device at its peak, by part; None without a GPU
    experts: Mapping[str, Any] | None = None  # `load` and `unused` by layer, `balance_loss`, `z_loss`; None: no mixture

    def efficiency_by_chart(self) -> dict[str, float]:
        """What is known of MFU and of the ranks' balance."""
        values = {"mfu": self.mfu, "attention_max_over_mean": self.attention_max_over_mean}
        return {f"train/{key}": value for key, value in values.items() if value is not None}

    def experts_by_chart(self) -> dict[str, float]:
        """Over all layers: the highest load, the mean fraction of experts without a token; the routers' losses."""
        if self.experts is None:
            return {}
        unused = self.experts["unused"]
        losses = {f"experts/{key}": self.experts[key] for key in ("balance_loss", "z_loss") if key in self.experts}
        return {"experts/load": max(self.experts["load"]), "experts/unused": sum(unused) / len(unused), **losses}


@dataclass(frozen=True)
class HeldOut:
    """Loss over one set: nats per target token, over all ranks; `num_bytes` of text are behind the targets."""

    loss: float
    num_tokens: int
    num_bytes: int = 0  # not counted
    by_position: Sequence[Sequence[float]] = ()  # (first position in a document, loss, targets) of each range of them

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """The whole loss in bits by bytes of text: comparable between tokenizers."""
        return self.loss * self.num_tokens / math.log(2) / self.num_bytes if self.num_bytes else None


@dataclass(frozen=True)
class EvaluationRecord:
    """One held-out set at one step; a row of evaluations.jsonl."""

    step: int
    name: str
    role: str  # domain | retention | task
    loss: float | None  # nats per token; None of a task, which has scores
    perplexity: float | None
    num_tokens: int  # targets: tokens, or texts of task classify
    attempt: int
    scores: dict[str, float] = field(default_factory=dict)  # of a classifier, whose loss is the log-loss; of a task
    bits_per_byte: float | None = None  # of the targets' text; None where its bytes cannot be told
    base_loss: float | None = None  # of the same targets under the base; None: it was not measured
    loss_by_position: Sequence[Sequence[float]] = ()  # [first position in a document, nats per token, targets] by range

    @property
    def loss_rise(self) -> float | None:
        """Nats per token over the base."""
        return None if self.base_loss is None or self.loss is None else self.loss - self.base_loss


@dataclass(frozen=True)
class CheckpointRecord:
    step: int
    path: str
    seconds: float  # from the first file to the last rename
    num_bytes: int
    stall_seconds: float  # for which training waited


@dataclass(frozen=True)
class RunEnd:
    exit_code: int
    reason: str
    step: int
