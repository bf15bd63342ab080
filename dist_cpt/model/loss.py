"""The module that an engine wraps: token ids in, loss sum out, so that the loss is part of the engine's forward.

B batch, L sequence, T = B * L tokens, D model, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from dist_cpt_kernels import linear_cross_entropy, reference
from torch import nn

from dist_cpt.adapters.language_model import decoder_of
from dist_cpt.model.architectures import logit_scale
from dist_cpt.model.attention import Choice, packing_arguments
from dist_cpt.model.context_parallel import HeadExchange
from dist_cpt.model.routing import IGNORE_INDEX, Routing

FIRST_BIN = 64  # positions; each further bin ends at four times the position


class LossRecorder:
    """Loss and targets of an evaluation by bins of tokens."""

    def __init__(self, num_bins: int) -> None:
        self.sums = torch.zeros(num_bins, 2, dtype=torch.float64)  # loss, targets
        self._bin_T = torch.empty(0)

    def place(self, position_ids: torch.Tensor) -> None:
        """Given the positions [B, L] of the tokens whose loss is next."""
        self._bin_T = self.bins_of(position_ids.flatten())

    def bins_of(self, position_T: torch.Tensor) -> torch.Tensor:
        """The bin of each token, int64 [T]."""
        raise NotImplementedError

    def add(
        self, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], input: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """The sum of `loss(input, labels)` over the bins, fp32 []; host sync."""
        total = torch.zeros((), dtype=torch.float32, device=input.device)
        for number in range(len(self.sums)):
            index = ((self._bin_T == number) & (labels != IGNORE_INDEX)).nonzero()[:, 0]
            if len(index):
                part = loss(input[index], labels[index])
                self.sums[number] += torch.tensor([float(part), len(index)], dtype=torch.float64)
                total += part
        return total


class PositionLosses(LossRecorder):
    """By position within documents, in bins 0-63, 64-255, 256-1023 and so on."""

    def __init__(self, longest: int, device: torch.device) -> None:
        edges = [FIRST_BIN]
        while edges[-1] < longest:
            edges.append(4 * edges[-1])
        super().__init__(len(edges))
        self.starts = [0, *edges[:-1]]
        self._edges = torch.tensor(edges[:-1], device=device)

    def bins_of(self, position_T: torch.Tensor) -> torch.Tensor:
        return torch.bucketize(position_T, self._edges, right=True)


class DocumentLosses(LossRecorder):
    """By document, in the order of a forward: each begins at position 0."""

    def bins_of(self, position_T: torch.Tensor) -> torch.Tensor:
        return (position_T == 0).cumsum(0) - 1


class LossHead(nn.Linear):
    """An output head that computes the loss: engines gather and free its weight around this module's forward."""

    use_reference = False  # the plain torch loss, which materialises the full logits
    softcap: float | None = None  # logits are softcap * tanh(logits / softcap)
    recorder: LossRecorder | None = None  # of the evaluation that is under way
    logit_scale: float = 1.0  # of the product, before the softcap

    def forward(  # type: ignore[override]
        self, input: torch.Tensor, labels: torch.Tensor | None = None, scale: float = 1.0
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Logits [..., V] of hidden states; with `labels` int64 [T], (scale * loss_sum, loss_sum) in fp32."""
        return self.forward_with(self.weight, input, labels, scale)

    def forward_with(
        self, weight: torch.Tensor, input: torch.Tensor, labels: torch.Tensor | None, scale: float
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """`forward` with `weight` [V, D] instead of the module's own."""
        # A power of two scales exactly; any other factor rounds the hidden states once, as their product is anyway.
        input = input if self.logit_scale == 1.0 else input * self.logit_scale
        if labels is None:
            logits = F.linear(input, weight)
            return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
        function = reference.linear_cross_entropy if self.use_reference else linear_cross_entropy
        if self.recorder is None or self.training:
            return function(input, weight, labels, scale=scale, softcap=self.softcap)
        summed = partial(function, scale=1.0, softcap=self.softcap)
        loss = self.recorder.add(lambda x, y: summed(x, weight, y)[1], input, labels)
        return scale * loss, loss


class CausalLMForLoss(nn.Module):
    """A transformers causal LM, with or without an adapter, that returns its loss.

    `causal_lm` is the model whose parameter names are saved; its backbone and its head are called separately, so
    the full logits are never materialised.
    """

    def __init__(self, causal_lm: nn.Module, attention: Choice) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.attention: Choice = attention
        self.exchange: HeadExchange | None = None  # among the ranks that each block may be cut over
        self.routing: Routing | None = None  # of a mixture of experts

    @property
    def hf_model(self) -> Any:
        """The transformers model, without the adapter around it."""
        inner = getattr(self.causal_lm, "get_base_model", None)
        return self.causal_lm if inner is None else inner()

    @property
    def head(self) -> Any:
        """The output head, or a sequence classifier's."""
        score = getattr(self.hf_model, "score", None)
        return self.hf_model.get_output_embeddings() if score is None else score

    @property
    def loss_head(self) -> LossHead:
        """The head under its adapter, if it has one."""
        return getattr(self.head, "base_layer", self.head)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        labels: torch.Tensor | None = None,
        scale: float = 1.0,
        num_parts: int = 1,
    ) -> Any:
        """(scale * loss_sum, loss_sum), fp32, for `labels` int64 [B, L]; without, fp32 logits [B, V] of the last token.

        In training the first of the two includes the losses of routers that train.

        `input_ids`, `position_ids` [B, L], `cu_seqlens`, `max_seqlen` and `num_parts` as in Batch. `scale` is a Python
        number, since an engine may cast floating-point tensor arguments to bf16.
        """
        watches = labels is not None and self.training and torch.is_grad_enabled()
        routing = self.routing if watches else None
        with nullcontext() if routing is None or labels is None else routing.watching(labels.flatten()):
            hidden_BLD = self.hidden(input_ids, position_ids, cu_seqlens, max_seqlen, num_parts)
        if labels is None:
            return self.head(hidden_BLD[:, -1]).float()
        if (recorder := self.loss_head.recorder) is not None:
            recorder.place(position_ids)
        scaled, loss_sum = self.head(hidden_BLD.flatten(0, 1), labels.flatten(), scale)
        if routing is not None and (router_loss := routing.loss()) is not None:
            scaled = scaled + scale * router_loss
        return scaled, loss_sum

    def hidden(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        num_parts: int = 1,
    ) -> torch.Tensor:
        """The hidden states that the head reads, [B, L, D]."""
        exchange = self.exchange if num_parts > 1 else None
        packing = packing_arguments(self.attention, position_ids, cu_seqlens, max_seqlen, exchange)
        decoder = decoder_of(self.hf_model)
        return decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False, **packing).last_hidden_state


