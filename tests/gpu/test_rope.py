"""Rotary embedding on a GPU: right by the rule in every layout, no host sync, positions that lie outside."""

from __future__ import annotations

import pytest
import torch
from dist_cpt_kernels import dispatch, reference, rope

from tests.kernels import test_rope as on_cpu
from tests.kernels.error_rule import assert_right

pytestmark = pytest.mark.gpu
# heads, key heads, head dim, rotating pairs: Llama 8B and 70B, Qwen2 7B, Gemma 2, Phi-2, odd ones
SHAPES = [(32, 8, 128, 64), (64, 8, 128, 64), (28, 4, 128, 64), (16, 8, 256, 128), (32, 32, 80, 16), (3, 5, 123, 60)]


def _inputs(*arguments):
    return [tensor.cuda() for tensor in on_cpu._inputs(*arguments)]


def _tables(half):
    return [table.cuda() for table in on_cpu._tables(half)]


@pytest.mark.parametrize(("num_heads", "num_k_heads", "head_dim", "half"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_that_of_torch(dtype, num_heads, num_k_heads, head_dim, half):
    assert not dispatch.INTERPRETED, "run with TRITON_INTERPRET=0"
    q, k, positions, dq, dk = _inputs(2, 257, num_heads, num_k_heads, head_dim, dtype)
    tables = _tables(half)
    double = [t.double() for t in (q, k, *tables, dq, dk)]
    truth = on_cpu._grads(reference.rope, *double[:2], double[2:4], positions, *double[4:])
    torchs = on_cpu._grads(reference.rope, q, k, tables, positions, dq, dk)
    found = on_cpu._grads(rope, q, k, tables, positions, dq, dk)
    assert_right(found, torchs, truth)
    assert all(map(torch.equal, found, on_cpu._grads(rope, q, k, tables, positions, dq, dk)))


@pytest.mark.parametrize("heads_first", [False, True])
def test_layouts_give_the_same_bits(heads_first):
    q, k, positions, dq, dk = _inputs(2, 64, 32, 8, 128, torch.bfloat16)
    tables = _tables(64)
    expected = on_cpu._grads(rope, q, k, tables, positions, dq, dk)
    swap = (lambda x: x.transpose(1, 2)) if heads_first else (lambda x: x)
    fused = torch.cat((q, k), dim=2)
    ways = {
        "contiguous": [swap(x).contiguous() for x in (q, k, dq, dk)],
        "transposed": [swap(x.transpose(1, 2).contiguous().transpose(1, 2)) for x in (q, k, dq, dk)],
        "slices of one": [swap(x) for x in (*fused.split([32, 8], dim=2), dq, dk)],
        "last stride 3": [swap(torch.stack((x, x, x), -1)[..., 1]) for x in (q, k, dq, dk)],
    }
    for way, given in ways.items():
        found = on_cpu._grads(rope, *given[:2], tables, positions, *given[2:], heads_first=heads_first)
        assert all(torch.equal(swap(ours), wanted) for ours, wanted in zip(found, expected, strict=True)), way


def test_a_position_outside_is_nan_and_not_a_wild_read():
    q, k, positions, _, _ = _inputs(1, 64, 4, 2, 128, torch.bfloat16)
    positions[0, 3], positions[0, 5] = on_cpu.NUM_POSITIONS, -1
    for out in rope(q, k, *_tables(64), positions):
        assert out[0, [3, 5]].isnan().all()
        assert out[0, [0, 1, 2, 4]].isfinite().all()


def test_offsets_beyond_two_to_the_31():
    length = 2**31 // (32 * 128) + 16
    q = torch.randn(1, length, 32, 128, device="cuda", dtype=torch.bfloat16)
    k = q[:, :, :8]
    positions = torch.arange(length, device="cuda") % on_cpu.NUM_POSITIONS
    found = rope(q, k, *_tables(64), positions)
    expected = rope(q[:, -16:], k[:, -16:], *_tables(64), positions[-16:])
    assert all(torch.equal(ours[:, -16:], wanted) for ours, wanted in zip(found, expected, strict=True))


def test_no_host_sync():
    q, k, positions, dq, dk = _inputs(2, 64, 32, 8, 128, torch.bfloat16)
    tables = _tables(64)
    on_cpu._grads(rope, q, k, tables, positions, dq, dk)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_cpu._grads(rope, q, k, tables, positions, dq, dk)
    finally:
        torch.cuda.set_sync_debug_mode("default")
