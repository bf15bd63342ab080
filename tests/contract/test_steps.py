"""A step that is not finite, what the ranks hold, and recomputed activations."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.contract.compare import assert_same
from tests.contract.engines import ENGINES, by_weights, grid

UNTOUCHED_FAST = (("fsdp-full", "nf4"), ("zero-3", "nf4"))
FROZEN_SHARE = {"fsdp-full": 2, "zero-3": 2, "fsdp-trainable": 1}  # over how many of two ranks a frozen base is sharded


@pytest.mark.parametrize(
    ("engine", "ranks", "variant", "weights"),
    by_weights(grid(("fsdp-full", 2, "lora"), ("zero-2", 2, "lora"))),
)
def test_a_nan_on_one_rank_skips_on_all(
    engine: str, ranks: int, variant: str, weights: str, pool: Any, base: Any
) -> None:
    """Nothing moves, and the next good step is the one that would have come without the bad one."""
    results = pool(ranks).run(
        "tests.contract.cases:poisoned", base=base(variant), engine=ENGINES[engine], variant=variant, weights=weights
    )
    for stats, _ in results:
        assert stats.skipped
        assert stats.grad_norm != stats.grad_norm or stats.grad_norm == float("inf")
    before, after, with_bad, without = results[0][1]
    assert_same(after, before)
    assert with_bad[0] == without[0]
    assert_same(with_bad[1], without[1])


@pytest.mark.parametrize(
    ("engine", "ranks", "variant", "weights"),
    by_weights(
        grid(
            ("single", 1, "lora"),
            ("fsdp-trainable", 2, "lora"),
            ("zero-3", 2, "lora"),
            ("zero-2", 2, "8bit"),
            variants=("lora", "8bit"),
        )
    ),
)
def test_a_step_over_its_limit_leaves_no_trace(
    engine: str, ranks: int, variant: str, weights: str, pool: Any, base: Any
) -> None:
    before, after, with_dropped, without = pool(ranks).run(
        "tests.contract.cases:over_the_limit",
        base=base(variant),
        engine=ENGINES[engine],
        variant=variant,
        weights=weights,
    )[0]
    assert_same(after, before)
    assert with_dropped[0] == without[0]
    assert_same(with_dropped[1], without[1])


@pytest.mark.parametrize("engine", ["fsdp-full", "zero-3"])
def test_two_ranks_hold_half_each(engine: str, pool: Any, base: Any) -> None:
    """Bytes of sharded tensors per rank. ZeRO-3 keeps what is below 100,000 elements gathered, so the matrices
    here are above that, and the rest, whole on each rank, is counted out by its known size."""
    sizes = {"vocab_size": 512, "hidden_size": 320, "intermediate_size": 640, "num_attention_heads": 4,
             "num_key_value_heads": 4, "num_hidden_layers": 1}  # fmt: skip
    options = {"base": base("full", **sizes), "engine": ENGINES[engine], "variant": "full"}
    [alone] = pool(1).run("tests.contract.cases:bytes_per_rank", **options)
    both = pool(2).run("tests.contract.cases:bytes_per_rank", **options)
    norms = 3 * 320  # elements of the vectors, which may stay gathered
    whole = alone["trainable"]
    for mine in both:
        assert abs(mine["trainable"] - whole / 2) <= norms * 4, (mine, alone)
        assert abs(mine["optimizer"] - alone["optimizer"] / 2) <= norms * 4 * 3
    assert whole >= 2 * (2 * 512 * 320 + 4 * 320 * 320 + 3 * 320 * 640)


@pytest.mark.parametrize(
    ("engine", "variant"),
    [
        *((e, "lora") for e in FROZEN_SHARE),
        *(pytest.param(e, "nf4", marks=() if e == "fsdp-full" else pytest.mark.matrix) for e in FROZEN_SHARE),
        *(pytest.param(e, "int8", marks=() if e == "zero-3" else pytest.mark.matrix) for e in FROZEN_SHARE),
        *(pytest.param(e, "fp8", marks=pytest.mark.matrix) for e in FROZEN_SHARE),
    ],
)
def test_the_frozen_base_is_halved_or_whole(engine: str, variant: str, pool: Any, base: Any) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 4,
             "num_hidden_layers": 1}  # fmt: skip
    options = {"base": base(variant, **sizes), "engine": ENGINES[engine], "variant": variant}
    [alone] = pool(1).run("tests.contract.cases:bytes_per_rank", **options)
    both = pool(2).run("tests.contract.cases:bytes_per_rank", **options)
    elements = 4 * 512 * 512 + 3 * 512 * 1024
    norms = 3 * 512 * 2  # bytes, which may stay gathered
    # Beside the codes: a byte per block, an fp32 per 256 of them, and per layer an offset and two tables.
    # int8 and fp8: an fp32 per row.
    nested = elements // 64 + elements // 64 // 256 * 4 + 7 * 4 * (1 + 16 + 256)
    rows = 4 * (5 * 512 + 2 * 1024)
    scales = {"lora": 0, "nf4": nested, "int8": rows, "fp8": rows}[variant]
    codes = {"lora": elements * 2, "nf4": elements // 2, "int8": elements, "fp8": elements}[variant]
    assert alone["frozen"] == codes + scales + norms
    for mine in both:
        assert abs(mine["frozen"] - scales - (alone["frozen"] - scales) / FROZEN_SHARE[engine]) <= norms


@pytest.mark.parametrize(
    ("engine", "weights"),
    [
        pytest.param(e, w, marks=() if w == "bf16" or (e, w) in UNTOUCHED_FAST else pytest.mark.matrix)
        for w in ("bf16", "nf4", "int8", "fp8")
        for e in ("single", "fsdp-full", "fsdp-trainable", "zero-2", "zero-3")
    ],
)
def test_the_frozen_base_stays_as_it_was(engine: str, weights: str, pool: Any, base: Any) -> None:
    ranks = 1 if engine == "single" else 2
    # Seven matrices and two norms in each of two layers, and the last norm; to each quantised matrix five tensors.
    tensors = 2 * 9 + 1 + 2 * 7 * {"bf16": 0, "nf4": 5, "int8": 1, "fp8": 1}[weights]
    for count, changed in pool(ranks).run(
        "tests.contract.cases:frozen_is_untouched",
        base=base("fp8" if weights == "fp8" else "lora"),
        engine=ENGINES[engine],
        weights=weights,
    ):
        assert count == tensors
        assert changed == []


@pytest.mark.parametrize(
    ("engine", "ranks", "variant"),
    grid(("single", 1, "lora"), ("fsdp-full", 2, "lora"), ("zero-3", 2, "lora"), variants=("lora", "nf4")),
)
def test_recomputed_activations_change_no_bit(engine: str, ranks: int, variant: str, pool: Any, base: Any) -> None:
    (_, kept, kept_state), *recomputed = [
        pool(ranks).run(
            "tests.contract.cases:train_from",
            base=base(variant),
            engine=ENGINES[engine] | {"activation_checkpointing": how},
            variant=variant,
            state=None,
            first=1,
            last=2,
        )[0]
        for how in ("none", "selective", "full", "offload")
    ]
    for _, numbers, state in recomputed:
        assert numbers == kept
        assert_same(state, kept_state)
    assert any(torch.count_nonzero(tensor) for tensor in kept_state.values())


@pytest.mark.parametrize(
    ("variant", "gathers", "reductions"),
    # Two layers, gathered in both directions. With a frozen last norm the root has nothing to reduce.
    [("lora", 2 * 2 + 3, 2 + 2), ("full", 2 * 2 + 3, 2 + 3), ("lora-tied", 2 * 2 + 1, 2 + 1)],
)
def test_each_unit_is_gathered_once_per_direction_and_reduced_once(
    variant: str, gathers: int, reductions: int, pool: Any, base: Any
) -> None:
    for counts in pool(2).run(
        "tests.contract.cases:collectives", base=base(variant), engine=ENGINES["fsdp-full"], variant=variant
    ):
        assert counts == {"_allgather_base_": gathers, "_reduce_scatter_base_": reductions}


def test_gradients_are_reduced_per_micro_batch_or_per_step(pool: Any, base: Any) -> None:
    results = {
        reduce: pool(2).run(
            "tests.contract.cases:reductions",
            base=base("lora"),
            engine=ENGINES["fsdp-full"] | {"reduce": reduce},
            variant="lora",
        )[0]
        for reduce in ("micro_batch", "step")
    }
    units = 2 + 2  # the layers, the embeddings and the head
    (often, micro_batches, numbers), (once, _, same) = results["micro_batch"], results["step"]
    assert micro_batches > 1
    assert (often, once) == (units * micro_batches, units)
    assert same == pytest.approx(numbers, rel=1e-6)


def test_a_closed_engine_leaves_torch_as_it_was(pool: Any, base: Any) -> None:
    """Stage 3 replaces `torch.nn.functional.linear`, under which another engine's recomputation would fail."""
    modules = pool(2).run("tests.contract.cases:linear_after", base=base("lora"), engine=ENGINES["zero-3"])
    assert modules == ["torch._C._nn"] * 2