def install_low_rank_head(head: Any) -> None:
    """Make PEFT's LoRA around a loss head return the loss as well; another head is not changed."""
    if isinstance(getattr(head, "base_layer", None), LossHead):
        head.__class__ = type("LowRankLossHead", (type(head),), {"forward": _low_rank_forward})


def _low_rank_forward(
    wrapper: Any, input: torch.Tensor, labels: torch.Tensor | None = None, scale: float = 1.0
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """x W^T + s (x A^T) B^T as one product: features [x, s x A^T] with the matrix [W, B].

    W + s B A would lose the update to rounding in bf16. Costs a copy of W and its gradient during the loss.
    """
    name = wrapper.active_adapters[0]
    low = F.linear(input, wrapper.lora_A[name].weight) * wrapper.scaling[name]
    matrix = torch.cat([wrapper.base_layer.weight, wrapper.lora_B[name].weight.to(input.dtype)], dim=1)
    return wrapper.base_layer.forward_with(matrix, torch.cat([input, low], dim=-1), labels, scale)


def install_loss_head(head: nn.Linear, hf_config: Any, *, use_reference: bool) -> None:
    """Turn a model's head into the loss in place: the module and its Parameter stay the same, and so does a tie."""
    text_config = hf_config.get_text_config()
    head.__class__ = LossHead
    assert isinstance(head, LossHead)
    head.use_reference = use_reference
    head.softcap = getattr(text_config, "final_logit_softcapping", None)
    head.logit_scale = logit_scale(text_config)
