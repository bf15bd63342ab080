"""Rotary embedding on a GPU: right by the rule in every layout, no host sync, positions that lie outside."""

from __future__ import annotations

import pytest
import torch
from dist_cpt_kernels import dispatch, reference, rope

from tests.kernel_inputs import rope as case
from tests.kernels.error_rule import assert_right

pytestmark = pytest.mark.gpu
# heads, key heads, head dim, rotating pairs: Llama 8B and 70B, Qwen2 7B, Gemma 2, Phi-2, odd ones
SHAPES = [(32, 8, 128, 64), (64, 8, 128, 64), (28, 4, 128, 64), (16, 8, 256, 128), (32, 32, 80, 16), (3, 5, 123, 60)]


@pytest.mark.parametrize(("num_heads", "num_k_heads", "head_dim", "half"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_that_of_torch(dtype, num_heads, num_k_heads, head_dim, half):
    assert not dispatch.INTERPRETED, "run with TRITON_INTERPRET=0"
    q, k, positions, dq, dk = case.inputs(2, 257, num_heads, num_k_heads, head_dim, dtype, device="cuda")
    tables = case.tables(half, "cuda")
    double = [t.double() for t in (q, k, *tables, dq, dk)]
    truth = case.gradients(reference.rope, *double[:2], double[2:4], positions, *double[4:])
    torchs = case.gradients(reference.rope, q, k, tables, positions, dq, dk)
    actual = case.gradients(rope, q, k, tables, positions, dq, dk)
    assert_right(actual, torchs, truth)
    assert all(map(torch.equal, actual, case.gradients(rope, q, k, tables, positions, dq, dk)))


def test_layouts_give_the_same_bits():
    q, k, positions, dq, dk = case.inputs(2, 64, 32, 8, 128, torch.bfloat16, device="cuda")
    tables = case.tables(64, "cuda")
    expected = case.gradients(rope, q, k, tables, positions, dq, dk)
    fused = torch.cat((q, k), dim=2)
    layouts = {
        "transposed": [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, dq, dk)],
        "slices of one": [*fused.split([32, 8], dim=2), dq, dk],
        "last stride 3": [torch.stack((x, x, x), -1)[..., 1] for x in (q, k, dq, dk)],
    }
    for layout, given in layouts.items():
        actual = case.gradients(rope, *given[:2], tables, positions, *given[2:])
        assert all(map(torch.equal, actual, expected)), layout


def test_a_position_outside_is_nan_and_not_a_wild_read():
    q, k, positions, _, _ = case.inputs(1, 64, 4, 2, 128, torch.bfloat16, device="cuda")
    positions[0, 3], positions[0, 5] = case.NUM_POSITIONS, -1
    for out in rope(q, k, *case.tables(64, "cuda"), positions):
        assert out[0, [3, 5]].isnan().all()
        assert out[0, [0, 1, 2, 4]].isfinite().all()


def test_offsets_beyond_two_to_the_31():
    length = 2**31 // (32 * 128) + 16
    q = torch.randn(1, length, 32, 128, device="cuda", dtype=torch.bfloat16)
    k = q[:, :, :8]
    positions = torch.arange(length, device="cuda")[None] % case.NUM_POSITIONS
    actual = rope(q, k, *case.tables(64, "cuda"), positions)
    expected = rope(q[:, -16:], k[:, -16:], *case.tables(64, "cuda"), positions[:, -16:])
    assert all(torch.equal(ours[:, -16:], wanted) for ours, wanted in zip(actual, expected, strict=True))


def test_no_host_sync():
    q, k, positions, dq, dk = case.inputs(2, 64, 32, 8, 128, torch.bfloat16, device="cuda")
    tables = case.tables(64, "cuda")
    case.gradients(rope, q, k, tables, positions, dq, dk)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.gradients(rope, q, k, tables, positions, dq, dk)
    finally:
        torch.cuda.set_sync_debug_mode("default")
