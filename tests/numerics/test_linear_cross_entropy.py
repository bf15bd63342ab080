"""The chunked loss against its specification: exact in fp64, and in bf16 no worse than twice torch's own error."""

from __future__ import annotations

import pytest
import torch
from dist_cpt_kernels import linear_cross_entropy, reference
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernel_inputs import linear_cross_entropy as case
from tests.kernels.error_rule import errors


@pytest.mark.parametrize("chunk_tokens", [1, 3, 64])
def test_gradcheck_in_fp64(chunk_tokens):
    hidden, weight, labels = (x[:7] if x.shape[0] != case.V else x[:11] for x in case.random(9, torch.float64))
    labels = labels.clamp_max(10)
    hidden.requires_grad_()
    weight.requires_grad_()
    torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, labels, scale=0.7, chunk_tokens=chunk_tokens)[0], (hidden, weight)
    )


@pytest.mark.parametrize(
    ("num_tokens", "chunk_tokens"),
    [(1, None), (1, 1), (123, None), (123, 1), (123, 122), (123, 123), (123, 124), (507, None), (507, 64), (507, 13)],
)
def test_fp32_equals_the_specification(num_tokens, chunk_tokens):
    inputs = case.random(num_tokens)
    actual = case.gradients(linear_cross_entropy, *inputs, scale=0.3, chunk_tokens=chunk_tokens)
    expected = case.gradients(reference.linear_cross_entropy, *inputs, scale=0.3)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("make", [case.random, case.confident])
@pytest.mark.parametrize("num_tokens", [1, 123, 507])
@pytest.mark.parametrize("chunk_tokens", [None, 64])
def test_bf16_error_is_at_most_twice_that_of_torch(make, num_tokens, chunk_tokens):
    inputs = make(num_tokens, torch.bfloat16)
    truth = case.gradients(
        reference.linear_cross_entropy, *(x.double() if x.is_floating_point() else x for x in inputs)
    )
    ours = case.gradients(linear_cross_entropy, *inputs, chunk_tokens=chunk_tokens)
    torchs = case.gradients(reference.linear_cross_entropy, *inputs)
    for actual, baseline, exact in zip(ours, torchs, truth, strict=True):
        for error, allowed in zip(errors(actual, exact), errors(baseline, exact), strict=True):
            assert error <= 2 * allowed + 1e-6


def test_the_confident_rows_are_confident():
    hidden, weight, labels = case.confident(123)
    p_true = (hidden @ weight.T).softmax(-1).gather(1, labels[:, None])
    assert float(p_true.max()) > 0.999


def test_true_class_gradient_keeps_its_digits():
    """One row, p - 1 about -1.4e-4: wrong by no more than fp32's resolution of p (in bf16 nothing were left)."""
    weight = torch.eye(4).requires_grad_()
    hidden = torch.tensor([[10.0, 0.0, 0.0, 0.0]])
    scaled, _ = linear_cross_entropy(hidden, weight, torch.tensor([0]))
    scaled.backward()
    exact = torch.expm1(torch.log_softmax(hidden.double(), -1)[0, 0])
    assert weight.grad is not None
    assert abs(float(weight.grad[0, 0]) / 10.0 - float(exact)) <= 2**-23


def test_all_ignored_gives_zero_loss_and_zero_gradients():
    hidden, weight, labels = case.random(9, torch.bfloat16)
    loss, grad_hidden, grad_weight = case.gradients(linear_cross_entropy, hidden, weight, torch.full_like(labels, -100))
    assert float(loss) == 0.0
    assert not grad_hidden.any()
    assert not grad_weight.any()
    assert grad_hidden.shape == hidden.shape
    assert grad_weight.shape == weight.shape


def test_no_tokens_at_all():
    hidden, weight, labels = case.random(9)
    loss, grad_hidden, grad_weight = case.gradients(linear_cross_entropy, hidden[:0], weight, labels[:0])
    assert float(loss) == 0.0
    assert grad_hidden.shape == (0, case.D)
    assert not grad_weight.any()


def test_ignored_rows_have_no_gradient_and_no_influence():
    hidden, weight, labels = case.random(50)
    dirty = hidden.clone()
    dirty[labels == -100] = 1e4
    clean, soiled = (case.gradients(linear_cross_entropy, h, weight, labels) for h in (hidden, dirty))
    for left, right in zip(clean, soiled, strict=True):
        assert torch.equal(left, right)
    assert not clean[1][labels == -100].any()
    assert clean[1][labels != -100].any(dim=1).all()


