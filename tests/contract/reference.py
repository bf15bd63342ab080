"""The specification of a training run: one process, fp32, plain torch, nothing of the engines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dist_cpt.config.schema import RunConfig
from dist_cpt.optim.groups import ParamGroup
from tests.contract.model import BLOCKS_PER_STEP, block, num_tokens


@dataclass(frozen=True)
class ReferenceStep:
    """One step. `magnitudes` are the norms of the sums of the blocks' |gradient|, by name, and `exposure` is
    the sum over all elements of learning rate x that sum: what rounding errors are proportional to."""

    loss_sum: float
    grad_norm: float
    norms: dict[str, float]
    largest: dict[str, float]
    magnitudes: dict[str, float]
    exposure: float


def learning_rates(groups: Sequence[ParamGroup], step: int) -> dict[str, float]:
    """A warm-up over the first 5 steps, another rate for each group."""
    return {group.name: group.peak_lr * min(1.0, step / 5) for group in groups}


def reference_run(
    module: nn.Module,
    trainable: Mapping[str, nn.Parameter],
    groups: Sequence[ParamGroup],
    config: RunConfig,
    steps: int,
) -> list[ReferenceStep]:
    """Accumulate every block's gradient, clip by the global norm, AdamW; all in fp32."""
    beta1, beta2 = config.optim.betas
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in trainable.items()}
    record = []
    for step in range(1, steps + 1):
        loss_sum, grads, magnitudes = gradients_of(module, trainable, step)
        lrs = learning_rates(groups, step)
        norms = {name: float(grad.double().norm()) for name, grad in grads.items()}
        norm = math.sqrt(sum(value**2 for value in norms.values()))
        record.append(
            ReferenceStep(
                loss_sum,
                norm,
                norms,
                {name: float(grad.abs().max()) for name, grad in grads.items()},
                {name: float(value.double().norm()) for name, value in magnitudes.items()},
                sum(lrs[group.name] * float(magnitudes[name].sum()) for group in groups for name in group.names),
            )
        )
        factor = min(1.0, config.optim.max_grad_norm / (norm + 1e-6))
        for group in groups:
            lr = lrs[group.name]
            for name in group.names:
                p, grad = trainable[name].data, grads[name] * factor
                mean, square = moments[name]
                mean.mul_(beta1).add_(grad, alpha=1 - beta1)
                square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                p.mul_(1 - lr * group.weight_decay)
                scale = (square / (1 - beta2**step)).sqrt_().add_(config.optim.eps)
                p.addcdiv_(mean, scale, value=-lr / (1 - beta1**step))
    return record


def gradients_of(
    module: nn.Module, trainable: Mapping[str, nn.Parameter], step: int
) -> tuple[float, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Sum of token losses, gradient of (sum / tokens) and sum of |block gradient|, by name."""
    total = 0.0
    sums = {name: torch.zeros_like(p) for name, p in trainable.items()}
    magnitudes = {name: torch.zeros_like(p) for name, p in trainable.items()}
    for number in range(BLOCKS_PER_STEP):
        batch = block(step, number)
        loss, loss_sum = module(
            batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen, batch.labels, 1 / num_tokens(step)
        )
        loss.backward()
        total += float(loss_sum)
        for name, parameter in trainable.items():
            assert parameter.grad is not None
            sums[name] += parameter.grad
            magnitudes[name] += parameter.grad.abs()
            parameter.grad = None
    return total, sums, magnitudes
