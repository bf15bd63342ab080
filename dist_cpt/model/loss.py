"""The module an engine wraps: token ids in, loss sum out, so that the loss lives inside the engine's forward.

B batch, L sequence, T = B * L tokens, D model, V vocab.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from dist_cpt_kernels import linear_cross_entropy, reference
from torch import nn

from dist_cpt.errors import ConfigError
from dist_cpt.model.architectures import TESTED
from dist_cpt.model.attention import Choice, install, packing_arguments


class LossHead(nn.Linear):
    """A head that is itself the loss: engines gather and free its weight around this module's forward."""

    use_reference = False  # the plain torch loss, which keeps the full logits
    softcap: float | None = None  # logits are softcap * tanh(logits / softcap)

    def forward(  # type: ignore[override]
        self, input: torch.Tensor, labels: torch.Tensor | None = None, scale: float = 1.0
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Logits [..., V] of hidden states; or, with `labels` [T], (scale * loss_sum, loss_sum) in fp32."""
        return self.answer(input, self.weight, labels, scale)

    def answer(
        self, input: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor | None, scale: float
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """As `forward`, with another `weight` [V, D]."""
        if labels is None:
            logits = F.linear(input, weight)
            return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
        loss = reference.linear_cross_entropy if self.use_reference else linear_cross_entropy
        return loss(input, weight, labels, scale=scale, softcap=self.softcap)


class CausalLMForLoss(nn.Module):
    """A transformers causal LM, plain or under an adapter, that answers with its loss.

    `causal_lm` is the model whose parameter names are saved; its backbone and its head are called one after
    the other, so the full logits never exist.
    """

    def __init__(self, causal_lm: nn.Module, attention: Choice) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.attention: Choice = attention

    @property
    def hf_model(self) -> Any:
        """The transformers model itself, inside an adapter or not."""
        inner = getattr(self.causal_lm, "get_base_model", None)
        return self.causal_lm if inner is None else inner()

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        labels: torch.Tensor | None = None,
        scale: float = 1.0,
    ) -> Any:
        """(scale * loss_sum, loss_sum) of `labels` int64 [B, L], fp32; fp32 logits [B, V] at the last position
        without labels. `input_ids`, `position_ids` [B, L], `cu_seqlens` and `max_seqlen` as in Batch.

        Numbers travel as Python numbers: an engine may cast floating-point tensor arguments to bf16.
        """
        hidden_BLD = self.hidden(input_ids, position_ids, cu_seqlens, max_seqlen)
        model = self.hf_model
        head = getattr(model, "score", None)  # of a sequence classifier
        if head is None:
            head = model.get_output_embeddings()
        if labels is None:
            return head(hidden_BLD[:, -1]).float()
        return head(hidden_BLD.flatten(0, 1), labels.flatten(), scale)

    def hidden(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
    ) -> torch.Tensor:
        """What the head reads, [B, L, D]."""
        packing = packing_arguments(self.attention, position_ids, cu_seqlens, max_seqlen)
        decoder = self.hf_model.get_decoder()
        return decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False, **packing).last_hidden_state


@torch.no_grad()
def prove_parts(model: Any) -> None:
    """Show, for an architecture no test covers, that backbone, packed attention and head give its own logits.

    Compares the last logits of the second of two packed documents with the model's own answer to that document
    alone, under its own attention code. Leaves the packed attention installed.

    Raises:
        ConfigError: they differ, so the model does something that this package does not do.
    """
    sizes = (7, 5)
    ids = torch.randint(0, model.config.vocab_size, (1, sum(sizes)), generator=torch.Generator().manual_seed(0))
    model.eval()
    head = model.get_output_embeddings()
    softcap, head.softcap = head.softcap, None  # the model itself caps what its head gives
    expected = model(input_ids=ids[:, sizes[0] :], use_cache=False).logits[0, -1].float()
    head.softcap = softcap
    install(model, "documents")
    position_ids = torch.cat([torch.arange(size) for size in sizes])[None]
    borders = torch.tensor([0, sizes[0], sum(sizes)], dtype=torch.int32)
    found = CausalLMForLoss(model, "documents")(ids, position_ids, borders, max(sizes))[0]
    error = float((found - expected).abs().max() / expected.abs().max())
    model.train()
    # Orders of summation differ; anything left out of the attention or of the head moves logits far more.
    allowed = 1e-4 if next(model.parameters()).dtype == torch.float32 else 3e-2
    if not error <= allowed:
        raise ConfigError(
            f"model type {model.config.model_type}: packed training would not compute this model: a document's "
            f"logits are off by {error:.1e} of their size, allowed {allowed:.0e}",
            remedy=f"use another architecture; tested: {', '.join(TESTED)}",
        )


def install_low_rank_head(head: Any) -> None:
    """Let PEFT's LoRA around a loss head answer with the loss as well; another head is left as it is."""
    if isinstance(getattr(head, "base_layer", None), LossHead):
        head.__class__ = type("LowRankLossHead", (type(head),), {"forward": _low_rank_answer})


def _low_rank_answer(
    wrapper: Any, input: torch.Tensor, labels: torch.Tensor | None = None, scale: float = 1.0
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """x W^T + s (x A^T) B^T as one product: features [x, s x A^T] with the matrix [W, B].

    W + s B A would round the update away in bf16. Costs a copy of W and its gradient for the time of the loss.
    """
    name = wrapper.active_adapters[0]
    low = F.linear(input, wrapper.lora_A[name].weight) * wrapper.scaling[name]
    matrix = torch.cat([wrapper.base_layer.weight, wrapper.lora_B[name].weight.to(input.dtype)], dim=1)
    return wrapper.base_layer.answer(torch.cat([input, low], dim=-1), matrix, labels, scale)


def install_loss_head(head: nn.Linear, *, use_reference: bool, softcap: float | None = None) -> None:
    """Turn a model's own head into the loss in place: same module, same Parameter, so a tie survives."""
    head.__class__ = LossHead
    assert isinstance(head, LossHead)
    head.use_reference = use_reference
    head.softcap = softcap
