"""What a new adapter stands on beside its base: an earlier adapter, folded in or stacked, shown to be in effect."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dist_cpt.adapters.prior_adapter import STANDS_ON, EarlierAdapter, open_earlier, refusal
from dist_cpt.config.schema import ContinueFromConfig, RunConfig
from dist_cpt.model.loss import CausalLMForLoss

_LOGIT_ROWS = 64  # positions of each probe block whose logits are compared
_VISIBLE = 0.2  # an adapter that does less than this share of what rounding does is not to be seen in logits


@dataclass(frozen=True)
class ProbeBlock:
    """Packed blocks on which an earlier adapter is shown; fields as in Batch."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int


@dataclass(frozen=True)
class Answer:
    """What a model says to the probe: mean loss; fp32 logits [rows, V] spread over it; and, on the CPU, [blocks, V]
    after the first document of each block."""

    loss: float
    spread: torch.Tensor
    last: torch.Tensor


@dataclass(frozen=True)
class Standing:
    """An earlier adapter in place; `proof` holds losses on the probe, `without` and `within` the last logits, as in
    Answer, without it and with it. All are None on ranks that were given no probe."""

    earlier: EarlierAdapter
    chosen: ContinueFromConfig
    proof: dict[str, float] | None
    without: torch.Tensor | None = None
    within: torch.Tensor | None = None

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

    def share_in_effect(self, last: torch.Tensor) -> float | None:
        """How much of what the adapter does to logits is in an engine's, [blocks, V] as in Answer: 1 for all of it, 0
        for none; None where the adapter does less than rounding. On its rank with the probe.

        The component along the adapter's own effect: rounding goes other ways, so that an effect far too small to
        show in a mean loss shows here.
        """
        assert self.without is not None
        assert self.within is not None
        effect, found = self.within - self.without, last.cpu() - self.without
        if not float(effect.norm()) > _VISIBLE * float((found - effect).norm()):
            return None
        return float((effect * found).sum() / effect.square().sum())

    def under_classes(self, module: CausalLMForLoss, probe: Sequence[ProbeBlock] | None) -> Standing:
        """With `class_loss` in the proof: that of a classifier's new head over base and earlier adapter."""
        if self.proof is None or probe is None:
            return self
        stacked = self.chosen.mode == "stack"  # not yet under the model
        head, dtype = module.hf_model.score, module.hf_model.get_input_embeddings().weight.dtype
        master, head.weight.data = head.weight.data, head.weight.data.to(dtype)  # as an engine computes with it
        with torch.no_grad(), self.earlier.beside(module.hf_model) if stacked else nullcontext():
            answers = [module(*_on(module, b), b.max_seqlen, b.labels.to(_device(module))) for b in probe]
        head.weight.data = master
        targets = sum(int((block.labels != -100).sum()) for block in probe)
        return replace(self, proof=self.proof | {"class_loss": float(sum(a[1] for a in answers)) / targets})

    def finish(self, causal_lm: Any, dtype: torch.dtype) -> None:
        """With the new adapter in place: stack, and give matrices that train their fp32 values back."""
        if self.chosen.mode == "stack":
            self.earlier.stack(causal_lm, dtype)
        self.earlier.put_vocabulary(causal_lm.get_base_model())


def stand_on(
    module: CausalLMForLoss,
    config: RunConfig,
    chosen: ContinueFromConfig,
    base: dict[str, Any],
    probe: Sequence[ProbeBlock] | None,
) -> Standing:
    """Open the adapter of `chosen` and fold it into `module`, or only set its vocabulary matrices if it is stacked.
    `base` is the identity of what `module` is.

    With `probe` blocks the losses and logits before and after are kept. `module` is still a causal LM: a classifier
    drops its head afterwards, and the loss of the next token is then what shows the adapter.

    Raises:
        ConfigError: not an adapter, not of this base, or its trained matrices would silently freeze.
        CheckpointError: damaged.
    """
    model = module.hf_model
    earlier = open_earlier(Path(chosen.path), base, other_base=chosen.other_base)
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
    if before is None or beside is None:
        return Standing(earlier, chosen, None)
    return Standing(earlier, chosen, _proof(before, beside, folded), before.last, (folded or beside).last)


def next_tokens(block: ProbeBlock) -> torch.Tensor:
    """Labels [B, L] of language modelling: the next token of the same document, or -100."""
    labels, starts = block.input_ids.roll(-1, 1), block.position_ids.roll(-1, 1) == 0
    starts[:, -1] = True
    return labels.masked_fill(starts, -100)


def first_document(input_ids: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """The ids [1, L] of the first document of a block [1, seq_len]."""
    return input_ids[:, : int(cu_seqlens[1])]


def _proof(before: Answer, beside: Answer, folded: Answer | None) -> dict[str, float]:
    if folded is None:
        return {"loss_without": before.loss, "loss_with": beside.loss}
    gap = (folded.spread - beside.spread).abs()
    proof = {"loss_without": before.loss, "loss_beside": beside.loss, "loss_with": folded.loss}
    proof |= {"logit_gap_max": float(gap.max()), "logit_gap_mean": float(gap.mean())}
    return proof | {"logit_effect_mean": float((beside.spread - before.spread).abs().mean())}


@torch.no_grad()
def _answer(module: CausalLMForLoss, probe: Sequence[ProbeBlock] | None) -> Answer | None:
    if probe is None:
        return None
    head = module.hf_model.get_output_embeddings()
    loss, targets, logits, last = 0.0, 0, [], []
    for block in probe:
        hidden = module.hidden(*_on(module, block), block.max_seqlen).flatten(0, 1)
        loss += float(head(hidden, block.labels.to(hidden.device).flatten(), 1.0)[1])
        targets += int((block.labels != -100).sum())
        logits.append(head(hidden[:: max(1, len(hidden) // _LOGIT_ROWS)]).float())
        last.append(head(hidden[int(block.cu_seqlens[1]) - 1][None]).float().cpu())
    return Answer(loss / targets, torch.cat(logits), torch.cat(last))


def _on(module: CausalLMForLoss, block: ProbeBlock) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids, positions, borders = (t.to(_device(module)) for t in (block.input_ids, block.position_ids, block.cu_seqlens))
    return ids, positions, borders


def _device(module: CausalLMForLoss) -> torch.device:
    return next(module.parameters()).device
