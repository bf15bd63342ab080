"""A block cut over ranks: every architecture computes as on one rank; what travels is as docs/long-context.md says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.contract.engines import ENGINES
from tests.contract.model import BLOCKS_PER_STEP, SEQ_LEN
from tests.packed_models import KINDS

U = 2.0**-24  # unit roundoff of fp32
GRADIENT_ULPS = 2 * (BLOCKS_PER_STEP - 1) + 2 * 8  # as tests/contract/test_reference.py derives it
FAST = ("gpt_oss", "gemma2", "qwen2-sliding")  # sinks, softcap, windows


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.matrix)])
@pytest.mark.parametrize("kind", [k if k in FAST else pytest.param(k, marks=pytest.mark.matrix) for k in KINDS])
def test_an_architecture_cut_over_ranks(kind: str, ranks: int, pool: Any) -> None:
    """fp32: the loss and every gradient, summed over the ranks, to 1e-5 of the largest; both ways of the CPU."""
    for choice in ("documents", "mask"):
        numbers = pool(ranks).run("tests.contract.cases:cut_and_whole", kind=kind, choice=choice)[0]
        assert len(numbers) > 10
        for name, (whole, summed) in numbers.items():
            assert float((summed - whole).abs().max()) <= 1e-5 * float(whole.abs().max()), name


@pytest.mark.parametrize(
    ("ranks", "heads", "kv_heads", "heads_of_rank", "kv_of_rank"),
    [(2, 3, 1, 2, 2), (2, 6, 2, 3, 1), pytest.param(4, 6, 2, 2, 2, marks=pytest.mark.matrix)],
)
def test_what_travels_for_attention(
    ranks: int, heads: int, kv_heads: int, heads_of_rank: int, kv_of_rank: int, pool: Any, base: Any
) -> None:
    """Two all-to-alls per layer and direction; each rank sends B L N numbers per head and kv head of a rank."""
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 10}
    for calls in pool(ranks).run(
        "tests.contract.cases:exchanged",
        base=base("lora", **sizes),
        engine=ENGINES["fsdp-full"] | {"context_parallel": ranks},
        variant="lora",
    ):
        inward, outward = SEQ_LEN * 10 * (heads_of_rank + 2 * kv_of_rank), SEQ_LEN * 10 * heads_of_rank
        assert calls["alltoall_base_"] == [inward, outward] * 2 + [outward, inward] * 2  # two layers


MOMENTS = [
    cell if cell in (("fsdp-full", 2), ("zero-3", 2)) else pytest.param(*cell, marks=pytest.mark.matrix)
    for cell in ((engine, ranks) for engine in ENGINES if engine != "single" for ranks in (2, 4))
]


@pytest.mark.parametrize(("engine", "ranks"), MOMENTS)
def test_first_moments_are_those_of_one_rank(engine: str, ranks: int, pool: Any, base: Any) -> None:
    """Every element, up to what sums in another order may differ by in the tensor's largest, and the norm's rounding.

    Within a block the sum over tokens has another order too, so an element's own magnitude is no bound.
    """
    folder, case = base("lora", num_attention_heads=5), "tests.contract.cases:first_moments"
    [alone] = pool(1).run(case, base=folder, engine={"kind": "single"}, variant="lora")
    [magnitudes] = pool(1).run("tests.contract.cases:sums_of_magnitudes", base=folder, variant="lora")
    cut = ENGINES[engine] | {"context_parallel": ranks}
    moments = pool(ranks).run(case, base=folder, engine=cut, variant="lora")[0]
    assert moments.keys() == alone.keys() == {f"exp_avg.{name}" for name in magnitudes}
    for name, expected in alone.items():
        slack = 0.1 * GRADIENT_ULPS * U * magnitudes[name.removeprefix("exp_avg.")].max() + 1e-6 * expected.abs()
        assert bool(((moments[name] - expected).abs() <= slack).all()), name


QUANTISED = [
    cell if cell == ("fsdp-full", "nf4") else pytest.param(*cell, marks=pytest.mark.matrix)
    for cell in ((engine, weights) for engine in ENGINES if engine != "single" for weights in ("nf4", "int8"))
]


@pytest.mark.parametrize(("engine", "weights"), QUANTISED)
def test_a_quantised_base_cut_over_ranks(engine: str, weights: str, pool: Any, base: Any) -> None:
    """bf16: at most twice as far as one rank from fp32 arithmetic on the same codes."""
    folder, case = base(weights), "tests.contract.cases:first_moments"
    unpacked = f"{folder}-unpacked-{weights}"
    pool(1).run("tests.contract.fused:save_unpacked", base=folder, folder=unpacked, weights=weights)
    single = {"engine": {"kind": "single"}}
    [truth] = pool(1).run(case, base=unpacked, variant="lora", **single)
    [alone] = pool(1).run(case, base=folder, variant=weights, weights="bf16", **single)
    cut = ENGINES[engine] | {"context_parallel": 2}
    moments = pool(2).run(case, base=folder, engine=cut, variant=weights, weights="bf16")[0]
    assert moments.keys() == alone.keys() == truth.keys()
    assert 0.0 < _distance(alone, truth) < 0.1
    assert _distance(moments, truth) <= 2 * _distance(alone, truth)


def _distance(moments: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """Of all elements, relative."""
    squares = sum(float((moments[name] - truth[name]).double().square().sum()) for name in truth)
    return (squares / sum(float(tensor.double().square().sum()) for tensor in truth.values())) ** 0.5


def test_more_ranks_than_heads_are_refused(pool: Any, base: Any) -> None:
    engine = ENGINES["fsdp-full"] | {"context_parallel": 4}
    [answer] = pool(1).run("tests.contract.cases:refusal", base=base("lora"), engine=engine)
    assert answer.startswith("ConfigError: engine.context_parallel 4: each rank needs an attention head, and this")


@pytest.mark.parametrize(
    ("length", "ranks"), [(2048, (1, 2)), pytest.param(32768, (1, 2, 4), marks=pytest.mark.matrix)]
)
def test_what_a_long_block_keeps_falls_with_the_ranks(
    length: int, ranks: tuple[int, ...], pool: Any, base: Any
) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 8, "num_key_value_heads": 4}
    folder = base("lora", **sizes, max_position_embeddings=32768)
    kept = []
    for count in ranks:
        engine = ENGINES["fsdp-full"] | {"context_parallel": count}
        options = {"base": folder, "engine": engine, "length": length}
        kept.append(max(pool(count).run("tests.contract.cases:kept_of_a_long_block", **options)))
    print("MiB at", ranks, [round(size / 2**20, 1) for size in kept])
    for count, size in zip(ranks, kept, strict=True):
        assert size <= 1.05 * kept[0] / count
