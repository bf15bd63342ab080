"""The chunked loss on a GPU at the sizes of real heads: right by the rule, sure rows, ignored rows, its memory."""

from __future__ import annotations

import pytest
import torch
from dist_cpt_kernels import dispatch, linear_cross_entropy, reference
from dist_cpt_kernels.linear_cross_entropy import SCALE_BLOCK, _scaled

from tests.kernels import test_linear_cross_entropy as on_cpu
from tests.kernels.error_rule import assert_right

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    """cuBLAS may else add bf16 products up in bf16, which is not the kernel's error."""
    assert not dispatch.INTERPRETED, "run with TRITON_INTERPRET=0"
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False)


def _inputs(num_tokens, vocab, dim, dtype):
    generator = torch.Generator("cuda").manual_seed(vocab)
    hidden = torch.randn(num_tokens, dim, generator=generator, device="cuda").to(dtype)
    weight = (0.3 * torch.randn(vocab, dim, generator=generator, device="cuda")).to(dtype)
    labels = torch.randint(0, vocab, (num_tokens,), generator=generator, device="cuda")
    labels[1::5] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("terms", [{}, {"softcap": 30.0, "z_loss": 1e-4}])
@pytest.mark.parametrize("vocab", [128_256, 151_936, 256_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_vocabularies(dtype, vocab, terms):
    inputs = _inputs(600, vocab, 64, dtype)
    doubles = [x.double() if x.is_floating_point() else x for x in inputs]
    truth = on_cpu._grads(reference.linear_cross_entropy, *doubles, **terms)
    torchs = on_cpu._grads(reference.linear_cross_entropy, *inputs, **terms)
    found = on_cpu._grads(linear_cross_entropy, *inputs, chunk_tokens=256, **terms)
    assert_right(found, torchs, truth)
    assert all(map(torch.equal, found, on_cpu._grads(linear_cross_entropy, *inputs, chunk_tokens=256, **terms)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sure_of_the_true_class(dtype):
    """p of 0.9 to 0.9999: of p - 1 a gradient rounded too early has no digit left."""
    dim = on_cpu.D
    weight, hidden = torch.eye(on_cpu.V, dim, device="cuda"), torch.zeros(64, dim, device="cuda")
    rows = torch.arange(64, device="cuda")
    labels = rows % dim
    hidden[rows, labels] = torch.linspace(7.0, 14.0, 64, device="cuda")
    inputs = hidden.to(dtype), weight.to(dtype), labels
    truth = on_cpu._grads(reference.linear_cross_entropy, *(x.double() for x in inputs[:2]), labels)
    found = on_cpu._grads(linear_cross_entropy, *inputs, chunk_tokens=23)
    assert_right(found, on_cpu._grads(reference.linear_cross_entropy, *inputs), truth)
    wanted = truth[1][rows, labels]
    error = (found[1][rows, labels].double() - wanted).abs() / wanted.abs()
    assert float(error.max()) < (2**-8 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("trains", ["hidden", "weight", "both"])
def test_a_frozen_side_and_a_master_weight(trains):
    hidden, weight, labels = _inputs(600, 1003, 256, torch.bfloat16)
    expected = on_cpu._grads(linear_cross_entropy, hidden, weight.float(), labels)
    leaves = hidden.requires_grad_(trains != "weight"), weight.float().requires_grad_(trains != "hidden")
    linear_cross_entropy(*leaves, labels)[0].backward()
    for leaf, wanted in zip(leaves, expected[1:], strict=True):
        assert torch.equal(leaf.grad, wanted) if leaf.requires_grad else leaf.grad is None


def test_nothing_to_learn_from():
    hidden, weight, labels = _inputs(600, 1003, 256, torch.bfloat16)
    for count in (600, 0):
        ignored = torch.full_like(labels[:count], -100)
        assert not any(x.any() for x in on_cpu._grads(linear_cross_entropy, hidden[:count], weight, ignored))


def test_memory_is_that_of_one_chunk_and_the_gradients():
    num_tokens, vocab, dim = 8192, 128_256, 1024
    hidden, weight, labels = _inputs(num_tokens, vocab, dim, torch.bfloat16)
    on_cpu._grads(linear_cross_entropy, hidden, weight, labels)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    on_cpu._grads(linear_cross_entropy, hidden, weight, labels)
    chunk, fp32_gradient, gradients = 2048 * vocab * 2, vocab * dim * 4, (vocab + num_tokens) * dim * 2
    used = torch.cuda.max_memory_allocated() - before
    assert used < 1.05 * (chunk + fp32_gradient + gradients) + 64 * 2**20
    assert used < num_tokens * vocab * 2  # the logits alone, in bf16


def test_scaling_a_gradient_beyond_two_to_the_31():
    grad = torch.ones(2**31 + SCALE_BLOCK + 5, dtype=torch.bfloat16, device="cuda")
    _scaled(grad, torch.tensor(3.0, device="cuda"), grad.dtype)
    assert grad[:5].tolist() == grad[-5:].tolist() == [3.0] * 5
    assert grad[2**31 - 3 : 2**31 + 3].tolist() == [3.0] * 6
