"""Held-out loss at several scales of what a run trained, to choose the scale of a merge."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dist_cpt.config.load import load_recipe
from dist_cpt.config.resolve import resolve_paths
from dist_cpt.config.schema import RunConfig
from dist_cpt.data.loader import ValidationLoader
from dist_cpt.data.prepare import prepare
from dist_cpt.data.tokenizer import load_run_tokenizer
from dist_cpt.errors import ConfigError
from dist_cpt.export.checkpoint_model import find_base
from dist_cpt.export.merge import Blend, merged_model, untrained_model
from dist_cpt.model.architectures import parts_of
from dist_cpt.model.attention import choose, install
from dist_cpt.model.loss import CausalLMForLoss, install_loss_head
from dist_cpt.run_folder.names import RECIPE


def sweep(
    checkpoint: Path, scales: Sequence[float], *, base: str | None = None
) -> Iterator[tuple[float, dict[str, float]]]:
    """(scale, {validation set: mean loss in nats per target token}) for W = base + scale x (trained - base), in fp32.

    The sets are those of the recipe in the checkpoint's run folder, packed as in training; missing token stores are
    prepared again.

    Raises:
        ConfigError: no recipe beside it, no validation set, a classifier, or a run from scratch.
        CheckpointError: another base than the run had.
        DataError: a validation set cannot be read.
    """
    config = _recipe(checkpoint)
    sets = _held_out(config)
    folder = find_base(checkpoint, base)
    model, _ = merged_model(checkpoint, folder)
    blend = Blend(model, untrained_model(checkpoint, folder, base))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = _with_loss(model, device)
    for scale in scales:
        blend.set(scale)
        yield scale, {loader.name: _loss(module, loader, device) for loader in sets}


def _recipe(checkpoint: Path) -> RunConfig:
    path = checkpoint.parent.parent / RECIPE
    if not path.is_file():
        raise ConfigError(
            f"--sweep: no {RECIPE} in {checkpoint.parent.parent}", remedy="give a run, or a checkpoint inside one"
        )
    config = resolve_paths(load_recipe(path))
    if config.task == "classify":
        raise ConfigError("--sweep measures language models; this run is task: classify", remedy="leave --sweep out")
    if not config.data.validation:
        raise ConfigError(f"--sweep: {path} has no data.validation", remedy="leave --sweep out")
    return config


def _held_out(config: RunConfig) -> list[ValidationLoader]:
    tokenizer: Any = load_run_tokenizer(config)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    prepared = prepare(config)
    return [
        ValidationLoader(source, config.data.seq_len, pad_id, config.evaluate.max_blocks)
        for source in prepared.validation
    ]


def _with_loss(model: Any, device: torch.device) -> CausalLMForLoss:
    choice = choose(device, model.config, dtype=torch.float32)
    softcap = getattr(model.config, "final_logit_softcapping", None)
    install_loss_head(parts_of(model).head, use_reference=False, softcap=softcap)
    install(model, choice)
    return CausalLMForLoss(model, choice).to(device).eval()


@torch.no_grad()
def _loss(module: CausalLMForLoss, loader: ValidationLoader, device: torch.device) -> float:
    total, targets = 0.0, 0
    for index in range(loader.num_blocks):
        batch = loader.batch([index]).to(device)
        loss = module(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen, batch.labels)
        total += float(loss[1])
        targets += batch.num_targets
    return total / targets if targets else math.nan
