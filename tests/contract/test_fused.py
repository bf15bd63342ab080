"""Every engine trains a model whose modules are fused as it trains it unfused: gathered matrices reach the kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dist_cpt_kernels import dispatch

from dist_cpt.adapters import quantize
from dist_cpt.model.fused_modules import FusedAttention, FusedLayer, FusedMlp, FusedNorm
from tests.contract import cases
from tests.contract.engines import ENGINES
from tests.contract.model import block
from tests.contract.reference import learning_rates

STEPS = 2  # LoRA's A has no gradient in the first


def fused_and_not(base: str, engine: dict[str, Any], variant: str, weights: str) -> Any:
    """(loss sums and gradient norms, state) of the same steps with kernels, in the interpreter, and without; for a
    packed base also those of fp32 arithmetic on what its codes stand for."""
    runs = [_steps(base, engine, variant, weights, fused) for fused in (True, False)]
    if variant == "nf4":
        unpacked = f"{base}-unpacked"
        if dist.get_rank() == 0:
            save_unpacked(base, unpacked)
        dist.barrier()
        runs.append(_steps(unpacked, engine, "lora", "fp32", fused=False))
    return cases.on_rank_0(runs)


def save_unpacked(base: str, folder: str) -> None:
    """Write the model whose fp32 weights are those of the base's NF4 codes."""
    from transformers import AutoModelForCausalLM

    packed = quantize.load_nf4(Path(base), None, torch.device("cpu"))
    plain = AutoModelForCausalLM.from_pretrained(base)
    for name, module in packed.named_modules():
        if getattr(module, "quant_state", None) is not None:
            weight = plain.get_submodule(name).weight
            weight.data = quantize._unpacked(module, torch.float32).reshape(weight.shape)
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
                loss = built.accumulate(mine, tokens, last=True)
                dist.all_reduce(loss)
                numbers += [float(loss), built.step(learning_rates(groups, step)).grad_norm]
            numbers.append(float(built.evaluate(block(999, 0))))
            return numbers, cases.snapshot(built)
    finally:
        dispatch.interpret_cpu_tensors = False


def _has(built: Any, kind: type) -> bool:
    return any(isinstance(module, kind) for module in built._module.modules())


FAST = {("fsdp-full", "lora", "fp32"), ("zero-3", "lora", "fp32")}
CELLS = [
    (engine, variant, "bf16" if variant == "nf4" else "fp32")
    for engine in ENGINES
    if engine != "single"
    for variant in ("lora", "lora-tied", "full", "nf4")
]


@pytest.mark.parametrize(
    ("engine", "variant", "weights"),
    [cell if cell in FAST else pytest.param(*cell, marks=pytest.mark.matrix) for cell in CELLS],
)
def test_fused_modules_train_as_the_others(engine: str, variant: str, weights: str, pool: Any, base: Any) -> None:
    (fused, state), (plain, plain_state), *truth = pool(2).run(
        "tests.contract.test_fused:fused_and_not",
        base=base(variant),
        engine=ENGINES[engine],
        variant=variant,
        weights=weights,
    )[0]
    if truth:
        true_numbers, true_state = truth[0]
        for kind in ("exp_avg.", "master."):
            assert _error(state, true_state, kind) <= 2 * _error(plain_state, true_state, kind)
        assert fused == pytest.approx(true_numbers, rel=2e-2)
        return
    assert fused == pytest.approx(plain, rel=1e-5)
    for name, found in state.items():
        if not name.startswith("exp_avg_sq"):
            assert torch.linalg.norm(found - plain_state[name]) <= 3e-5 * torch.linalg.norm(plain_state[name]), name


def _error(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor], kind: str) -> float:
    """Over the tensors of one kind, the root of the mean square of their relative errors."""
    names = [name for name in truth if name.startswith(kind)]
    errors = [torch.linalg.norm(found[name] - truth[name]) / torch.linalg.norm(truth[name]) for name in names]
    return float(torch.stack(errors).square().mean().sqrt())
