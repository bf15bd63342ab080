"""Rotary embedding against fp64 and a rotation of complex numbers: layouts, strides, positions, part of a head."""

from __future__ import annotations

import pytest
import torch
from dist_cpt_kernels import reference, rope, rope_tables
from dist_cpt_kernels.rope import _rows_of

from tests.kernel_inputs import rope as case
from tests.kernels.error_rule import assert_right

# heads, key heads, head dim, rotating pairs: grouped, one key head, odd counts, over one block, part of a head
SHAPES = [(4, 2, 16, 8), (1, 1, 2, 1), (7, 1, 128, 64), (3, 5, 123, 60), (40, 33, 8, 4), (2, 2, 80, 16), (2, 1, 96, 48)]


@pytest.mark.parametrize(("num_heads", "num_k_heads", "head_dim", "half"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_that_of_torch(dtype, num_heads, num_k_heads, head_dim, half):
    q, k, positions, dq, dk = case.inputs(2, 5, num_heads, num_k_heads, head_dim, dtype)
    tables = case.tables(half)
    double = [t.double() for t in (q, k, *tables, dq, dk)]
    truth = case.gradients(reference.rope, *double[:2], double[2:4], positions, *double[4:])
    torchs = case.gradients(reference.rope, q, k, tables, positions, dq, dk)
    actual = case.gradients(rope, q, k, tables, positions, dq, dk)
    assert_right(actual, torchs, truth)
    for ours, given in zip(actual, (q, k, dq, dk), strict=True):
        assert torch.equal(ours[..., 2 * half :], given[..., 2 * half :])


def test_it_is_a_rotation_of_complex_numbers():
    """Which pairs rotate, which way, and by what: said once more, independently."""
    q, k, positions, _, _ = case.inputs(2, 5, 4, 2, 16)
    angles = positions.double()[..., None, None] * 10000.0 ** -(torch.arange(8).double() / 8)
    for x, actual in zip((q, k), rope(q, k, *case.tables(8), positions), strict=True):
        turned = torch.complex(*x.double().chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
        torch.testing.assert_close(actual.double(), torch.cat((turned.real, turned.imag), -1), rtol=1e-5, atol=1e-5)


def test_backward_is_the_rotation_back():
    q, k, positions, _, _ = case.inputs(2, 5, 4, 2, 16)
    actual = case.gradients(rope, q, k, case.tables(8), positions, *rope(q, k, *case.tables(8), positions))
    torch.testing.assert_close(actual[2], q)
    torch.testing.assert_close(actual[3], k)


def test_layouts_and_strides():
    """Slices of one projection, attention's layout and any other strides give the same bits."""
    q, k, positions, dq, dk = case.inputs(2, 6, 4, 2, 16)
    tables = case.tables(8)
    expected = case.gradients(rope, q, k, tables, positions, dq, dk)
    fused = torch.cat((q, k), dim=2)
    layouts = {
        "transposed": [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, dq, dk)],
        "slices of one": [*fused.split([4, 2], dim=2), dq, dk],
        "last stride 3": [torch.stack((x, x, x), -1)[..., 1] for x in (q, k, dq, dk)],
    }
    for layout, given in layouts.items():
        actual = case.gradients(rope, *given[:2], tables, positions, *given[2:])
        assert all(map(torch.equal, actual, expected)), layout
        assert all(x.is_contiguous() for x in actual[:2]), layout
    wide = [torch.cat((table, table), dim=1)[:, :8] for table in tables]
    turned = positions.T.contiguous().T
    assert all(map(torch.equal, case.gradients(rope, q, k, wide, turned, dq, dk), expected))
    expanded = q[:, :, :1].expand(2, 6, 4, 16)
    actual, contiguous = (rope(x, k, *tables, positions)[0] for x in (expanded, expanded.contiguous()))
    assert torch.equal(actual, contiguous)


def test_packed_documents_restart():
    q, k, _, dq, dk = case.inputs(1, 9, 4, 2, 16)
    tables = case.tables(8)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]])
    packed = case.gradients(rope, q, k, tables, positions, dq, dk)
    pieces = [case.gradients(rope, *(x[:, a:b] for x in (q, k)), tables, torch.arange(b - a)[None],
                             *(x[:, a:b] for x in (dq, dk))) for a, b in ((0, 4), (4, 6), (6, 9))]  # fmt: skip
    for actual, parts in zip(packed, zip(*pieces, strict=True), strict=True):
        assert torch.equal(actual, torch.cat(parts, dim=1))


