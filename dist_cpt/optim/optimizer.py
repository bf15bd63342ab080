"""AdamW on fp32 masters, wherever they lie: the update of the single and the FSDP2 engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from dist_cpt.config.schema import OptimConfig


class AdamW:
    """Named fp32 masters (flat or shaped, whole or one rank's part) with their moments and one step counter.

    The counter is one integer for all tensors, as every engine's is, and `update` may be called for a few
    tensors at a time, so that a caller need not hold every fp32 gradient at once.
    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, algorithm 2, with bias correction.
    """

    def __init__(self, masters: Mapping[str, torch.Tensor], optim: OptimConfig) -> None:
        self.masters = dict(masters)
        self.exp_avg = {name: torch.zeros_like(tensor) for name, tensor in masters.items()}
        self.exp_avg_sq = {name: torch.zeros_like(tensor) for name, tensor in masters.items()}
        self.steps = 0
        self._betas = optim.betas
        self._eps = optim.eps

    def read(self, kind: str, name: str) -> torch.Tensor:
        """The live fp32 values of `kind` master, exp_avg or exp_avg_sq, flat."""
        return {"master": self.masters, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}[kind][name].view(-1)

    def write(self, kind: str, name: str, values: torch.Tensor) -> None:
        """Replace them by flat fp32 `values` of the same number."""
        self.read(kind, name).copy_(values)

    def update(self, names: Sequence[str], grads: Sequence[torch.Tensor], lr: float, weight_decay: float) -> None:
        """Apply fp32 `grads` as part of update number `steps + 1`; the caller raises `steps` after the last part."""
        if names:
            self._apply(
                [self.masters[name] for name in names],
                list(grads),
                [self.exp_avg[name] for name in names],
                [self.exp_avg_sq[name] for name in names],
                lr,
                weight_decay,
            )

    def update_slice(self, name: str, start: int, grad: torch.Tensor, lr: float, weight_decay: float) -> None:
        """As `update`, for the elements of one flattened tensor from `start` that the flat fp32 `grad` covers."""
        piece = slice(start, start + grad.numel())
        master, exp_avg, exp_avg_sq = (
            kind[name].view(-1)[piece] for kind in (self.masters, self.exp_avg, self.exp_avg_sq)
        )
        self._apply([master], [grad], [exp_avg], [exp_avg_sq], lr, weight_decay)

    def _apply(
        self,
        masters: list[torch.Tensor],
        grads: list[torch.Tensor],
        exp_avgs: list[torch.Tensor],
        exp_avg_sqs: list[torch.Tensor],
        lr: float,
        weight_decay: float,
    ) -> None:
        step = torch.full((), float(self.steps + 1), dtype=torch.float32, device=grads[0].device)
        torch._fused_adamw_(
            masters,
            grads,
            exp_avgs,
            exp_avg_sqs,
            [],
            [step] * len(masters),
            lr=lr,
            beta1=self._betas[0],
            beta2=self._betas[1],
            weight_decay=weight_decay,
            eps=self._eps,
            amsgrad=False,
            maximize=False,
        )
