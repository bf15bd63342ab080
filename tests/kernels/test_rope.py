"""Rotary embedding against fp64 and a rotation of complex numbers: layouts, strides, positions, part of a head."""

from __future__ import annotations

import pytest
import torch
from dist_cpt_kernels import reference, rope, rope_tables

from tests.kernels.error_rule import assert_right

NUM_POSITIONS = 40


def _tables(half, num_positions=NUM_POSITIONS):
    return rope_tables(10000.0 ** -(torch.arange(half) / half), num_positions)


def _inputs(batch, length, num_heads, num_k_heads, head_dim, dtype=torch.float32):
    """(q, k, position_ids, gradients of both)."""
    generator = torch.Generator().manual_seed(length + num_heads + head_dim)
    shapes = [(batch, length, heads, head_dim) for heads in (num_heads, num_k_heads)]
    q, k, dq, dk = (torch.randn(shape, generator=generator).to(dtype) for shape in (*shapes, *shapes))
    return q, k, torch.randint(0, NUM_POSITIONS, (batch, length), generator=generator), dq, dk


def _grads(op, q, k, tables, positions, dq, dk, **options):
    inputs = q.detach().requires_grad_(), k.detach().requires_grad_()
    outs = op(*inputs, *tables, positions, **options)
    return *(out.detach() for out in outs), *torch.autograd.grad(outs, inputs, (dq, dk))


# heads, key heads, head dim, rotating pairs: grouped, one key head, odd counts, over one block, part of a head
SHAPES = [(4, 2, 16, 8), (1, 1, 2, 1), (7, 1, 128, 64), (3, 5, 123, 60), (40, 33, 8, 4), (2, 2, 80, 16), (2, 1, 96, 48)]


@pytest.mark.parametrize(("num_heads", "num_k_heads", "head_dim", "half"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_torch(dtype, num_heads, num_k_heads, head_dim, half):
    q, k, positions, dq, dk = _inputs(2, 5, num_heads, num_k_heads, head_dim, dtype)
    tables = _tables(half)
    double = [t.double() for t in (q, k, *tables, dq, dk)]
    truth = _grads(reference.rope, *double[:2], double[2:4], positions, *double[4:])
    torchs = _grads(reference.rope, q, k, tables, positions, dq, dk)
    found = _grads(rope, q, k, tables, positions, dq, dk)
    assert_right(found, torchs, truth)
    for ours, given in zip(found, (q, k, dq, dk), strict=True):
        assert torch.equal(ours[..., 2 * half :], given[..., 2 * half :])


def test_it_is_a_rotation_of_complex_numbers():
    """Which pairs rotate, which way, and by what: said once more, independently."""
    q, k, positions, _, _ = _inputs(2, 5, 4, 2, 16)
    angles = positions.double()[..., None, None] * 10000.0 ** -(torch.arange(8).double() / 8)
    for x, found in zip((q, k), rope(q, k, *_tables(8), positions), strict=True):
        turned = torch.complex(*x.double().chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
        torch.testing.assert_close(found.double(), torch.cat((turned.real, turned.imag), -1), rtol=1e-5, atol=1e-5)


def test_backward_is_the_rotation_back():
    q, k, positions, _, _ = _inputs(2, 5, 4, 2, 16)
    found = _grads(rope, q, k, _tables(8), positions, *rope(q, k, *_tables(8), positions))
    torch.testing.assert_close(found[2], q)
    torch.testing.assert_close(found[3], k)


@pytest.mark.parametrize("heads_first", [False, True])
def test_layouts_strides_and_positions(heads_first):
    """The same bits from every way to hand the same numbers over."""
    q, k, positions, dq, dk = _inputs(2, 6, 4, 2, 16)
    positions[1] = positions[0]
    tables = _tables(8)
    expected = _grads(rope, q, k, tables, positions, dq, dk)
    swap = (lambda x: x.transpose(1, 2)) if heads_first else (lambda x: x)
    fused = torch.cat((q, k), dim=2)
    ways = {
        "contiguous": [swap(x).contiguous() for x in (q, k, dq, dk)],
        "transposed": [swap(x.transpose(1, 2).contiguous().transpose(1, 2)) for x in (q, k, dq, dk)],
        "slices of one": [swap(x) for x in (*fused.split([4, 2], dim=2), dq, dk)],
        "last stride 3": [swap(torch.stack((x, x, x), -1)[..., 1]) for x in (q, k, dq, dk)],
    }
    for way, given in ways.items():
        for ids in (positions, positions[:1], positions[0], positions.int(), positions.T.contiguous().T):
            found = _grads(rope, *given[:2], tables, ids, *given[2:], heads_first=heads_first)
            assert all(torch.equal(swap(ours), wanted) for ours, wanted in zip(found, expected, strict=True)), way
    wide = [torch.cat((table, table), dim=1)[:, :8] for table in tables]
    found = _grads(rope, swap(q), swap(k), wide, positions, swap(dq), swap(dk), heads_first=heads_first)
    assert all(torch.equal(swap(ours), wanted) for ours, wanted in zip(found, expected, strict=True))


def test_results_lie_as_their_inputs_do():
    """A view [B, H, L, N] of a projection [B, L, H, N] stays one, forward and backward: nothing is copied after."""
    q, k, positions, dq, dk = _inputs(2, 5, 4, 2, 16)
    views = [x.transpose(1, 2) for x in (q, k)]
    grads = [x.transpose(1, 2).contiguous() for x in (dq, dk)]
    found = _grads(rope, *views, _tables(8), positions, *grads, heads_first=True)
    assert [x.stride() for x in found] == [x.stride() for x in (*views, *views)]
    expanded = q[:, :, :1].expand(2, 5, 4, 16)
    assert torch.equal(rope(expanded, k, *_tables(8))[0], rope(expanded.contiguous(), k, *_tables(8))[0])


def test_packed_documents_start_anew():
    q, k, _, dq, dk = _inputs(1, 9, 4, 2, 16)
    tables = _tables(8)
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 0, 1, 2])
    packed = _grads(rope, q[0], k[0], tables, positions, dq[0], dk[0])
    pieces = [_grads(rope, *(x[0, a:b] for x in (q, k)), tables, None, *(x[0, a:b] for x in (dq, dk)))
              for a, b in ((0, 4), (4, 6), (6, 9))]  # fmt: skip
    for found, parts in zip(packed, zip(*pieces, strict=True), strict=True):
        assert torch.equal(found, torch.cat(parts))


def test_offsets_beyond_two_to_the_31():
    """Batch, token and head each 2^30 elements apart in turn, over memory that is never touched between them."""
    q, k, _, dq, dk = _inputs(3, 3, 3, 3, 16, torch.bfloat16)
    far = 2**30
    storage = torch.empty(2 * far + 1024, dtype=torch.bfloat16)
    for strides, heads_first in (((far, 48, 16, 1), False), ((144, far, 16, 1), False), ((48, far, 16, 1), True),
                                 ((48, 16, far, 1), False)):  # fmt: skip
        expected = _grads(rope, q, k, _tables(8), None, dq, dk, heads_first=heads_first)
        view = storage.as_strided((3, 3, 3, 16), strides)
        view.copy_(q)
        found = rope(view, k, *_tables(8), heads_first=heads_first)
        assert torch.equal(found[0], expected[0])
        view.copy_(dk)
        found = _grads(rope, q, k, _tables(8), None, dq, view, heads_first=heads_first)
        assert torch.equal(found[3], expected[3])


def test_only_the_gradients_that_are_asked_for():
    q, k, positions, dq, dk = _inputs(2, 5, 4, 2, 16)
    tables = _tables(8)
    expected = _grads(rope, q, k, tables, positions, dq, dk)
    outs = rope(q.clone().requires_grad_(), k.requires_grad_(), *tables, positions)
    assert torch.equal(torch.autograd.grad(outs[1], k, dk)[0], expected[3])
    outs = rope(q.requires_grad_(), k.detach(), *tables, positions)
    assert torch.equal(torch.autograd.grad(outs[0], q, dq)[0], expected[2])


def test_inputs_and_gradients_are_not_written():
    tensors = _inputs(2, 5, 4, 2, 16)
    kept = [t.clone() for t in tensors]
    first, second = (_grads(rope, *tensors[:2], _tables(8), *tensors[2:]) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, tensors, kept))


