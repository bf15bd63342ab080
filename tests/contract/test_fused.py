"""Every engine trains a model of fused modules as it trains the plain one: gathered weights reach the kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.contract.compare import assert_same
from tests.contract.engines import ENGINES

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
        "tests.contract.fused:fused_and_not",
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
    for name, tensor in state.items():
        if not name.startswith("exp_avg_sq"):
            assert torch.linalg.norm(tensor - plain_state[name]) <= 3e-5 * torch.linalg.norm(plain_state[name]), name


@pytest.mark.matrix
@pytest.mark.parametrize("engine", ["fsdp-full", "fsdp-trainable", "zero-2", "zero-3"])
def test_fused_modules_recompute_to_the_same_bits(engine: str, pool: Any, base: Any) -> None:
    (kept, kept_state), *recomputed = pool(2).run(
        "tests.contract.fused:recomputed",
        base=base("lora"),
        engine=ENGINES[engine],
        policies=("none", "selective", "full", "offload"),
    )[0]
    for numbers, state in recomputed:
        assert numbers == kept
        assert_same(state, kept_state)


def _error(state: dict[str, torch.Tensor], truth: dict[str, torch.Tensor], kind: str) -> float:
    """The root mean square of the relative errors of the tensors of one kind."""
    names = [name for name in truth if name.startswith(kind)]
    errors = [torch.linalg.norm(state[name] - truth[name]) / torch.linalg.norm(truth[name]) for name in names]
    return float(torch.stack(errors).square().mean().sqrt())
