"""AdamW on fp32 masters: the update of every engine."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from dist_cpt.config.schema import OptimConfig
from dist_cpt.optim.eight_bit import BLOCK, EightBit

SLICE_ELEMENTS = 1 << 20  # of a tensor with 8-bit moments that are dequantised at one time
assert SLICE_ELEMENTS % BLOCK == 0


class AdamW:
    """Named fp32 masters (flat or shaped, whole or one rank's part) with their moments and one step counter.

    The counter is one integer for all tensors, as in every engine. `update` may be called for a few tensors at a time,
    so that not every fp32 gradient is in memory at once. The moments of the tensors in `eight_bit` are stored in 8 bit
    between updates; the arithmetic is the same.
    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, algorithm 2, with bias correction.
    """

    def __init__(
        self, masters: Mapping[str, torch.Tensor], optim: OptimConfig, eight_bit: Collection[str] = ()
    ) -> None:
        self.masters = dict(masters)
        plain = {name: tensor for name, tensor in masters.items() if name not in eight_bit}
        self.exp_avg = {name: torch.zeros_like(tensor) for name, tensor in plain.items()}
        self.exp_avg_sq = {name: torch.zeros_like(tensor) for name, tensor in plain.items()}
        self.eight_bit = {
            name: {
                kind: EightBit(masters[name].numel(), signed=kind == "exp_avg", device=masters[name].device)
                for kind in ("exp_avg", "exp_avg_sq")
            }
            for name in masters
            if name in eight_bit
        }
        self.steps = 0
        self._options = {"beta1": optim.betas[0], "beta2": optim.betas[1], "eps": optim.eps}
        self._options |= {"amsgrad": False, "maximize": False}

    def read(self, kind: str, name: str) -> torch.Tensor:
        """The flat fp32 values of `kind` master, exp_avg or exp_avg_sq; a view, or a copy of 8-bit moments."""
        if kind != "master" and name in self.eight_bit:
            return self.eight_bit[name][kind].read()
        return {"master": self.masters, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}[kind][name].view(-1)

    def write(self, kind: str, name: str, values: torch.Tensor) -> None:
        """Replace them by flat fp32 `values`."""
        if kind != "master" and name in self.eight_bit:
            self.eight_bit[name][kind].write(values.to(self.masters[name].device))
        else:
            self.read(kind, name).copy_(values)

    def moments(self) -> list[torch.Tensor]:
        """Every tensor that stores moments."""
        packed = [moment for kinds in self.eight_bit.values() for moment in kinds.values()]
        parts = [part for moment in packed for part in (moment.codes, moment.scales)]
        return [*self.exp_avg.values(), *self.exp_avg_sq.values(), *parts]

    def update(self, names: Sequence[str], grads: Sequence[torch.Tensor], lr: float, weight_decay: float) -> None:
        """Apply fp32 `grads` as part of update number `steps + 1`; the caller raises `steps` after the last part."""
        given = dict(zip(names, grads, strict=True))
        for name in names:
            if name in self.eight_bit:
                for number, piece in enumerate(given.pop(name).reshape(-1).split(SLICE_ELEMENTS)):
                    self.update_slice(name, number * SLICE_ELEMENTS, piece, lr, weight_decay)
        if given:
            self._apply(
                [self.masters[name] for name in given],
                list(given.values()),
                [self.exp_avg[name] for name in given],
                [self.exp_avg_sq[name] for name in given],
                lr,
                weight_decay,
            )

    def update_slice(self, name: str, start: int, grad: torch.Tensor, lr: float, weight_decay: float) -> None:
        """As `update`, for the elements of one flattened tensor from `start` that the flat fp32 `grad` covers.

        With 8-bit moments `start` is a multiple of BLOCK, and so is the length unless the tensor ends there.
        """
        piece = slice(start, start + grad.numel())
        master = self.masters[name].view(-1)[piece]
        if name not in self.eight_bit:
            exp_avg, exp_avg_sq = (kind[name].view(-1)[piece] for kind in (self.exp_avg, self.exp_avg_sq))
            self._apply([master], [grad], [exp_avg], [exp_avg_sq], lr, weight_decay)
            return
        moments = self.eight_bit[name]
        exp_avg, exp_avg_sq = (moments[kind].read(piece.start, piece.stop) for kind in ("exp_avg", "exp_avg_sq"))
        self._apply([master], [grad], [exp_avg], [exp_avg_sq], lr, weight_decay)
        moments["exp_avg"].write(exp_avg, start)
        moments["exp_avg_sq"].write(exp_avg_sq, start)

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
        steps = [step] * len(masters)
        rates: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, **self._options}
        torch._fused_adamw_(masters, grads, exp_avgs, exp_avg_sqs, [], steps, **rates)


class FlatAdamW(torch.optim.Optimizer):
    """The same update behind torch's optimizer interface, for an owner of flat fp32 buffers such as deepspeed.

    `parts` maps the id of a flat buffer to (name, offset, number of elements) of each master in it; while it is empty,
    `step` does nothing. The owner counts the steps in `adam`.
    """

    def __init__(self, groups: list[dict[str, object]]) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        self.adam: AdamW | None = None
        self.parts: dict[int, list[tuple[str, int, int]]] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Apply the gradients of the flat buffers that are in the groups now."""
        for group in self.param_groups:
            for flat in group["params"]:
                for name, offset, number in self.parts.get(id(flat), ()):
                    assert self.adam is not None
                    assert flat.grad is not None, f"no gradient for {name}"
                    grad = flat.grad.view(-1).narrow(0, offset, number)
                    self.adam.update([name], [grad], group["lr"], group["weight_decay"])
