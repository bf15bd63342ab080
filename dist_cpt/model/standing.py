"""What a new adapter stands on beside its base: an earlier adapter, folded in or stacked, shown to be in effect."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dist_cpt.adapters.earlier import STANDS_ON, EarlierAdapter, open_earlier, refusal
from dist_cpt.config.schema import ContinueFromConfig, RunConfig
from dist_cpt.model.loss import CausalLMForLoss

_LOGIT_ROWS = 64  # positions of each probe block whose logits are compared


@dataclass(frozen=True)
class ProbeBlock:
    """Packed blocks on which an earlier adapter is shown; fields as in Batch."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int


@dataclass(frozen=True)
class Standing:
    """An earlier adapter in place; `proof` holds losses on the probe, None on ranks that were given none."""

    earlier: EarlierAdapter
    chosen: ContinueFromConfig
    proof: dict[str, float] | None

    def identity(self, base: dict[str, Any]) -> dict[str, Any]:
        """What manifests say: the recipe of the sum, and one hash for it."""
        how = {"mode": self.chosen.mode, **self.earlier.identity}
        text = json.dumps([base["sha256"], base.get("weights"), base.get("weights_quantisation"), how], sort_keys=True)
        return {STANDS_ON: how | {"sha256": hashlib.sha256(text.encode()).hexdigest()}}

    def note(self, base_path: str | None) -> dict[str, Any]:
        """Keys of adapter_config.json: a base name that no loader finds, and what it would have to be."""
        verb = {"fold": "with the adapter {} folded in", "stack": "under the adapter {}"}[self.chosen.mode]
        return {
            "base_model_name_or_path": f"{base_path} {verb.format(self.earlier.folder)}",
            "revision": None,
            STANDS_ON: {
                "base": base_path,
                "adapter": str(self.earlier.folder),
                "adapter_sha256": self.earlier.sha256,
                "mode": self.chosen.mode,
                "note": "not an adapter of the base alone: dist-cpt merge --base-only writes what it belongs to",
            },
        }

    def finish(self, causal_lm: Any, dtype: torch.dtype) -> None:
        """With the new adapter in place: stack, and give matrices that train their fp32 values back."""
        if self.chosen.mode == "stack":
            self.earlier.stack(causal_lm, dtype)
        self.earlier.put_vocabulary(causal_lm.get_base_model())


def stand_on(
    module: CausalLMForLoss,
    config: RunConfig,
    chosen: ContinueFromConfig,
    base_sha256: str,
    probe: Sequence[ProbeBlock] | None,
) -> Standing:
    """Open the adapter of `chosen` and fold it into `module`, or only set its vocabulary matrices if it is stacked.

    With `probe` blocks the losses and logits before and after are kept. `module` is still a causal LM: a classifier
    drops its head afterwards, and the loss of the next token is then what shows the adapter.

    Raises:
        ConfigError: not an adapter, not of this base, or its trained matrices would silently freeze.
        CheckpointError: damaged.
    """
    model = module.hf_model
    earlier = open_earlier(Path(chosen.path), None if chosen.other_base else base_sha256)
    earlier.require_fit(model)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    trained, dropped = set(config.embeddings.train), {"lm_head"} if config.task == "classify" else set()
    left = sorted(earlier.words(model).keys() - trained - dropped) if not (tied and trained) else []
    if left and not chosen.freeze_embeddings:
        raise refusal(
            earlier.folder,
            f"trained {' and '.join(left)} in full, and here they would stay frozen",
            f"set embeddings.train: [{', '.join(sorted({*trained, *left}))}], or "
            "adapter.continue_from.freeze_embeddings: true to keep them as they are",
        )
    if probe is not None and config.task == "classify":
        probe = [replace(block, labels=next_tokens(block)) for block in probe]
    training = module.training
    module.eval()
    before = _answer(module, probe)
    earlier.put_vocabulary(model)
    with earlier.beside(model):
        beside = _answer(module, probe)
    folded = None
    if chosen.mode == "fold":
        earlier.fold(model)
        folded = _answer(module, probe)
    module.train(training)
    return Standing(earlier, chosen, None if probe is None else _proof(before, beside, folded))


def next_tokens(block: ProbeBlock) -> torch.Tensor:
    """Labels [B, L] of language modelling: the next token of the same document, or -100."""
    labels, starts = block.input_ids.roll(-1, 1), block.position_ids.roll(-1, 1) == 0
    starts[:, -1] = True
    return labels.masked_fill(starts, -100)


def _proof(before: Any, beside: Any, folded: Any) -> dict[str, float]:
    proof = {"loss_without": before[0], "loss_with": beside[0]}
    if folded is not None:
        gap = (folded[1] - beside[1]).abs()
        proof = {"loss_without": before[0], "loss_beside": beside[0], "loss_with": folded[0]}
        proof |= {"logit_gap_max": float(gap.max()), "logit_gap_mean": float(gap.mean())}
        proof |= {"logit_effect_mean": float((beside[1] - before[1]).abs().mean())}
    return proof


@torch.no_grad()
def _answer(module: CausalLMForLoss, probe: Sequence[ProbeBlock] | None) -> tuple[float, torch.Tensor] | None:
    """(mean loss, fp32 logits [rows, V] at evenly spread positions) over the probe blocks."""
    if probe is None:
        return None
    head = module.hf_model.get_output_embeddings()
    loss, targets, logits = 0.0, 0, []
    for block in probe:
        ids, positions, borders, labels = (
            t.to(head.weight.device) for t in (block.input_ids, block.position_ids, block.cu_seqlens, block.labels)
        )
        hidden = module.hidden(ids, positions, borders, block.max_seqlen).flatten(0, 1)
        loss += float(head(hidden, labels.flatten(), 1.0)[1])
        targets += int((block.labels != -100).sum())
        logits.append(head(hidden[:: max(1, len(hidden) // _LOGIT_ROWS)]).float())
    return loss / targets, torch.cat(logits)
