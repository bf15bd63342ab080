"""The chunked loss with the fused kernel in each chunk, and its torch path with every term, against fp64."""

from __future__ import annotations

import pytest
import torch
from dist_cpt_kernels import dispatch, linear_cross_entropy, reference

from tests.kernel_inputs import linear_cross_entropy as case
from tests.kernels.error_rule import assert_right

TERMS = {"softcap": 20.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("terms", "interpreted"),
    [(TERMS, True), (TERMS, False), ({}, False), pytest.param({}, True, marks=pytest.mark.matrix)],
)
def test_error_is_at_most_twice_that_of_torch(monkeypatch, interpreted, terms, dtype):
    monkeypatch.setattr(dispatch, "interpret_cpu_tensors", interpreted)
    for num_tokens, chunk_tokens in ((1, 1), (123, 50), (123, 123)):
        inputs = case.random(num_tokens, dtype)
        options = {"scale": 0.3, **terms}
        truth = case.gradients(reference.linear_cross_entropy, *case.in_fp64(inputs), **options)
        torchs = case.gradients(reference.linear_cross_entropy, *inputs, **options)
        actual = case.gradients(linear_cross_entropy, *inputs, chunk_tokens=chunk_tokens, **options)
        assert_right(actual, torchs, truth)


def test_gradcheck_of_every_term(monkeypatch):
    monkeypatch.setattr(dispatch, "interpret_cpu_tensors", False)  # the kernel computes in fp32
    hidden, weight, labels = case.random(5, torch.float64)
    hidden, weight, labels = hidden[:, :4], weight[:11, :4], labels.clamp_max(10)
    torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, labels, scale=0.7, chunk_tokens=2, **TERMS)[0],
        (hidden.clone().requires_grad_(), weight.clone().requires_grad_()),
    )


@pytest.mark.parametrize("trains", ["hidden", "weight"])
def test_a_frozen_side(trains):
    hidden, weight, labels = case.random(40, torch.bfloat16)
    expected = case.gradients(linear_cross_entropy, hidden, weight, labels, chunk_tokens=16)[
        1 if trains == "hidden" else 2
    ]
    trained = (hidden if trains == "hidden" else weight).requires_grad_()
    linear_cross_entropy(hidden, weight, labels, chunk_tokens=16)[0].backward()
    assert torch.equal(trained.grad, expected)


def test_a_tied_weight_sums_both_uses():
    _, weight, labels = case.random(12, torch.float32)
    weight.requires_grad_()
    linear_cross_entropy(weight[:12] * 1.0, weight, labels)[0].backward()
    actual = weight.grad
    weight.grad = None
    reference.linear_cross_entropy(weight[:12] * 1.0, weight, labels)[0].backward()
    torch.testing.assert_close(actual, weight.grad, rtol=2e-5, atol=2e-6)


def test_an_upstream_factor():
    hidden, weight, labels = case.random(40, torch.bfloat16)
    plain = case.gradients(linear_cross_entropy, hidden, weight.float(), labels, scale=0.25)
    weighted = case.gradients(
        lambda *args: tuple(4.0 * x for x in linear_cross_entropy(*args, scale=0.0625)), hidden, weight.float(), labels
    )
    for one, two in zip(plain[1:], weighted[1:], strict=True):
        assert torch.equal(one, two)  # powers of two: no rounding differs


def test_two_calls_give_the_same_bits():
    inputs = case.random(100, torch.bfloat16)
    for one, two in zip(
        case.gradients(linear_cross_entropy, *inputs), case.gradients(linear_cross_entropy, *inputs), strict=True
    ):
        assert torch.equal(one, two)


def test_nothing_to_learn_from():
    hidden, weight, labels = case.random(9, torch.bfloat16)
    for count in (9, 0):
        actual = case.gradients(
            linear_cross_entropy, hidden[:count], weight, torch.full_like(labels[:count], -100), **TERMS
        )
        assert not any(tensor.any() for tensor in actual)