@pytest.mark.parametrize("trains", ["hidden", "weight"])
def test_only_wanted_gradients_are_formed(trains, monkeypatch):
    hidden, weight, labels = case.random(20)
    (hidden if trains == "hidden" else weight).requires_grad_()
    with _Shapes() as seen:
        scaled, _ = linear_cross_entropy(hidden, weight, labels)
        scaled.backward()
    assert (hidden.grad is not None) == (trains == "hidden")
    assert (weight.grad is not None) == (trains == "weight")
    expected = case.gradients(reference.linear_cross_entropy, hidden, weight, labels)
    grad = hidden.grad if trains == "hidden" else weight.grad
    torch.testing.assert_close(grad, expected[1 if trains == "hidden" else 2], rtol=2e-5, atol=2e-6)
    assert ((case.V, case.D) in seen.created) == (trains == "weight")


def test_no_grad_forms_no_gradient():
    hidden, weight, labels = (x.requires_grad_() if x.is_floating_point() else x for x in case.random(20))
    with torch.no_grad(), _Shapes() as seen:
        scaled, loss = linear_cross_entropy(hidden, weight, labels)
    assert not scaled.requires_grad
    assert (case.V, case.D) not in seen.created
    torch.testing.assert_close(loss, reference.linear_cross_entropy(hidden, weight, labels)[1])


def test_the_full_logits_never_exist():
    hidden, weight, labels = case.random(507)
    with _Shapes() as seen:
        case.gradients(linear_cross_entropy, hidden, weight, labels, chunk_tokens=64)
    assert max((shape[0] for shape in seen.created if len(shape) == 2 and shape[1] == case.V), default=0) == 64


def test_upstream_gradient_scales_and_retain_graph_repeats():
    hidden, weight, labels = case.random(33)
    weight.requires_grad_()
    scaled, _ = linear_cross_entropy(hidden, weight, labels, scale=0.1)
    (first,) = torch.autograd.grad(scaled * 3.0, weight, retain_graph=True)
    (second,) = torch.autograd.grad(scaled * 3.0, weight)
    assert torch.equal(first, second)
    expected = case.gradients(reference.linear_cross_entropy, hidden, weight, labels, scale=0.3)[2]
    torch.testing.assert_close(first, expected, rtol=2e-5, atol=2e-6)


def test_fp32_weight_under_bf16_hidden_gets_an_unrounded_gradient():
    hidden, weight, labels = case.random(64, torch.bfloat16)
    loss, grad_hidden, grad_weight = case.gradients(
        linear_cross_entropy, hidden, weight.float(), labels, chunk_tokens=16
    )
    assert grad_hidden.dtype == torch.bfloat16
    assert grad_weight.dtype == torch.float32
    assert loss.dtype == torch.float32
    assert torch.equal(loss, case.gradients(linear_cross_entropy, hidden, weight, labels, chunk_tokens=16)[0])


def test_autocast_computes_in_its_dtype():
    hidden, weight, labels = case.random(40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = case.gradients(linear_cross_entropy, hidden, weight, labels)
    expected = case.gradients(linear_cross_entropy, hidden.bfloat16(), weight, labels)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[2], expected[2])
    assert actual[1].dtype == torch.float32


def test_extreme_logits_stay_finite():
    hidden, weight, labels = case.random(40)
    actual = case.gradients(linear_cross_entropy, hidden * 1e4, weight, labels)
    expected = case.gradients(reference.linear_cross_entropy, hidden * 1e4, weight, labels)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_two_calls_give_the_same_bits():
    inputs = case.random(200, torch.bfloat16)
    for left, right in zip(
        case.gradients(linear_cross_entropy, *inputs), case.gradients(linear_cross_entropy, *inputs), strict=True
    ):
        assert torch.equal(left, right)


def test_wrong_arguments_are_named():
    hidden, weight, labels = case.random(5)
    with pytest.raises(ValueError, match="got 123"):
        linear_cross_entropy(hidden, weight, torch.full_like(labels, case.V))
    with pytest.raises(ValueError, match="got -1"):
        linear_cross_entropy(hidden, weight, torch.full_like(labels, -1))
    with pytest.raises(ValueError, match="hidden"):
        linear_cross_entropy(hidden[None], weight, labels)
    with pytest.raises(ValueError, match="labels: "):
        linear_cross_entropy(hidden, weight, labels[:3])
    for wrong in ({"chunk_tokens": 0}, {"softcap": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            linear_cross_entropy(hidden, weight, labels, **wrong)


class _Shapes(TorchDispatchMode):
    """Records the shape of every floating-point tensor that an operation creates or fills."""

    def __init__(self) -> None:
        super().__init__()
        self.created: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and "t.default" not in str(func):
                self.created.add(tuple(tensor.shape))
        return out