def test_offsets_beyond_two_to_the_31():
    """Tokens 2^30 elements apart, over memory that is never touched between them."""
    q, k, _, dq, dk = case.inputs(1, 3, 3, 3, 16, torch.bfloat16)
    positions, tables = torch.arange(3)[None], case.tables(8)
    view = torch.empty(2 * 2**30 + 1024, dtype=torch.bfloat16).as_strided((1, 3, 3, 16), (1, 2**30, 16, 1))
    expected = case.gradients(rope, q, k, tables, positions, dq, dk)
    view.copy_(q)
    assert torch.equal(rope(view, k, *tables, positions)[0], expected[0])
    view.copy_(dk)
    assert torch.equal(case.gradients(rope, q, k, tables, positions, dq, view)[3], expected[3])


def test_slices_of_one_projection_are_not_copied():
    q, k, *_ = case.inputs(2, 6, 4, 2, 16)
    for x in torch.cat((q, k), dim=2).split([4, 2], dim=2):
        assert _rows_of(x).data_ptr() == x.data_ptr()


def test_only_the_gradients_that_are_asked_for():
    q, k, positions, dq, dk = case.inputs(2, 5, 4, 2, 16)
    tables = case.tables(8)
    expected = case.gradients(rope, q, k, tables, positions, dq, dk)
    outs = rope(q.clone().requires_grad_(), k.requires_grad_(), *tables, positions)
    assert torch.equal(torch.autograd.grad(outs[1], k, dk)[0], expected[3])
    outs = rope(q.requires_grad_(), k.detach(), *tables, positions)
    assert torch.equal(torch.autograd.grad(outs[0], q, dq)[0], expected[2])


def test_inputs_and_gradients_are_not_written():
    tensors = case.inputs(2, 5, 4, 2, 16)
    kept = [t.clone() for t in tensors]
    first, second = (case.gradients(rope, *tensors[:2], case.tables(8), *tensors[2:]) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, tensors, kept))


def test_tables_are_those_of_the_formula():
    inv_freq = 10000.0 ** -(torch.arange(8) / 8)
    cos, sin = rope_tables(inv_freq, 30, scaling=1.5)
    angles = (torch.arange(30)[:, None] * inv_freq).double()
    torch.testing.assert_close(cos.double(), 1.5 * angles.cos(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sin.double(), 1.5 * angles.sin(), rtol=1e-6, atol=1e-6)


def test_empty():
    cos, sin = case.tables(8)
    for shapes in (((0, 5, 4, 16), (0, 5, 2, 16)), ((2, 0, 4, 16), (2, 0, 2, 16)), ((2, 5, 0, 16), (2, 5, 2, 16))):
        q, k = (torch.ones(shape, requires_grad=True) for shape in shapes)
        outs = rope(q, k, cos, sin, torch.zeros(shapes[0][:2], dtype=torch.int64))
        sum(out.sum() for out in outs).backward()
        assert [out.shape for out in outs] == [q.grad.shape, k.grad.shape] == [q.shape, k.shape]


def test_wrong_arguments_are_named():
    q, k, positions, _, _ = case.inputs(2, 5, 4, 2, 16)
    cos, sin = case.tables(8)
    with pytest.raises(ValueError, match="q and k: "):
        rope(q, k.transpose(1, 2), cos, sin, positions)
    with pytest.raises(ValueError, match=r"cos and sin: .* \[40, 9\]"):
        rope(q, k, *case.tables(9), positions)
    with pytest.raises(ValueError, match=r"cos and sin: .* torch\.bfloat16"):
        rope(q, k, cos.bfloat16(), sin.bfloat16(), positions)
    for wrong in (positions[:, :4], positions.int()):
        with pytest.raises(ValueError, match=r"position_ids: expected int64 \[2, 5\]"):
            rope(q, k, cos, sin, wrong)
    with pytest.raises(ValueError, match="position_ids: expected 0 to 39, got 0 to 40"):
        rope(q, k, cos, sin, torch.tensor([[0, 1, 2, 3, 40]] * 2))
