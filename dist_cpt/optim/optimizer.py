"""AdamW on fp32 masters: the update of every engine."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from dist_cpt_kernels import adamw_, adamw_8bit_, bias_corrections
from dist_cpt_kernels.dispatch import available
from dist_cpt_kernels.self_test import ALLOWED, self_test_adamw

from dist_cpt.config.schema import OptimConfig
from dist_cpt.errors import ConfigError, config_error_on_failure
from dist_cpt.optim.eight_bit import BLOCK, EightBit, tables

SLICE_ELEMENTS = (
    1 << 20
)  # of the gradients that are in fp32, and of the 8-bit moments that are dequantised, at one time
assert SLICE_ELEMENTS % BLOCK == 0


@dataclass(frozen=True)
class Part:
    """Named gradients, fp32 or bf16, with the rate and the decay of their group."""

    names: Sequence[str]
    grads: Sequence[torch.Tensor]
    lr: float
    weight_decay: float


class Clip(NamedTuple):
    """What a step does to every gradient, decided on the device: fp32 [] each."""

    factor: torch.Tensor
    skip: torch.Tensor  # 1: the update is not applied

    def to(self, device: torch.device) -> Clip:
        """Where the update runs; a host sync if that is the host."""
        return Clip(self.factor.to(device), self.skip.to(device))


class AdamW:
    """Named fp32 masters (flat or shaped, whole or one rank's part) with their moments and one step counter.

    The counter, fp32 [] on the device, is the same for all tensors, as in every engine. `update` may be called for a
    few tensors at a time. The moments of the tensors in `eight_bit` are stored in 8 bit between updates; the arithmetic
    is the same. On a GPU one kernel updates a whole part and refreshes its compute copies; elsewhere torch's fused
    AdamW runs over SLICE_ELEMENTS at a time. Masters in host memory are updated there: gradients and compute copies may
    be on another device.
    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, algorithm 2, with bias correction.
    """

    def __init__(
        self,
        masters: Mapping[str, torch.Tensor],
        optim: OptimConfig,
        eight_bit: Collection[str] = (),
        kernels: str = "auto",
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
        device = next(iter(masters.values())).device if masters else torch.device("cpu")
        self.steps = torch.zeros((), device=device)
        self._betas, self._eps = optim.betas, optim.eps
        self._use_kernel = kernels != "reference" and available(self.steps)
        if device.type == "cuda" and self._use_kernel:
            _require_right_kernel(device)

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

    def update(
        self, parts: Sequence[Part], clip: Clip | None = None, copies: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Apply `parts` as pieces of update number `steps + 1`, without a host sync; the caller then raises `steps`.

        Gradients are clipped as `clip` says, fp32 ones in place. `copies`, by name and all of one dtype, receive the
        new masters, rounded.
        """
        step = self.steps + 1
        corrections = bias_corrections(step, self._betas)
        stale: dict[str, torch.Tensor] = {}  # copies that the update itself does not write
        for part in parts:
            given = {name: grad for name, grad in zip(part.names, part.grads, strict=True) if grad.numel()}
            if self._use_kernel:
                self._launch(given, corrections, part, clip, copies)
                continue
            for pieces in self._portions(given):
                self._update_pieces(pieces, step, part, clip)
            stale |= {name: copies[name] for name in given} if copies is not None else {}
        if stale and next(iter(stale.values())).device == self.steps.device:
            torch._foreach_copy_(list(stale.values()), [self.masters[name] for name in stale])
        else:
            for name, copy in stale.items():
                _send(self.masters[name], copy)

    def _launch(
        self,
        grads: Mapping[str, torch.Tensor],
        corrections: Any,
        part: Part,
        clip: Clip | None,
        copies: Mapping[str, torch.Tensor] | None,
    ) -> None:
        """One kernel for the gradients of each dtype, and one for those of tensors with 8-bit moments."""
        options: dict[str, Any] = {"corrections": corrections, "lr": part.lr, "weight_decay": part.weight_decay}
        options |= {"betas": self._betas, "eps": self._eps}
        factor, skip = clip or Clip(torch.ones_like(self.steps), torch.zeros_like(self.steps))
        options |= {"grad_factor": factor, "skip": skip}
        for packed, dtype in {(name in self.eight_bit, grad.dtype) for name, grad in grads.items()}:
            names = [n for n, grad in grads.items() if (n in self.eight_bit, grad.dtype) == (packed, dtype)]
            lists = [self.masters[name] for name in names], [grads[name].contiguous() for name in names]
            options["copies"] = None if copies is None else [copies[name] for name in names]
            if packed:
                codes, code_sqs = (
                    [(self.eight_bit[name][kind].codes, self.eight_bit[name][kind].scales) for name in names]
                    for kind in ("exp_avg", "exp_avg_sq")
                )
                adamw_8bit_(*lists, codes, code_sqs, tables(self.steps.device), **options)
            else:
                exp_avgs, exp_avg_sqs = ([kind[n] for n in names] for kind in (self.exp_avg, self.exp_avg_sq))
                adamw_(*lists, exp_avgs, exp_avg_sqs, **options)

    def _portions(self, grads: Mapping[str, torch.Tensor]) -> Iterator[list[tuple[str, slice, torch.Tensor]]]:
        """(name, elements, flat gradient) of pieces, SLICE_ELEMENTS at most together."""
        portion: list[tuple[str, slice, torch.Tensor]] = []
        num_elements = 0
        for name, grad in grads.items():
            start = 0
            for piece in grad.reshape(-1).split(SLICE_ELEMENTS):
                if portion and num_elements + piece.numel() > SLICE_ELEMENTS:
                    yield portion
                    portion, num_elements = [], 0
                portion.append((name, slice(start, start + piece.numel()), piece))
                start, num_elements = start + piece.numel(), num_elements + piece.numel()
        if portion:
            yield portion

    def _update_pieces(
        self, pieces: Sequence[tuple[str, slice, torch.Tensor]], step: torch.Tensor, part: Part, clip: Clip | None
    ) -> None:
        """torch's fused AdamW over pieces of flattened tensors; of one with 8-bit moments a piece is whole blocks."""
        grads = _in_fp32([grad for _, _, grad in pieces], self.steps.device)
        if clip is not None:
            torch._foreach_mul_(grads, clip.factor)
        exp_avgs, exp_avg_sqs = (
            [
                self.eight_bit[name][kind].read(where.start, where.stop)
                if name in self.eight_bit
                else self.read(kind, name)[where]
                for name, where, _ in pieces
            ]
            for kind in ("exp_avg", "exp_avg_sq")
        )
        options: dict[str, Any] = {"lr": part.lr, "weight_decay": part.weight_decay, "eps": self._eps}
        options |= {"beta1": self._betas[0], "beta2": self._betas[1], "amsgrad": False, "maximize": False}
        torch._fused_adamw_(
            [self.masters[name].view(-1)[where] for name, where, _ in pieces],
            grads,
            exp_avgs,
            exp_avg_sqs,
            [],
            [step] * len(pieces),
            found_inf=None if clip is None else clip.skip,
            **options,
        )
        for (name, where, _), exp_avg, exp_avg_sq in zip(pieces, exp_avgs, exp_avg_sqs, strict=True):
            if name in self.eight_bit:
                self.eight_bit[name]["exp_avg"].write(exp_avg, where.start)
                self.eight_bit[name]["exp_avg_sq"].write(exp_avg_sq, where.start)


@cache
def _require_right_kernel(device: torch.device) -> None:
    """Compare the kernel on this device with its specification, once.

    Raises:
        ConfigError: it does not run there, or differs by more than rounding.
    """
    with config_error_on_failure(f"model.kernels: the update fails on {device}", "use model.kernels: reference"):
        error = self_test_adamw(device)
    if not error <= ALLOWED[torch.float32]:
        raise ConfigError(
            f"model.kernels: on {device} the relative error of the update is {error:.1e}, allowed "
            f"{ALLOWED[torch.float32]:.0e}",
            remedy="use model.kernels: reference",
        )


def _in_fp32(grads: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Flat gradients in fp32 on `device`: those that are, and copies of the others in one buffer."""
    others = [index for index, grad in enumerate(grads) if grad.dtype != torch.float32 or grad.device != device]
    right = list(grads)
    if others:
        sizes = [grads[index].numel() for index in others]
        buffers = torch.empty(sum(sizes), device=device).split(sizes)
        torch._foreach_copy_(list(buffers), [grads[index] for index in others])
        for index, buffer in zip(others, buffers, strict=True):
            right[index] = buffer
    return right


def _send(master: torch.Tensor, copy: torch.Tensor) -> None:
    """Round a master in host memory into its copy on a GPU, through pinned memory: one slice leaves, one is rounded."""
    for piece, target in zip(master.view(-1).split(SLICE_ELEMENTS), copy.view(-1).split(SLICE_ELEMENTS), strict=True):
        rounded = torch.empty(piece.shape, dtype=copy.dtype, pin_memory=True).copy_(piece)
        target.copy_(rounded, non_blocking=True)


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
        if not self.parts:
            return
        assert self.adam is not None
        updated = []
        for group in self.param_groups:
            grads: dict[str, torch.Tensor] = {}
            for flat in group["params"]:
                for name, offset, number in self.parts.get(id(flat), ()):
                    assert flat.grad is not None, f"no gradient for {name}"
                    grads[name] = flat.grad.view(-1).narrow(0, offset, number)
            updated.append(Part(list(grads), list(grads.values()), group["lr"], group["weight_decay"]))
        self.adam.update(updated)
