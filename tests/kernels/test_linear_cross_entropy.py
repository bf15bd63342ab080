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


@pytest.mark.parametrize("interpreted", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sure_of_the_true_class(monkeypatch, interpreted, dtype):
    """p of 0.9 to 0.9999: of p - 1 a gradient rounded too early has no digit left."""
    monkeypatch.setattr(dispatch, "interpret_cpu_tensors", interpreted)
    weight = torch.eye(V, D)
    hidden = torch.zeros(64, D)
    labels = torch.arange(64) % D
    hidden[torch.arange(64), labels] = torch.linspace(7.0, 14.0, 64)
    inputs = [hidden.to(dtype), weight.to(dtype), labels]
    truth = _grads(reference.linear_cross_entropy, *(x.double() for x in inputs[:2]), labels)
    found = _grads(linear_cross_entropy, *inputs, chunk_tokens=23)
    assert_right(found, _grads(reference.linear_cross_entropy, *inputs), truth)
    wanted = truth[1][torch.arange(64), labels]
    error = (found[1][torch.arange(64), labels].double() - wanted).abs()
    assert float(wanted.abs().min()) < 2e-4
    # torch's log_softmax is right to one rounding of the largest logit, and the kernel to one of p - 1
    floor = 0.0 if interpreted else 14.0 * 2**-24
    assert (error <= (2**-8 if dtype == torch.bfloat16 else 2e-6) * wanted.abs() + floor).all()


@pytest.mark.parametrize("interpreted", [pytest.param(True, marks=pytest.mark.matrix), False])
def test_a_vocabulary_of_256k(monkeypatch, interpreted):
    monkeypatch.setattr(dispatch, "interpret_cpu_tensors", interpreted)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3, 8, generator=generator), torch.randn(256_000, 8, generator=generator)
    inputs = hidden.bfloat16(), weight.bfloat16(), torch.tensor([255_999, -100, 0])
    exact = (x.double() if x.is_floating_point() else x for x in inputs)
    truth = _grads(reference.linear_cross_entropy, *exact, z_loss=1e-4)
    torchs = _grads(reference.linear_cross_entropy, *inputs, z_loss=1e-4)
    assert_right(_grads(linear_cross_entropy, *inputs, z_loss=1e-4, chunk_tokens=2), torchs, truth)


@pytest.mark.parametrize("interpreted", [True, False])
def test_views_strides_and_offsets_beyond_two_to_the_31(monkeypatch, interpreted):
    """The same bits for the same numbers, also where rows lie 2^30 elements apart: the third begins at 2^31."""
    monkeypatch.setattr(dispatch, "interpret_cpu_tensors", interpreted)
    hidden, weight, labels = _inputs(6, torch.bfloat16)
    hidden[3:] = hidden[:3]
    expected = _grads(linear_cross_entropy, hidden, weight, labels, chunk_tokens=4)
    far = torch.empty(2 * 2**30 + D, dtype=torch.bfloat16).as_strided((3, D), (2**30, 1)).copy_(hidden[:3])
    ways = {
        "transposed": (hidden.T.contiguous().T, weight.T.contiguous().T, labels),
        "every second": (hidden.repeat_interleave(2, 0)[::2], weight.repeat_interleave(2, 0)[::2],
                         labels.repeat_interleave(2)[::2]),
        "part of a row": (torch.cat((hidden, hidden), 1)[:, D:], torch.cat((weight, weight), 1)[:, :D], labels),
    }  # fmt: skip
    for way, given in ways.items():
        found = _grads(linear_cross_entropy, *given, chunk_tokens=4)
        assert all(map(torch.equal, found, expected)), way
    near = _grads(linear_cross_entropy, hidden[:3], weight, labels[:3])
    assert all(map(torch.equal, _grads(linear_cross_entropy, far, weight, labels[:3]), near))
    same = _grads(linear_cross_entropy, hidden[:1].expand(3, D), weight, labels[1:2].expand(3))
    plain = _grads(linear_cross_entropy, hidden[:1].repeat(3, 1), weight, labels[1:2].repeat(3))
    assert all(map(torch.equal, same, plain))
