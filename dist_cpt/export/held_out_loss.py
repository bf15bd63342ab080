"""Held-out sets and their loss under a plain fp32 model, packed as in training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dist_cpt.config.load import load_recipe
from dist_cpt.config.resolve import resolve_paths
from dist_cpt.config.schema import RunConfig
from dist_cpt.data.loader import ValidationLoader
from dist_cpt.data.prepare import prepare
from dist_cpt.data.text_bytes import TextBytes
from dist_cpt.data.tokenizer import load_run_tokenizer, padding_id
from dist_cpt.errors import ConfigError
from dist_cpt.model.architectures import parts_of
from dist_cpt.model.attention import choose, install
from dist_cpt.model.loss import CausalLMForLoss, install_loss_head
from dist_cpt.run_folder.names import RECIPE
from dist_cpt.run_folder.records import HeldOut


@dataclass(frozen=True)
class HeldOutSets:
    """Sets in the order of their recipe, and the bytes of its tokens."""

    loaders: list[ValidationLoader]
    text_bytes: TextBytes | None

    def losses(self, model: Any) -> dict[str, HeldOut]:
        """By set, under a plain model with its loss head."""
        return {loader.name: _loss(model, loader, self.text_bytes) for loader in self.loaders}


def recipe_of_run(checkpoint: Path, asked_by: str) -> RunConfig:
    """The recipe in the run folder of a checkpoint, with held-out sets for a language model.

    Raises:
        ConfigError: there is none; `asked_by` names what needs it.
    """
    path = checkpoint.parent.parent / RECIPE
    if not path.is_file():
        raise ConfigError(
            f"{asked_by}: no {RECIPE} in {checkpoint.parent.parent}", remedy="give a run, or a checkpoint inside one"
        )
    config = resolve_paths(load_recipe(path))
    if config.task == "classify":
        raise ConfigError(f"{asked_by} measures language models; this run is task: classify")
    if not config.data.validation:
        raise ConfigError(f"{asked_by}: {path} has no data.validation", remedy="give text that the run has not read")
    return config


def held_out_sets(config: RunConfig, *, of_sources: bool = False) -> HeldOutSets:
    """The held-out sets of a recipe, or `of_sources` its sources as such; missing token stores are prepared again."""
    tokenizer: Any = load_run_tokenizer(config)
    pad_id = padding_id(tokenizer)
    prepared = prepare(config)
    sets = prepared.sources if of_sources else prepared.validation
    loaders = [ValidationLoader(one, config.data.seq_len, pad_id, config.evaluate.max_blocks) for one in sets]
    return HeldOutSets(loaders, TextBytes.of(tokenizer))


def with_loss(model: Any) -> CausalLMForLoss:
    """A plain fp32 model as one that returns its loss, on the GPU if there is one; changed in place."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    choice = choose(device, model.config.get_text_config(), dtype=torch.float32)
    install_loss_head(parts_of(model).head, model.config, use_reference=False)
    install(model, choice)
    return CausalLMForLoss(model, choice).to(device).eval()


@torch.no_grad()
def _loss(module: CausalLMForLoss, loader: ValidationLoader, text_bytes: TextBytes | None) -> HeldOut:
    device = next(module.parameters()).device
    total, targets, size = 0.0, 0, 0
    for index in range(loader.num_blocks):
        batch = loader.batch([index])
        size += 0 if text_bytes is None else text_bytes.of_targets(batch)
        batch = batch.to(device)
        loss = module(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen, batch.labels)
        total += float(loss[1])
        targets += batch.num_targets
    return HeldOut(total / targets if targets else math.nan, targets, size)
