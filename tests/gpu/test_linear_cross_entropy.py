"""The chunked loss on a GPU at the sizes of real heads: right by the rule, sure rows, ignored rows, its memory."""

from __future__ import annotations

import pytest
import torch
from dist_cpt_kernels import dispatch, linear_cross_entropy, reference
from dist_cpt_kernels.linear_cross_entropy import SCALE_BLOCK, _scaled

from tests.kernel_inputs import linear_cross_entropy as case
from tests.kernels.error_rule import assert_right

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    """cuBLAS may else add bf16 products up in bf16, which is not the kernel's error."""
    assert not dispatch.INTERPRETED, "run with TRITON_INTERPRET=0"
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False)


@pytest.mark.parametrize("terms", [{}, {"softcap": 30.0}])
@pytest.mark.parametrize("vocab", [128_256, 151_936, 256_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_vocabularies(dtype, vocab, terms):
    inputs = case.random(600, dtype, vocab=vocab, dim=64, device="cuda")
    truth = case.gradients(reference.linear_cross_entropy, *case.in_fp64(inputs), **terms)
    torchs = case.gradients(reference.linear_cross_entropy, *inputs, **terms)
    actual = case.gradients(linear_cross_entropy, *inputs, chunk_tokens=256, **terms)
    assert_right(actual, torchs, truth)
    assert all(map(torch.equal, actual, case.gradients(linear_cross_entropy, *inputs, chunk_tokens=256, **terms)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sure_of_the_true_class(dtype):
    """p of 0.9 to 0.9999: of p - 1 a gradient rounded too early has no digit left."""
    inputs = case.sure(dtype, "cuda")
    labels = inputs[2]
    rows = torch.arange(64, device="cuda")
    truth = case.gradients(reference.linear_cross_entropy, *case.in_fp64(inputs))
    actual = case.gradients(linear_cross_entropy, *inputs, chunk_tokens=23)
    assert_right(actual, case.gradients(reference.linear_cross_entropy, *inputs), truth)
    wanted = truth[1][rows, labels]
    error = (actual[1][rows, labels].double() - wanted).abs() / wanted.abs()
    assert float(error.max()) < (2**-8 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("trains", ["hidden", "weight", "both"])
def test_a_frozen_side_and_a_master_weight(trains):
    hidden, weight, labels = case.random(600, torch.bfloat16, vocab=1003, dim=256, device="cuda")
    expected = case.gradients(linear_cross_entropy, hidden, weight.float(), labels)
    leaves = hidden.requires_grad_(trains != "weight"), weight.float().requires_grad_(trains != "hidden")
    linear_cross_entropy(*leaves, labels)[0].backward()
    for leaf, wanted in zip(leaves, expected[1:], strict=True):
        assert torch.equal(leaf.grad, wanted) if leaf.requires_grad else leaf.grad is None


def test_nothing_to_learn_from():
    hidden, weight, labels = case.random(600, torch.bfloat16, vocab=1003, dim=256, device="cuda")
    for count in (600, 0):
        ignored = torch.full_like(labels[:count], -100)
        assert not any(x.any() for x in case.gradients(linear_cross_entropy, hidden[:count], weight, ignored))


def test_memory_is_that_of_one_chunk_and_the_gradients():
    num_tokens, vocab, dim = 8192, 128_256, 1024
    hidden, weight, labels = case.random(num_tokens, torch.bfloat16, vocab=vocab, dim=dim, device="cuda")
    case.gradients(linear_cross_entropy, hidden, weight, labels)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    case.gradients(linear_cross_entropy, hidden, weight, labels)
    chunk, fp32_gradient, gradients = 2048 * vocab * 2, vocab * dim * 4, (vocab + num_tokens) * dim * 2
    used = torch.cuda.max_memory_allocated() - before
    assert used < 1.05 * (chunk + fp32_gradient + gradients) + 64 * 2**20
    assert used < num_tokens * vocab * 2  # the logits alone, in bf16


def test_scaling_a_gradient_beyond_two_to_the_31():
    grad = torch.ones(2**31 + SCALE_BLOCK + 5, dtype=torch.bfloat16, device="cuda")
    _scaled(grad, torch.tensor(3.0, device="cuda"), grad.dtype)
    assert grad[:5].tolist() == grad[-5:].tolist() == [3.0] * 5
    assert grad[2**31 - 3 : 2**31 + 3].tolist() == [3.0] * 6
