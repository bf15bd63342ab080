"""What runs on every rank to compare fused modules with plain ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from dist_cpt_kernels import dispatch

from dist_cpt.adapters.quantize import is_quantised, load_quantised, read_weight
from dist_cpt.model.fused_modules import FusedAttention, FusedLayer, FusedMlp, FusedNorm
from tests.contract import cases
from tests.contract.model import block
from tests.contract.reference import learning_rates

STEPS = 2  # LoRA's A has no gradient in the first


def fused_and_not(base: str, engine: dict[str, Any], variant: str, weights: str) -> Any:
    """(loss sums and gradient norms, state) of the same steps with kernels, in the interpreter, and without; for an
    NF4 base also those of fp32 arithmetic on its dequantised weights."""
    runs = [_steps(base, engine, variant, weights, fused) for fused in (True, False)]
    if variant == "nf4":
        unpacked = f"{base}-unpacked"
        if dist.get_rank() == 0:
            save_unpacked(base, unpacked, "nf4")
        dist.barrier()
        runs.append(_steps(unpacked, engine, "lora", "fp32", fused=False))
    return cases.on_rank_0(runs)


def recomputed(base: str, engine: dict[str, Any], policies: Sequence[str]) -> Any:
    """(loss sums and gradient norms, state) of the same steps with kernels, under each activation_checkpointing."""
    runs = [_steps(base, engine | {"activation_checkpointing": how}, "lora", "fp32", fused=True) for how in policies]
    return cases.on_rank_0(runs)


def save_unpacked(base: str, folder: str, weights: Any) -> None:
    """Write the model whose fp32 weights are those of the base's codes."""
    from transformers import AutoModelForCausalLM

    packed = load_quantised(Path(base), None, torch.device("cpu"), weights)
    plain: Any = AutoModelForCausalLM.from_pretrained(base)
    for name, layer in packed.named_modules():
        if is_quantised(layer):
            plain.get_submodule(name).weight.data = read_weight(layer)
    plain.save_pretrained(folder)


def _steps(base: str, engine: dict[str, Any], variant: str, weights: str, fused: bool) -> Any:
    assert dispatch.INTERPRETED
    dispatch.interpret_cpu_tensors = fused
    try:
        with cases.running(base, engine, variant, weights) as (built, groups):
            kinds = [kind for kind in (FusedAttention, FusedLayer, FusedMlp, FusedNorm) if _has(built, kind)]
            assert len(kinds) == (4 if fused else 0), kinds
            numbers = []
            for step in range(1, STEPS + 1):
                mine = block(step, dist.get_rank())
                tokens = sum(block(step, rank).num_targets for rank in range(dist.get_world_size()))
                built.accumulate(mine, tokens, last=True)
                stats = built.step(learning_rates(groups, step)).read()
                numbers += [stats.loss * tokens, stats.grad_norm]
            numbers.append(float(built.evaluate(block(999, 0))))
            return numbers, cases.snapshot(built)
    finally:
        dispatch.interpret_cpu_tensors = False


def _has(built: Any, kind: type) -> bool:
    return any(isinstance(module, kind) for module in built._module.modules())
