"""LoRA linears and the gated MLP against fp64, beside the eager composition: outputs and every gradient."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from dist_cpt_kernels import Projection, dispatch, lora_linear, lora_mlp, reference
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from dist_cpt.adapters import quantize
from tests.kernel_inputs import lora_linear as case

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 123])
def test_error_is_at_most_twice_that_of_the_eager_composition(num_tokens, dtype):
    x = case.random(50, num_tokens, 507, dtype=dtype)
    one = partial(case.projection_of, width=507, dtype=dtype)
    several = (
        [one(123)],
        [one(507, bias=True, scaling=16 / 8**0.5)],  # rank-stabilised
        [one(507, bias=True), one(123, bias=True, seed=10), one(123, rank=3, scaling=0.3, seed=20)],
        [one(123, rank=0), one(123, seed=10), one(1, rank=1, seed=20)],
        [one(507, nf4=True, bias=True), one(123, nf4=True, seed=10)],
    )
    for projections in several:
        case.assert_lora_right(lora_linear, reference.lora_linear, x, projections)


@pytest.mark.parametrize("dtype", DTYPES)
def test_whatever_trains(dtype):
    """Full-parameter training, a bias alone, an adapter beside its base."""
    x = case.random(50, 123, 507, dtype=dtype)
    plain = [
        case.projection_of(123, 507, dtype, rank=0, bias=True),
        case.projection_of(64, 507, dtype, rank=0, seed=10),
    ]
    adapted = [case.projection_of(123, 507, dtype, bias=True), case.projection_of(64, 507, dtype, seed=10)]
    for projections, trains in (
        (plain, ("weight",)), (plain, ("weight", "bias")), (plain, ("bias",)), (plain, ()),
        (adapted, case.FIELDS), (adapted, ("lora_A",)), (adapted, ("lora_B",)), (adapted, ("bias",)),
    ):  # fmt: skip
        case.assert_lora_right(lora_linear, reference.lora_linear, x, projections, trains=trains)


@pytest.mark.parametrize(("out", "width"), [(48, 96), (30, 45), (13, 7)])
def test_a_layer_of_bitsandbytes_yields_its_scales(monkeypatch, out, width):
    """Kernel, reference and the layer's own product decode the same bits."""
    layer = torch.nn.Linear(width, out).bfloat16().requires_grad_(False)
    how = {"blocksize": 64, "compress_statistics": True, "quant_type": "nf4"}
    codes, layer.quant_state = quantize_4bit(layer.weight.data, **how)
    layer.weight = torch.nn.Parameter(codes, requires_grad=False)
    projection = Projection(layer.weight, layer.bias, scales=quantize.kernel_scales(layer))
    assert projection.shape == (out, width)
    for dtype in DTYPES:
        weights = []
        for interpreted in (True, False):
            monkeypatch.setattr(dispatch, "interpret_cpu_tensors", interpreted)
            weights.append(quantize.read_weight(layer).to(dtype))
            (product,) = lora_linear(torch.eye(width, dtype=dtype), replace(projection, bias=None))
            weights.append(product.T)
        assert all(weight.dtype == dtype and torch.equal(weight, weights[0]) for weight in weights)


