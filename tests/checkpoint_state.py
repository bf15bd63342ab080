"""A training state for checkpoint tests: every rank holds only its slice, as under a sharding engine."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dist_cpt.checkpoint.load import LoadedCheckpoint
from dist_cpt.checkpoint.save import CheckpointInfo, RunCheckpoints, save
from dist_cpt.run_folder.manifest import Identity
from dist_cpt.run_folder.train_state import Probe, Randomness, TrainState
from dist_cpt.runtime.collectives import rank, world_size
from dist_cpt.training_state import STATE_KINDS, ExportedTensor, ExportState, OwnerOf, StateKind, TensorSpec
from tests.claimed import claimed

LORA_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
LORA_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
EMBED = "base_model.model.model.embed_tokens.weight"
HEAD = "base_model.model.lm_head.weight"
SPECS = (
    TensorSpec(LORA_A, (4, 32), "bfloat16", "adapter"),
    TensorSpec(LORA_B, (33, 4), "bfloat16", "adapter"),
    TensorSpec(EMBED, (61, 32), "bfloat16", "embeddings"),
)
FULL_SPECS = (
    TensorSpec("model.embed_tokens.weight", (61, 32), "bfloat16", "embeddings"),
    TensorSpec("model.layers.0.self_attn.q_proj.weight", (32, 32), "bfloat16", "weights"),
    TensorSpec("model.norm.weight", (32,), "bfloat16", "no_decay"),
)
IDENTITY = Identity({"path": "/base", "sha256": "b" * 64}, {"sha256": "d" * 64}, "f" * 64, "fsdp-full")


def expected(seed: int, kind: str, spec: TensorSpec) -> torch.Tensor:
    """The full tensor of a state, a function of its seed alone."""
    generator = torch.Generator().manual_seed(hash((seed, STATE_KINDS.index(kind), len(spec.name), *spec.shape)))
    return torch.randn(spec.shape, generator=generator)


class ShardedState:
    """The trainable tensors of one rank: its slice of each, zero elsewhere."""

    def __init__(self, seed: int, specs: tuple[TensorSpec, ...] = SPECS) -> None:
        self.specs = specs
        self.parts = {
            (kind, spec.name): self._slice(expected(seed, kind, spec)) for spec in specs for kind in STATE_KINDS
        }

    def export_state(self, owner_of: OwnerOf, kinds: Sequence[StateKind] = STATE_KINDS) -> Iterator[ExportedTensor]:
        for spec in self.specs:
            for kind in kinds:
                full = self.parts[kind, spec.name].clone()
                if world_size() > 1:
                    dist.all_reduce(full)
                yield ExportedTensor(kind, spec.name, full if owner_of(kind, spec.name) == rank() else None)

    def import_state(self, checkpoint: LoadedCheckpoint) -> None:
        for spec in self.specs:
            for kind in STATE_KINDS:
                start, stop = self._bounds(math.prod(spec.shape))
                flat = torch.zeros(math.prod(spec.shape))
                flat[start:stop] = checkpoint.read(kind, spec.name, start, stop)
                self.parts[kind, spec.name] = flat.view(spec.shape)

    def _slice(self, full: torch.Tensor) -> torch.Tensor:
        start, stop = self._bounds(full.numel())
        part = torch.zeros_like(full)
        part.view(-1)[start:stop] = full.view(-1)[start:stop]
        return part

    @staticmethod
    def _bounds(num_elements: int) -> tuple[int, int]:
        share = -(-num_elements // world_size())
        return min(rank() * share, num_elements), min((rank() + 1) * share, num_elements)


def train_state(step: int, attempt: int = 0) -> TrainState:
    return TrainState(
        step=step,
        position=8 * step,
        tokens=1000 * step,
        tokens_by_source={"law": 900 * step, "web": 100 * step},
        skipped_total=0,
        random=Randomness(seed=7, step=step),
        schedule={"kind": "cosine"},
        wandb_run_id="run7",
        attempt=attempt,
        optimizer_steps=step,
        next_block_ids=tuple(range(8 * step, 8 * step + 8)),
        probe=Probe(block_ids=(0, 1), loss=1 / 3),
    )


def write_adapter_config(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))


def write_model_config(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def save_step(
    run_folder: Path,
    step: int,
    *,
    attempt: int = 0,
    seed: int | None = None,
    state: TrainState | None = None,
    export: ExportState | None = None,
    trial: bool = False,
    **changes: Any,
) -> CheckpointInfo:
    """Save a whole state whose values are a function of the step (or of `seed`); `changes` are of `RunCheckpoints`."""
    specs = changes.get("specs", SPECS)
    full = specs is FULL_SPECS
    run = RunCheckpoints(
        claim=claimed(run_folder, attempt),
        specs=specs,
        identity=IDENTITY,
        adapter=not full,
        sidecars=[write_model_config if full else write_adapter_config],
    )
    export = export or ShardedState(step if seed is None else seed, specs).export_state
    return save(replace(run, **changes), export, state or train_state(step, attempt), trial=trial)


def matches(checkpoint: LoadedCheckpoint, seed: int, specs: tuple[TensorSpec, ...] = SPECS) -> bool:
    """Whether every tensor is bit for bit that of `seed`."""
    return all(
        torch.equal(
            checkpoint.read(kind, spec.name, 0, math.prod(spec.shape)).view(spec.shape), expected(seed, kind, spec)
        )
        for spec in specs
        for kind in STATE_KINDS
    )
