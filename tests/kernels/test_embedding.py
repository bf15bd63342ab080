"""The sorted embedding gradient against fp64, with runs of every length."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from dist_cpt_kernels import embedding, embedding_gradient, reference
from dist_cpt_kernels.embedding import TILE_TOKENS, _sum_runs

from tests.kernel_inputs import embedding as case
from tests.kernels.error_rule import assert_right

# one id only, a few long runs over many tiles, short runs, mostly single ids; more than one block of columns
SHAPES = [(1, 1, 1), (TILE_TOKENS, 1, 8), (507, 1, 8), (507, 3, 40), (123, 40, 600), (123, 5000, 20)]
FAST = [(shape, torch.float32, None) for shape in SHAPES if shape != (507, 1, 8)] + [((507, 3, 40), torch.bfloat16, 0)]
CELLS = [(shape, dtype, pad) for shape in SHAPES for dtype in (torch.float32, torch.bfloat16) for pad in (None, 0)]


@pytest.mark.parametrize(
    ("shape", "dtype", "padding_idx"),
    [pytest.param(*cell, marks=() if cell in FAST else pytest.mark.matrix) for cell in CELLS],
)
def test_error_is_at_most_twice_that_of_torch(shape, padding_idx, dtype):
    vocab, dim = shape[1:]
    grad, ids = case.inputs(*shape, dtype)
    truth = reference.embedding_gradient(grad.double(), ids, vocab, dtype=torch.float64, padding_idx=padding_idx)
    for out in (torch.float32, torch.bfloat16):
        table = torch.zeros(vocab, dim, dtype=out, requires_grad=True)
        gathered = F.embedding(ids, table, padding_idx=padding_idx)
        (torchs,) = torch.autograd.grad(gathered, table, grad.to(out))
        actual = embedding_gradient(grad, ids, vocab, dtype=out, padding_idx=padding_idx)
        assert_right([actual], [torchs], [truth])


def test_autograd_and_shapes():
    grad, ids = case.inputs(24, 7, 20)
    weight = torch.randn(7, 20, requires_grad=True)
    out = embedding(ids.view(4, 6), weight, padding_idx=1)
    assert torch.equal(out, weight[ids.view(4, 6)])
    out.backward(grad.view(4, 6, 20))
    assert torch.equal(weight.grad, embedding_gradient(grad, ids, 7, padding_idx=1))
    assert not weight.grad[1].any()


def test_strides_of_the_gradient():
    grad, ids = case.inputs(50, 5, 40)
    expected = embedding_gradient(grad[:, ::2].contiguous(), ids, 5)
    assert torch.equal(embedding_gradient(grad[:, ::2], ids, 5), expected)
    repeated = embedding_gradient(grad[:1].repeat(50, 1), ids, 5)
    assert torch.equal(embedding_gradient(grad[:1].expand(50, 40), ids, 5), repeated)


def test_offsets_beyond_two_to_the_31():
    """A table of more than 2^31 elements, whose memory is touched in three rows only; one run crosses tiles."""
    dim, last = 64, 2**25 + 1
    grad, _ = case.inputs(TILE_TOKENS + 3, 1, dim, torch.bfloat16)
    places = torch.tensor([0] + [last] * (TILE_TOKENS + 1) + [last + 1])
    table = torch.empty(last + 2, dim, dtype=torch.bfloat16)
    _sum_runs(grad, torch.arange(len(places)), places, table)
    torch.testing.assert_close(table[last], grad[1:-1].double().sum(0).bfloat16(), rtol=2**-7, atol=1e-6)
    assert torch.equal(table[last + 1], grad[-1])
    assert torch.equal(table[0], grad[0])


def test_two_calls_and_a_shuffled_batch():
    """The same bits again; and tokens of other ids in between change nothing."""
    grad, ids = case.inputs(300, 4, 16)
    first = embedding_gradient(grad, ids, 4)
    assert torch.equal(first, embedding_gradient(grad, ids, 4))
    alone = embedding_gradient(grad[ids == 2], ids[ids == 2], 4)
    torch.testing.assert_close(first[2], alone[2], rtol=1e-6, atol=1e-6)