@pytest.mark.parametrize("interpreted", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sure_of_the_true_class(monkeypatch, interpreted, dtype):
    """p of 0.9 to 0.9999: of p - 1 a gradient rounded too early has no digit left."""
    monkeypatch.setattr(dispatch, "interpret_cpu_tensors", interpreted)
    inputs = case.sure(dtype)
    truth = case.gradients(reference.linear_cross_entropy, *case.in_fp64(inputs))
    labels = inputs[2]
    actual = case.gradients(linear_cross_entropy, *inputs, chunk_tokens=23)
    assert_right(actual, case.gradients(reference.linear_cross_entropy, *inputs), truth)
    wanted = truth[1][torch.arange(64), labels]
    error = (actual[1][torch.arange(64), labels].double() - wanted).abs()
    assert float(wanted.abs().min()) < 2e-4
    # The kernel is right to one rounding of p - 1, the CPU path to that of torch's log_softmax, which differs by CPU.
    logits = inputs[0].float() @ inputs[1].float().T
    by_torch = (logits.log_softmax(-1).exp() - logits.double().log_softmax(-1).exp()).abs().max()
    floor = 0.0 if interpreted else by_torch
    assert (error <= (2**-8 if dtype == torch.bfloat16 else 2e-6) * wanted.abs() + floor).all()


@pytest.mark.parametrize("interpreted", [pytest.param(True, marks=pytest.mark.matrix), False])
def test_a_vocabulary_of_256k(monkeypatch, interpreted):
    monkeypatch.setattr(dispatch, "interpret_cpu_tensors", interpreted)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3, 8, generator=generator), torch.randn(256_000, 8, generator=generator)
    inputs = hidden.bfloat16(), weight.bfloat16(), torch.tensor([255_999, -100, 0])
    truth = case.gradients(reference.linear_cross_entropy, *case.in_fp64(inputs))
    torchs = case.gradients(reference.linear_cross_entropy, *inputs)
    assert_right(case.gradients(linear_cross_entropy, *inputs, chunk_tokens=2), torchs, truth)


@pytest.mark.parametrize("interpreted", [True, False])
def test_views_strides_and_offsets_beyond_two_to_the_31(monkeypatch, interpreted):
    """The same bits for the same numbers, also where rows lie 2^30 elements apart: the third begins at 2^31."""
    monkeypatch.setattr(dispatch, "interpret_cpu_tensors", interpreted)
    hidden, weight, labels = case.random(6, torch.bfloat16)
    hidden[3:] = hidden[:3]
    expected = case.gradients(linear_cross_entropy, hidden, weight, labels, chunk_tokens=4)
    far = torch.empty(2 * 2**30 + case.D, dtype=torch.bfloat16).as_strided((3, case.D), (2**30, 1)).copy_(hidden[:3])
    ways = {
        "transposed": (hidden.T.contiguous().T, weight.T.contiguous().T, labels),
        "every second": (hidden.repeat_interleave(2, 0)[::2], weight.repeat_interleave(2, 0)[::2],
                         labels.repeat_interleave(2)[::2]),
        "part of a row": (torch.cat((hidden, hidden), 1)[:, case.D:], torch.cat((weight, weight), 1)[:, :case.D],
                          labels),
    }  # fmt: skip
    for way, given in ways.items():
        actual = case.gradients(linear_cross_entropy, *given, chunk_tokens=4)
        assert all(map(torch.equal, actual, expected)), way
    near = case.gradients(linear_cross_entropy, hidden[:3], weight, labels[:3])
    assert all(map(torch.equal, case.gradients(linear_cross_entropy, far, weight, labels[:3]), near))
    same = case.gradients(linear_cross_entropy, hidden[:1].expand(3, case.D), weight, labels[1:2].expand(3))
    plain = case.gradients(linear_cross_entropy, hidden[:1].repeat(3, 1), weight, labels[1:2].repeat(3))
    assert all(map(torch.equal, same, plain))


@pytest.mark.parametrize("classes", [2, 3, 17])
def test_a_few_classes(classes):
    """A classification head: most of the kernel's block is empty."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(9, 16, generator=generator), torch.randn(classes, 16, generator=generator)
    labels = torch.tensor([0, -100, 1, -100, -100, classes - 1, 0, 1, -100])
    results = []
    for loss, dtype in ((linear_cross_entropy, torch.float32), (reference.linear_cross_entropy, torch.float64)):
        given = [x.detach().to(dtype, copy=True).requires_grad_() for x in (hidden, weight)]
        scaled, loss_sum = loss(*given, labels, scale=0.25)
        scaled.backward()
        results.append([loss_sum.double(), *(x.grad.double() for x in given)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-6)
