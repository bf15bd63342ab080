"""Every engine computes what one process computes in plain fp32 torch, up to the order of sums."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch

from tests.contract.engines import ENGINES, grid
from tests.contract.model import BLOCKS_PER_STEP, SEQ_LEN, VARIANTS

STEPS = 20
CUT_STEPS = 6
FIVE_HEADS = {"num_attention_heads": 5}
U = 2.0**-24  # unit roundoff of fp32

# A gradient is the sum of n = 8 block gradients g_i. In any order the rounding error of that sum is at most
# (n - 1) U sum|g_i| per element, for the engine and for the reference, so their norms differ by at most
# 2 (n - 1) U ||sum|g_i|| ||. Inside a block other orders are possible as well: three branches (q, k, v; gate,
# up) add up in each of two layers, the loss sums over its chunks, and the norm itself is a sum: another 8 sums
# on each side. That the parameters drift apart (below) is granted nothing here: 4 of these 30 U were seen.
GRADIENT_ULPS = 2 * (BLOCKS_PER_STEP - 1) + 2 * 8

# The loss of step k sums at most T terms, whose rounding errors add up like a random walk, on both sides; and
# its parameters carry the errors of k - 1 updates. AdamW moves an element by at most about lr, and a relative
# gradient error r_j shifts that by lr r_j; with |g_j| r_j <= GRADIENT_ULPS U sum_i|g_ij| the loss changes, to
# first order, by at most GRADIENT_ULPS U sum_j lr sum_i|g_ij| per update: the reference's `exposure`.
TARGETS = BLOCKS_PER_STEP * SEQ_LEN


@pytest.fixture(scope="module")
def reference(pool: Any, base: Any) -> Any:
    @cache
    def run(variant: str, steps: int = STEPS, **sizes: int) -> Any:
        folder = base(variant, **sizes)
        [result] = pool(1).run("tests.contract.cases:reference", base=folder, variant=variant, steps=steps)
        return result

    return run


FAST = (
    ("single", 1, "lora"),
    ("single", 1, "full"),
    ("fsdp-full", 2, "lora"),
    ("fsdp-trainable", 2, "lora-tied"),
    ("zero-1", 2, "lora"),
    ("zero-2", 2, "lora-tied"),
    ("zero-3", 2, "lora"),
    ("zero-3", 2, "full"),
)


@pytest.mark.parametrize(("engine", "ranks", "variant"), grid(*FAST, variants=VARIANTS))
def test_gradients_and_losses(engine: str, ranks: int, variant: str, pool: Any, base: Any, reference: Any) -> None:
    results = pool(ranks).run(
        "tests.contract.cases:against_reference",
        base=base(variant),
        engine=ENGINES[engine],
        variant=variant,
        steps=STEPS,
    )
    assert_as_reference(results, reference(variant))


CUT = (
    ("fsdp-full", 2, 2, "lora"),
    ("zero-3", 2, 2, "lora"),
    *(pytest.param(e, r, p, v, marks=pytest.mark.matrix)
      for e in ENGINES if e != "single" for r, p in ((2, 2), (4, 2), (4, 4)) for v in VARIANTS
      if (e, r, p, v) not in (("fsdp-full", 2, 2, "lora"), ("zero-3", 2, 2, "lora"))),
)  # fmt: skip


@pytest.mark.parametrize(("engine", "ranks", "parts", "variant"), CUT)
def test_blocks_cut_over_ranks(
    engine: str, ranks: int, parts: int, variant: str, pool: Any, base: Any, reference: Any
) -> None:
    """Context parallel is the same sum: each rank computes its tokens of a block. Of the model's five heads and one kv
    head none divides by the ranks."""
    results = pool(ranks).run(
        "tests.contract.cases:against_reference",
        base=base(variant, **FIVE_HEADS),
        engine=ENGINES[engine] | {"context_parallel": parts},
        variant=variant,
        steps=CUT_STEPS,
    )
    assert_as_reference(results, reference(variant, CUT_STEPS, **FIVE_HEADS))


def assert_as_reference(results: list[Any], reference: Any) -> None:
    """Every rank's numbers are the same, and those of the reference but for the order of sums."""
    losses, norms, probes, held_out_loss, logits = results[0]
    for other in results[1:]:
        assert other[:4] == results[0][:4], "ranks disagree"
        assert torch.equal(other[4], logits)
    record, reference_loss, reference_logits = reference
    drift = 0.0
    for step, want in enumerate(record):
        tolerance = want.loss_sum * 2 * math.sqrt(TARGETS) * U + TARGETS * drift
        assert abs(losses[step] - want.loss_sum) <= tolerance, f"loss of step {step + 1}"
        assert set(probes[step]) == set(want.norms)
        for name, (norm, largest) in probes[step].items():
            slack = GRADIENT_ULPS * U * want.magnitudes[name]
            assert abs(norm - want.norms[name]) <= slack, f"gradient of {name} at step {step + 1}"
            assert abs(largest - want.largest[name]) <= slack
        total = GRADIENT_ULPS * U * math.sqrt(sum(m**2 for m in want.magnitudes.values()))
        assert abs(norms[step] - want.grad_norm) <= total
        drift += GRADIENT_ULPS * U * want.exposure
    assert abs(held_out_loss - reference_loss) <= reference_loss * 2 * math.sqrt(SEQ_LEN) * U + SEQ_LEN * drift
    assert logits.shape == reference_logits.shape
    assert float((logits - reference_logits).abs().max()) <= GRADIENT_ULPS * U + drift