def _mlp(width, ffn, dtype, **settings):
    shapes = ((ffn, width), (ffn, width), (width, ffn))
    return [case.projection_of(*shape, dtype, seed=10 * i, **settings) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("interpreted", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mlp_error_is_at_most_twice_that_of_the_eager_composition(monkeypatch, dtype, interpreted):
    monkeypatch.setattr(dispatch, "interpret_cpu_tensors", interpreted)
    x = case.random(50, 2, 11, 123, dtype=dtype)
    for activation in ("silu", "gelu_tanh", "gelu_exact"):
        ops = [partial(op, activation=activation) for op in (lora_mlp, reference.lora_mlp)]
        case.assert_lora_right(*ops, x, _mlp(123, 64, dtype, bias=activation == "silu"))
    case.assert_lora_right(lora_mlp, reference.lora_mlp, x[:1, :1], _mlp(123, 507, dtype))
    case.assert_lora_right(lora_mlp, reference.lora_mlp, x, _mlp(123, 67, dtype, nf4=True))
    case.assert_lora_right(lora_mlp, reference.lora_mlp, x, _mlp(123, 64, dtype, rank=0), trains=("weight",))
    for trains in (case.FIELDS, ("lora_A",), ("bias",), ()):
        case.assert_lora_right(lora_mlp, reference.lora_mlp, x, _mlp(123, 64, dtype, bias=True), trains=trains)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_is_that_of_the_eager_composition_with_the_same_draws(dtype):
    x = case.random(50, 3, 41, 507, dtype=dtype)
    mixed = [case.projection_of(123, 507, dtype, seed=10 * i, dropout=p) for i, p in enumerate((0.5, 0.0, 0.1, 0.0))]
    case.assert_lora_right(lora_linear, reference.lora_linear, x, mixed)
    case.assert_lora_right(lora_linear, reference.lora_linear, x, mixed[:1], trains=("lora_B",))
    case.assert_lora_right(lora_mlp, reference.lora_mlp, x, _mlp(507, 123, dtype, dropout=0.2))
    case.assert_lora_right(lora_mlp, reference.lora_mlp, x, _mlp(507, 123, dtype, dropout=1.0))
    resting = [replace(projection, dropout=0.0) for projection in mixed]
    for op, layers, still in (
        (lora_linear, mixed, resting),
        (lora_mlp, _mlp(507, 64, dtype, dropout=0.5), _mlp(507, 64, dtype)),
    ):
        evaluated = case.run(partial(op, training=False), x, layers)
        assert all(map(torch.equal, evaluated, case.run(op, x, still)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_dropout_under_activation_checkpointing_draws_the_same_again(reentrant):
    x = case.random(50, 7, 64)
    for op, layers in (
        (lora_linear, [case.projection_of(32, 64, torch.float32, seed=10 * i, dropout=0.5) for i in range(2)]),
        (lora_mlp, _mlp(64, 32, torch.float32, dropout=0.5)),
    ):
        gradients = []
        for way in (op, partial(checkpoint, op, use_reentrant=reentrant)):
            leaf, cast = x.clone().requires_grad_(), [case.cast(p, torch.float32, ("lora_A", "lora_B")) for p in layers]
            torch.manual_seed(5)
            outs = way(leaf, *(projection for projection, _ in cast))
            torch.rand(3)  # others draw too
            torch.stack([out.square().sum() for out in (outs if isinstance(outs, tuple) else (outs,))]).sum().backward()
            gradients.append([leaf.grad, *(leaf.grad for _, leaves in cast for leaf in leaves)])
        assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gate_and_up_computed_again_have_the_same_bits(dropout):
    x, layers = case.random(50, 7, 64), _mlp(64, 32, torch.float32, dropout=dropout)
    gradients, kept = [], []
    for again in (False, True):
        leaf, cast = x.clone().requires_grad_(), [case.cast(p, torch.float32, ("lora_A", "lora_B")) for p in layers]
        torch.manual_seed(5)
        out = []
        kept.append(_saved(lambda: out.append(lora_mlp(leaf, *(p for p, _ in cast), recompute=again))))  # noqa: B023
        loss = out[0].square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        gradients.append([out[0], leaf.grad, *(leaf.grad for _, leaves in cast for leaf in leaves)])
    assert all(map(torch.equal, *gradients))
    sizes = [sum(t.numel() for t in saved) for saved in kept]
    assert sizes[0] - sizes[1] == 2 * 7 * 32


def test_an_unread_output_is_not_computed_and_leaves_the_gradients():
    x = case.random(50, 7, 64)
    for op, layers in (
        (lora_linear, [case.projection_of(32, 64, torch.float32, nf4=nf4, bias=True) for nf4 in (True, False)]),
        (lora_mlp, _mlp(64, 32, torch.float32)),
    ):
        gradients, products = [], []
        for unread in (False, True):
            leaf, cast = x.clone().requires_grad_(), [case.cast(p, torch.float32, ("lora_A", "lora_B")) for p in layers]
            with FlopCounterMode(display=False) as flops:
                out = op(leaf, *(projection for projection, _ in cast), output_unread=unread)
            products.append(flops.get_total_flops())
            outs = out if isinstance(out, tuple) else (out,)
            assert all(o.shape == (7, p.shape[0]) for o, p in zip(outs, layers[-len(outs) :], strict=True))
            torch.autograd.backward(outs, [torch.ones_like(o) for o in outs])
            gradients.append([leaf.grad, *(leaf.grad for _, leaves in cast for leaf in leaves)])
        assert all(map(torch.equal, *gradients))
        assert products[0] - products[1] == 2 * 7 * 64 * 32 * len(outs)


def test_gradcheck():
    x = case.random(50, 5, 7, dtype=torch.float64).requires_grad_()
    wide = torch.float64
    three = [case.projection_of(6, 7, wide, rank=2, bias=True), case.projection_of(3, 7, wide, rank=3, seed=10),
             case.projection_of(4, 7, wide, rank=0, seed=20)]  # fmt: skip
    for op, layers, activations in (
        (lora_linear, three, (None,)),
        (lora_mlp, _mlp(7, 5, wide, rank=2, bias=True), ("silu", "gelu_tanh", "gelu_exact")),
    ):
        leaves = [t for p in layers for f in case.FIELDS if (t := getattr(p, f)) is not None]
        for leaf in leaves:
            leaf.requires_grad_()
        for activation in activations:
            options = {} if activation is None else {"activation": activation}
            # gradcheck changes the leaves in place, so the closed-over projections see it
            assert torch.autograd.gradcheck(lambda x, *_, op=op, layers=layers, c=options: op(x, *layers, **c),
                                            (x, *leaves))  # fmt: skip


def test_views_and_strides():
    both = case.random(50, 4, 2 * 123, 6)
    layers = [case.projection_of(64, 123, torch.float32), case.projection_of(32, 123, torch.float32, seed=10)]
    turned = [replace(p, weight=p.weight.T.contiguous().T, lora_A=p.lora_A.T.contiguous().T) for p in layers]
    for x in (both[:, :123].transpose(1, 2), both.transpose(1, 2)[..., ::2], both[:1, :123].mT.expand(4, 6, 123)):
        expected = case.run(lora_linear, x.contiguous(), layers)
        actual = case.run(lora_linear, x, turned)
        for ours, exact in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)
    leaf = both[0, :123, 0].clone().requires_grad_()  # one token, without a batch
    out, _ = lora_linear(leaf, *layers)
    assert out.shape == (64,)
    out.sum().backward()  # an expanded gradient
    assert leaf.grad.shape == (123,)


def test_empty_batch():
    for dtype in DTYPES:
        for dropout in (0.0, 0.5):
            x = torch.empty(2, 0, 123, dtype=dtype)
            actual = case.run(
                lora_linear, x, [case.projection_of(64, 123, dtype, bias=True, dropout=dropout)], trains=case.FIELDS
            )
            actual += case.run(lora_mlp, x, _mlp(123, 64, dtype, dropout=dropout), trains=case.FIELDS)
            assert actual[0].shape == (2, 0, 64)
            assert all(not result.count_nonzero() for result in actual)


def test_nothing_given_is_overwritten_and_outputs_may_be():
    x = case.random(50, 5, 123).requires_grad_()
    layers = [case.projection_of(64, 123, torch.float32), case.projection_of(64, 123, torch.float32, seed=10)]
    mlp = _mlp(123, 64, torch.float32)
    before = x.detach().clone()
    other = x.square()  # keeps x for its own backward
    first, second = lora_linear(x, *layers)
    loss = (first.add_(1.0) * second).sum() + lora_mlp(x, *mlp).sum() + other.sum()
    once, twice = (torch.autograd.grad(loss, x, retain_graph=keep)[0] for keep in (True, False))
    assert torch.equal(once, twice)
    assert torch.equal(x, before)
    assert x._version == 0
    plain = x.detach().clone().requires_grad_()
    first, second = reference.lora_linear(plain, *layers)
    loss = ((first + 1.0) * second).sum() + reference.lora_mlp(plain, *mlp).sum() + plain.square().sum()
    torch.testing.assert_close(once, torch.autograd.grad(loss, plain)[0], rtol=1e-4, atol=1e-5)


def test_an_output_without_use_yields_no_gradient():
    x = case.random(50, 5, 123).requires_grad_()
    cast = [
        case.cast(case.projection_of(64, 123, torch.float32, seed=10 * i), torch.float32, case.FIELDS) for i in range(3)
    ]
    outs = lora_linear(x, *(projection for projection, _ in cast))
    outs[1].sum().backward()
    assert [[leaf.grad is not None for leaf in leaves] for _, leaves in cast] == [[False] * 3, [True] * 3, [False] * 3]
    plain = x.detach().clone().requires_grad_()
    reference.lora_linear(plain, cast[1][0])[0].sum().backward()
    torch.testing.assert_close(x.grad, plain.grad, rtol=1e-5, atol=1e-5)


def _saved(run):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        run()
    return saved


@pytest.mark.parametrize("nf4", [True, False])
def test_what_is_kept_for_the_backward_pass(nf4):
    num_tokens, width, ffn, rank = 11, 128, 192, 4
    x = case.random(50, num_tokens, width, dtype=torch.bfloat16).requires_grad_()
    layers = [case.cast(p, torch.bfloat16, ("lora_A", "lora_B"))[0]
              for p in _mlp(width, ffn, torch.bfloat16, rank=rank, nf4=nf4)]  # fmt: skip
    given = {id(t) for p in layers for f in case.FIELDS if (t := getattr(p, f)) is not None} | {id(x)}
    saved = _saved(lambda: lora_mlp(x, *layers))
    # x and W, A, B of each, which exist anyway: the very tensors
    assert sum(id(tensor) in given for tensor in saved) == 1 + 3 * 3
    made = sorted(tuple(tensor.shape) for tensor in saved if id(tensor) not in given)
    assert made == sorted([(num_tokens, ffn)] * 2 + [(num_tokens, 2 * rank), (num_tokens, rank)])
    dropping = [replace(p, dropout=0.1) for p in layers]
    masks = [tensor for tensor in _saved(lambda: lora_mlp(x, *dropping)) if tensor.dtype == torch.bool]
    assert [tuple(mask.shape) for mask in masks] == [(num_tokens, width)] * 2 + [(num_tokens, ffn)]


def test_nothing_is_kept_or_computed_for_what_needs_no_gradient():
    x = case.random(50, 11, 64)
    frozen, trained = (
        case.cast(case.projection_of(32, 64, torch.float32), torch.float32, t)[0] for t in ((), ("lora_B",))
    )
    assert _saved(lambda: lora_linear(x, frozen)) == []
    kept = _saved(lambda: lora_linear(x, trained))
    assert [tuple(tensor.shape) for tensor in kept] == [(11, 8)]
    kept = _saved(lambda: lora_linear(x.clone().requires_grad_(), frozen))
    assert [tuple(tensor.shape) for tensor in kept] == [(32, 64), (8, 64), (32, 8)]
    assert not lora_linear(x, frozen)[0].requires_grad
    (gradient,) = torch.autograd.grad(lora_linear(x, trained)[0].sum(), trained.lora_B)
    (expected,) = torch.autograd.grad(reference.lora_linear(x, trained)[0].sum(), trained.lora_B)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)
    gate, up, down = (case.cast(p, torch.float32, ())[0] for p in _mlp(64, 32, torch.float32))
    for field, shapes in (("lora_A", [(11, 32), (11, 32), (64, 8)]), ("lora_B", [(11, 8)])):
        last = replace(down, **{field: getattr(down, field).clone().requires_grad_()})
        assert [tuple(t.shape) for t in _saved(lambda last=last: lora_mlp(x, gate, up, last))] == shapes
        actual, expected = (torch.autograd.grad(op(x, gate, up, last).sum(), getattr(last, field))[0]
                           for op in (lora_mlp, reference.lora_mlp))  # fmt: skip
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_second_derivative_is_refused_and_not_wrong():
    x = case.random(50, 5, 64).requires_grad_()
    for out in (
        lora_linear(x, case.projection_of(32, 64, torch.float32))[0],
        lora_mlp(x, *_mlp(64, 32, torch.float32)),
    ):
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


def test_wrong_arguments_are_named():
    x = case.random(50, 5, 64)
    good = case.projection_of(32, 64, torch.float32, bias=True)
    for match, wrong in (
        ("projection 1: expected torch.float32 as x, got lora_A torch.bfloat16", {"lora_A": good.lora_A.bfloat16()}),
        ("projection 1: expected torch.float32 as x, got weight torch.float64", {"weight": good.weight.double()}),
        ("projection 1: expected both lora_A and lora_B", {"lora_B": None}),
        (r"projection 1: does not match x \[5, 64\] and 32 outputs: lora_B \[31, 8\]", {"lora_B": good.lora_B[1:]}),
        (r"projection 1: .* 31 outputs: .*bias \[32\]", {"weight": good.weight[1:]}),
        (r"projection 1: .* weight \[32, 63\]", {"weight": good.weight[:, 1:]}),
        ("projection 1: .* dropout .* got 1.5", {"dropout": 1.5}),
    ):
        with pytest.raises(ValueError, match=match):
            lora_linear(x, good, replace(good, **wrong))
    gate, up, down = _mlp(64, 32, torch.float32)
    with pytest.raises(ValueError, match=r"activation: .* got 'relu'"):
        lora_mlp(x, gate, up, down, "relu")
    with pytest.raises(ValueError, match=r"gate and up: .* got 32 and 64"):
        lora_mlp(x, gate, case.projection_of(64, 64, torch.float32), down)
    with pytest.raises(ValueError, match=r"down: does not match x \[0, 32\]"):
        lora_mlp(x, gate, up, up)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="autocast"):
        lora_linear(x, good)