@pytest.mark.parametrize(
    ("engine", "ranks", "variant"),
    grid(("fsdp-full", 2, "lora"), ("zero-3", 2, "lora"), variants=("lora", "full")),
)
@pytest.mark.parametrize("policy", ["full", pytest.param("selective", marks=pytest.mark.matrix)])
def test_mlps_in_tiles_train_as_whole_ones(
    engine: str, ranks: int, variant: str, policy: str, pool: Any, base: Any
) -> None:
    """fp32, up to the order of sums; weights are gathered and gradients reduced once, not once per tile."""
    (whole, state, calls), (tiled, tiled_state, tiled_calls) = pool(ranks).run(
        "tests.contract.cases:in_tiles",
        base=base(variant),
        engine=ENGINES[engine] | {"activation_checkpointing": policy},
        variant=variant,
    )[0]
    assert tiled == pytest.approx(whole, rel=1e-5)
    for name, tensor in tiled_state.items():
        if not name.startswith("exp_avg_sq"):
            assert torch.linalg.norm(tensor - state[name]) <= 3e-5 * torch.linalg.norm(state[name]), name
    gathers = [name for name in calls if "allgather" in name]
    assert sum(tiled_calls[name] for name in gathers) <= sum(calls[name] for name in gathers)
    assert {name: n for name, n in tiled_calls.items() if name not in gathers} == {
        name: n for name, n in calls.items() if name not in gathers
    }
