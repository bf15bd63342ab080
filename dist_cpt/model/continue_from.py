"""A prior adapter under the one that trains, folded in or stacked, with evidence that it is in effect."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dist_cpt.adapters.peft_folder import PRIOR_KEY, refusal
from dist_cpt.adapters.prior_adapter import PriorAdapter, open_prior_adapter
from dist_cpt.config.schema import ContinueFromConfig, RunConfig
from dist_cpt.model.loss import CausalLMForLoss

_LOGIT_ROWS = 64  # positions of each probe block whose logits are compared
_MIN_EFFECT = 0.2  # of the error by rounding; below it an adapter's effect on logits cannot be measured


@dataclass(frozen=True)
class ProbeBlock:
    """A packed block on which the effect of a prior adapter is measured; fields as in Batch."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int


@dataclass(frozen=True)
class _ProbeOutput:
    """Mean loss; fp32 logits [rows, V] at positions spread over the probe, and [blocks, V], on the CPU, at the end of
    each block's first document."""

    loss: float
    spread: torch.Tensor
    last: torch.Tensor


@dataclass(frozen=True)
class PriorInUse:
    """A prior adapter in place. On the rank with the probe: losses as `evidence`, and logits [blocks, V] at the end of
    each block's first document without and with it."""

    adapter: PriorAdapter
    settings: ContinueFromConfig
    evidence: dict[str, float] | None
    logits_without: torch.Tensor | None = None
    logits_with: torch.Tensor | None = None

    def identity(self, base: dict[str, Any]) -> dict[str, Any]:
        """For manifests: what determines the sum of base and adapter, and one hash of it."""
        parts = {"mode": self.settings.mode, **self.adapter.identity}
        text = json.dumps(
            [base["sha256"], base.get("weights"), base.get("weights_quantisation"), parts], sort_keys=True
        )
        return {PRIOR_KEY: parts | {"sha256": hashlib.sha256(text.encode()).hexdigest()}}

    def adapter_config(self, base_path: str | None) -> dict[str, Any]:
        """Keys of adapter_config.json: a base name that no loader resolves, and the two folders it stands for."""
        phrase = {"fold": "with the adapter {} folded in", "stack": "under the adapter {}"}[self.settings.mode]
        return {
            "base_model_name_or_path": f"{base_path} {phrase.format(self.adapter.folder)}",
            "revision": None,
            PRIOR_KEY: {
                "base": base_path,
                "adapter": str(self.adapter.folder),
                "adapter_sha256": self.adapter.sha256,
                "mode": self.settings.mode,
                "note": "not an adapter of the base alone: dist-cpt merge --base-only writes what it belongs to",
            },
        }

    def share_in_effect(self, logits: torch.Tensor) -> float | None:
        """The share of the adapter's effect that an engine's `logits`, as `logits_with`, show: 1 for all of it.

        It is the component along the effect. Rounding points elsewhere, so an effect too small for a mean loss is
        still measured; None for one that is smaller than rounding. On the rank with the probe.
        """
        assert self.logits_without is not None
        assert self.logits_with is not None
        effect, change = self.logits_with - self.logits_without, logits.cpu() - self.logits_without
        if not float(effect.norm()) > _MIN_EFFECT * float((change - effect).norm()):
            return None
        return float((effect * change).sum() / effect.square().sum())

    def with_class_loss(self, module: CausalLMForLoss, probe: Sequence[ProbeBlock] | None) -> PriorInUse:
        """With `class_loss` as evidence: that of a classifier's new head over base and prior adapter."""
        if self.evidence is None or probe is None:
            return self
        stacked = self.settings.mode == "stack"  # not yet under the model
        head, dtype = module.hf_model.score, module.hf_model.get_input_embeddings().weight.dtype
        master, head.weight.data = head.weight.data, head.weight.data.to(dtype)  # as an engine computes with it
        with torch.no_grad(), self.adapter.beside(module.hf_model) if stacked else nullcontext():
            losses = [module(*_inputs(module, b), b.max_seqlen, b.labels.to(_device(module)))[1] for b in probe]
        head.weight.data = master
        targets = sum(int((block.labels != -100).sum()) for block in probe)
        return replace(self, evidence=self.evidence | {"class_loss": float(sum(losses)) / targets})

    def complete(self, causal_lm: Any, dtype: torch.dtype) -> None:
        """With the new adapter in place: stack, and restore the fp32 values of matrices that train."""
        if self.settings.mode == "stack":
            self.adapter.stack(causal_lm, dtype)
        self.adapter.copy_vocabulary(causal_lm.get_base_model())


