"""The chunked loss with the fused kernel in each chunk, and its torch path with every term, against fp64."""

from __future__ import annotations

import pytest
import torch
from dist_cpt_kernels import dispatch, linear_cross_entropy, reference

from tests.kernels.error_rule import assert_right

D, V = 32, 123
TERMS = {"softcap": 20.0, "z_loss": 1e-3, "label_smoothing": 0.1}


def _inputs(num_tokens, dtype):
    generator = torch.Generator().manual_seed(num_tokens)
    hidden = torch.randn(num_tokens, D, generator=generator)
    weight = torch.randn(V, D, generator=generator) * 0.3
    labels = torch.randint(0, V, (num_tokens,), generator=generator)
    labels[::4] = -100
    labels[-1] = 5
    hidden[-1] = 2.5 * weight[5] / weight[5].norm() ** 2 * 10.0  # one row sure of its class
    return hidden.to(dtype), weight.to(dtype), labels


def _grads(loss_function, hidden, weight, labels, **options):
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    scaled, loss = loss_function(hidden, weight, labels, **options)
    grads = torch.autograd.grad(scaled, (hidden, weight))
    return loss, *grads


@pytest.mark.parametrize("interpreted", [True, False])
@pytest.mark.parametrize("terms", [{}, TERMS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_that_of_torch(monkeypatch, interpreted, terms, dtype):
    monkeypatch.setattr(dispatch, "interpret_cpu_tensors", interpreted)
    for num_tokens, chunk_tokens in ((1, 1), (123, 50), (123, 123)):
        inputs = _inputs(num_tokens, dtype)
        options = {"scale": 0.3, **terms}
        exact = [x.double() if x.is_floating_point() else x for x in inputs]
        truth = _grads(reference.linear_cross_entropy, *exact, **options)
        torchs = _grads(reference.linear_cross_entropy, *inputs, **options)
        found = _grads(linear_cross_entropy, *inputs, chunk_tokens=chunk_tokens, **options)
        assert_right(found, torchs, truth)


def test_gradcheck_of_every_term(monkeypatch):
    monkeypatch.setattr(dispatch, "interpret_cpu_tensors", False)  # the kernel computes in fp32
    hidden, weight, labels = _inputs(5, torch.float64)
    hidden, weight, labels = hidden[:, :4], weight[:11, :4], labels.clamp_max(10)
    torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, labels, scale=0.7, chunk_tokens=2, **TERMS)[0],
        (hidden.clone().requires_grad_(), weight.clone().requires_grad_()),
    )


@pytest.mark.parametrize("trains", ["hidden", "weight"])
def test_a_frozen_side(trains):
    hidden, weight, labels = _inputs(40, torch.bfloat16)
    expected = _grads(linear_cross_entropy, hidden, weight, labels, chunk_tokens=16)[1 if trains == "hidden" else 2]
    trained = (hidden if trains == "hidden" else weight).requires_grad_()
    linear_cross_entropy(hidden, weight, labels, chunk_tokens=16)[0].backward()
    assert torch.equal(trained.grad, expected)


def test_a_tied_weight_sums_both_uses():
    _, weight, labels = _inputs(12, torch.float32)
    weight.requires_grad_()
    linear_cross_entropy(weight[:12] * 1.0, weight, labels)[0].backward()
    found = weight.grad
    weight.grad = None
    reference.linear_cross_entropy(weight[:12] * 1.0, weight, labels)[0].backward()
    torch.testing.assert_close(found, weight.grad, rtol=2e-5, atol=2e-6)


def test_scale_as_a_tensor_and_an_upstream_factor():
    hidden, weight, labels = _inputs(40, torch.bfloat16)
    plain = _grads(linear_cross_entropy, hidden, weight.float(), labels, scale=0.25)
    tensor = _grads(linear_cross_entropy, hidden, weight.float(), labels, scale=torch.tensor(0.25))
    weighted = _grads(
        lambda *args: tuple(4.0 * x for x in linear_cross_entropy(*args, scale=0.0625)), hidden, weight.float(), labels
    )
    for one, two, three in zip(plain[1:], tensor[1:], weighted[1:], strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)  # powers of two: no rounding differs


def test_two_calls_give_the_same_bits():
    inputs = _inputs(100, torch.bfloat16)
    for one, two in zip(_grads(linear_cross_entropy, *inputs), _grads(linear_cross_entropy, *inputs), strict=True):
        assert torch.equal(one, two)


def test_nothing_to_learn_from():
    hidden, weight, labels = _inputs(9, torch.bfloat16)
    for count in (9, 0):
        found = _grads(linear_cross_entropy, hidden[:count], weight, torch.full_like(labels[:count], -100), **TERMS)
        assert not any(tensor.any() for tensor in found)
