"""Where the tokens of a mixture go while it trains: the load of every expert, and the losses that balance the routers.

T tokens, K experts per token, E experts. Only tokens with a target count. Routers are watched through hooks within the
decoder layers, so that a layer that backward runs again saves the same tensors again and no logits are kept for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from dist_cpt.adapters.experts import routers_of
from dist_cpt.adapters.language_model import decoder_of
from dist_cpt.config.schema import RunConfig
from dist_cpt.errors import ConfigError
from dist_cpt.plan.families import FAMILIES
from dist_cpt.runtime.log import LOGGER

IGNORE_INDEX = -100


class Routing:
    """What the routers of a model decide in training, added up over an optimizer step on this rank's device."""

    def __init__(self, routers: Sequence[Any], balance: float = 0.0, z: float = 0.0) -> None:
        """`balance` and `z` are the coefficients of the two losses; with neither, routing is watched alone."""
        self.coefficients = {"balance": balance, "z": z}
        self.num_layers, self._num_experts = len(routers), len(routers[0].weight)
        self._target_T: torch.Tensor | None = None  # bool: whether it has a target
        self._watching = False
        # of the forward under way, by layer: tokens [E], sums of probabilities [E] and of squared log-sum-exps []
        self._counts: list[torch.Tensor] = []
        self._probabilities: list[torch.Tensor] = []
        self._squares: list[torch.Tensor] = []
        self._totals: torch.Tensor | None = None  # fp64 [2 + layers * E] of the step: both losses, tokens
        for router in routers:
            router.register_forward_hook(self._note)

    @property
    def has_losses(self) -> bool:
        """Whether `loss` returns anything."""
        return any(self.coefficients.values())

    @contextmanager
    def watching(self, labels_T: torch.Tensor) -> Iterator[None]:
        """Watch one forward over tokens with these labels."""
        self._target_T = labels_T != IGNORE_INDEX
        self._counts, self._probabilities, self._squares = [], [], []
        self._watching = True
        try:
            yield
        finally:
            self._watching = False

    def loss(self) -> torch.Tensor | None:
        """What the forward's tokens add to the sum of token losses, [] in fp32 or fp64; None without coefficients.

        Each loss is the mean over the forward's tokens and layers times its number of tokens: divided by the targets
        of the step, the forwards of all ranks add up to a mean over tokens.
        Source: load_balancing_loss_func of transformers 5.23, after Fedus et al. 2021, Switch Transformers
        (arXiv 2101.03961), equations 4 to 6; Zoph et al. 2022, ST-MoE (arXiv 2202.08906), equation 5.
        """
        assert self._target_T is not None
        counts_LE = torch.stack(self._counts)
        losses = counts_LE.new_zeros(2)
        total = None
        if self.has_losses:
            probabilities_E = torch.stack(self._probabilities).sum(0)
            rows = self._target_T.sum().clamp(min=1) * self.num_layers  # without a target all sums are 0
            balance = (counts_LE.sum(0).to(probabilities_E.dtype) * probabilities_E).sum() * self._num_experts
            pair = torch.stack([balance / rows, torch.stack(self._squares).sum()]) / self.num_layers
            losses = pair.detach().double()
            total = self.coefficients["balance"] * pair[0] + self.coefficients["z"] * pair[1]
        totals = torch.cat([losses, counts_LE.flatten()])
        self._totals = totals if self._totals is None else self._totals + totals
        return total

    def take(self) -> torch.Tensor:
        """fp64 [2 + layers * E]: the step's totals on this rank, which are summed over ranks before `summary`."""
        assert self._totals is not None, "a step without a micro-batch"
        totals, self._totals = self._totals, None
        return totals

    def summary(self, totals: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """fp64 [2 + 2 * layers] of a step of `num_tokens` targets: both losses as means over its tokens, and by layer
        the tokens of its busiest expert over the mean and the fraction of its experts without a token."""
        counts_LE = totals[2:].view(self.num_layers, -1)
        busiest_L = counts_LE.amax(1) / counts_LE.mean(1).clamp(min=1e-9)
        unused_L = (counts_LE == 0).double().mean(1)
        return torch.cat([totals[:2] / num_tokens, busiest_L, unused_L])

    def as_record(self, summary: Sequence[float]) -> dict[str, Any]:
        """A summary that the host has read, as metrics.jsonl has it."""
        layers = self.num_layers
        losses = dict(zip(("balance_loss", "z_loss"), summary[:2], strict=True)) if self.has_losses else {}
        load, unused = (summary[start : start + layers] for start in (2, 2 + layers))
        return losses | {"load": [round(x, 4) for x in load], "unused": [round(x, 4) for x in unused]}

    def _note(self, router: Any, _: Any, output: tuple[torch.Tensor, ...]) -> None:
        if self._target_T is None or not (router.training and torch.is_grad_enabled()):
            return
        logits_TE, _weights, index_TK = output
        if self.has_losses:  # in a recomputation too, which must save what the forward saved
            logits_TE = logits_TE if logits_TE.dtype == torch.float64 else logits_TE.float()
            target_T = self._target_T.to(logits_TE.dtype)
            probabilities_E = target_T @ logits_TE.softmax(-1)
            squares = target_T @ logits_TE.logsumexp(-1).square()
            if self._watching:
                self._probabilities.append(probabilities_E)
                self._squares.append(squares)
        if self._watching:
            tokens_TK = self._target_T[:, None].expand_as(index_TK).double()
            counts_E = tokens_TK.new_zeros(self._num_experts)
            self._counts.append(counts_E.index_add_(0, index_TK.flatten(), tokens_TK.flatten()))


def watch_routers(model: Any, config: RunConfig) -> Routing | None:
    """Watch the routers of a transformers model in the table of model types; None without any.

    Raises:
        ConfigError: routers are to train, and there are none or their model has no balancing loss.
    """
    hf_config = model.config.get_text_config()
    kind, asked, z = hf_config.model_type, config.model.router, config.model.router_z_loss
    routers = [router for _, router in routers_of(decoder_of(model))] if kind in FAMILIES else []
    balance = getattr(hf_config, "router_aux_loss_coef", None)
    if not routers:
        if asked == "train" or z:
            key = "model.router: train" if asked == "train" else f"model.router_z_loss: {z}"
            raise ConfigError(f"{key}: {kind} has no routers, or they are not known here", remedy="leave it out")
        return None
    if asked == "train" and balance is None:
        raise ConfigError(
            f"model.router: train: {kind} has no balancing loss in its config",
            remedy="leave it out; under an adapter its routers stay frozen",
        )
    if asked == "frozen" or (config.adapter.kind == "lora" and asked is None):
        return Routing(routers)
    if balance is None:
        LOGGER.warning("%s has no balancing loss in its config: its routers train without one", kind)
    return Routing(routers, balance or 0.0, z)