def use_prior_adapter(
    module: CausalLMForLoss, config: RunConfig, base: dict[str, Any], probe: Sequence[ProbeBlock] | None
) -> PriorInUse:
    """Open the adapter of `adapter.continue_from` and fold it into `module`; stacked, only its vocabulary is copied.

    `base` is the identity of `module`. On `probe` blocks losses and logits before and after are recorded. `module` is
    still a causal LM: where a classifier follows, the loss of the next token is the evidence.

    Raises:
        ConfigError: not an adapter of this base, or its trained matrices would silently be frozen.
        CheckpointError: damaged.
    """
    model, settings = module.hf_model, config.adapter.continue_from
    assert settings is not None
    adapter = open_prior_adapter(Path(settings.path), base, other_base=settings.other_base)
    adapter.require_fit(model)
    _require_trained_vocabulary(adapter, model, config)
    if probe is not None and config.task == "classify":
        probe = [replace(block, labels=_next_tokens(block)) for block in probe]
    training = module.training
    module.eval()
    before = _run_probe(module, probe)
    adapter.copy_vocabulary(model)
    with adapter.beside(model):
        beside = _run_probe(module, probe)
    folded = None
    if settings.mode == "fold":
        adapter.fold(model)
        folded = _run_probe(module, probe)
    module.train(training)
    if before is None or beside is None:
        return PriorInUse(adapter, settings, None)
    return PriorInUse(adapter, settings, _evidence(before, beside, folded), before.last, (folded or beside).last)


def _next_tokens(block: ProbeBlock) -> torch.Tensor:
    """Labels [B, L] of language modelling: the next token of the same document, or -100."""
    labels, starts = block.input_ids.roll(-1, 1), block.position_ids.roll(-1, 1) == 0
    starts[:, -1] = True
    return labels.masked_fill(starts, -100)


def first_document(input_ids: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """The ids [1, L] of the first document of a block [1, seq_len]."""
    return input_ids[:, : int(cu_seqlens[1])]


def _require_trained_vocabulary(adapter: PriorAdapter, model: Any, config: RunConfig) -> None:
    """Refuse to freeze silently what the adapter trained in full."""
    settings = config.adapter.continue_from
    assert settings is not None
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    trained, dropped = set(config.embeddings.train), {"lm_head"} if config.task == "classify" else set()
    frozen = sorted(adapter.trained_vocabulary(model) - trained - dropped) if not (tied and trained) else []
    if frozen and not settings.freeze_embeddings:
        raise refusal(
            adapter.folder,
            f"trained {' and '.join(frozen)} in full, and here they would be frozen",
            f"set embeddings.train: [{', '.join(sorted({*trained, *frozen}))}], or "
            "adapter.continue_from.freeze_embeddings: true to keep them as they are",
        )


def _evidence(before: _ProbeOutput, beside: _ProbeOutput, folded: _ProbeOutput | None) -> dict[str, float]:
    if folded is None:
        return {"loss_without": before.loss, "loss_with": beside.loss}
    gap = (folded.spread - beside.spread).abs()
    losses = {"loss_without": before.loss, "loss_beside": beside.loss, "loss_with": folded.loss}
    gaps = {"logit_gap_max": float(gap.max()), "logit_gap_mean": float(gap.mean())}
    return losses | gaps | {"logit_effect_mean": float((beside.spread - before.spread).abs().mean())}


@torch.no_grad()
def _run_probe(module: CausalLMForLoss, probe: Sequence[ProbeBlock] | None) -> _ProbeOutput | None:
    if probe is None:
        return None
    head = module.hf_model.get_output_embeddings()
    loss, targets, logits, last = 0.0, 0, [], []
    for block in probe:
        hidden = module.hidden(*_inputs(module, block), block.max_seqlen).flatten(0, 1)
        loss += float(head(hidden, block.labels.to(hidden.device).flatten(), 1.0)[1])
        targets += int((block.labels != -100).sum())
        logits.append(head(hidden[:: max(1, len(hidden) // _LOGIT_ROWS)]).float())
        last.append(head(hidden[int(block.cu_seqlens[1]) - 1][None]).float().cpu())
    return _ProbeOutput(loss / targets, torch.cat(logits), torch.cat(last))


def _inputs(module: CausalLMForLoss, block: ProbeBlock) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    device = _device(module)
    return block.input_ids.to(device), block.position_ids.to(device), block.cu_seqlens.to(device)


def _device(module: CausalLMForLoss) -> torch.device:
    return next(module.parameters()).device