def test_tables_are_those_of_the_formula():
    inv_freq = 10000.0 ** -(torch.arange(8) / 8)
    cos, sin = rope_tables(inv_freq, 30, scaling=1.5)
    angles = (torch.arange(30)[:, None] * inv_freq).double()
    torch.testing.assert_close(cos.double(), 1.5 * angles.cos(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sin.double(), 1.5 * angles.sin(), rtol=1e-6, atol=1e-6)


def test_empty():
    cos, sin = _tables(8)
    for shapes in (((0, 5, 4, 16), (0, 5, 2, 16)), ((2, 0, 4, 16), (2, 0, 2, 16)), ((2, 5, 0, 16), (2, 5, 2, 16))):
        q, k = (torch.ones(shape, requires_grad=True) for shape in shapes)
        outs = rope(q, k, cos, sin)
        sum(out.sum() for out in outs).backward()
        assert [out.shape for out in outs] == [q.grad.shape, k.grad.shape] == [q.shape, k.shape]


def test_wrong_arguments_are_named():
    q, k, positions, _, _ = _inputs(2, 5, 4, 2, 16)
    cos, sin = _tables(8)
    with pytest.raises(ValueError, match="q and k alike but for their heads"):
        rope(q, k, cos, sin, heads_first=True)
    with pytest.raises(ValueError, match=r"cos and sin \[P, R\] with 2 R <= 16 expected, got \[40, 9\]"):
        rope(q, k, *_tables(9))
    with pytest.raises(ValueError, match=r"cos and sin in fp32 expected, got torch\.bfloat16"):
        rope(q, k, cos.bfloat16(), sin.bfloat16())
    with pytest.raises(ValueError, match=r"position_ids \[2, 5\] or \[5\] expected, got \[2, 4\]"):
        rope(q, k, cos, sin, positions[:, :4])
    with pytest.raises(ValueError, match="positions 0 to 40 do not lie in the tables' 40"):
        rope(q, k, cos, sin, torch.tensor([0, 1, 2, 3, 40]))
    with pytest.raises(ValueError, match="the tables hold 40 positions, the sequence 41"):
        rope(torch.ones(41, 4, 16), torch.ones(41, 2, 16), cos, sin)
