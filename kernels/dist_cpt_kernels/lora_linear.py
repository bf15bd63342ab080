"""Linear layers under LoRA with a hand-written backward pass: several of one input, or a whole gated MLP.

T tokens, I in, O out, R rank, S sum of the ranks of a group; D model, F ffn.

y = x W^T + b + scaling (drop(x) A^T) B^T, with cuBLAS GEMMs. Compared to W, an adapter's GEMMs have few FLOPs but as
many bytes, so tensors with T rows are read and written as rarely as possible: adapters with the same input form a
group whose A are concatenated to [S, I], with one GEMM for x A^T and one for its part of dx; the B product is added
to y in place; and the scaling is part of a GEMM, where it causes no rounding.

Saved for the backward pass: the parameters themselves (a sharding engine refills them), x, drop(x) A^T (S columns, a
hundredth of x), and a dropout mask of one byte per element. An NF4 W is decoded for each product and never saved; with
an e4m3 W the other factor is quantised for each group of products (`fp8`).

`output_unread` is for a checkpoint that runs the forward pass again for what it saves alone: the output then stays
uninitialised, and the products that only it needs are left out.
Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, section 4.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from dist_cpt_kernels import fp8
from dist_cpt_kernels.gated import ACTIVATIONS, Activation, gated, gated_gradients
from dist_cpt_kernels.nf4 import dequantize_nf4
from dist_cpt_kernels.projection import Nf4Scales, Projection, QuantisedRows, RowScales


def lora_linear(
    x: torch.Tensor, *projections: Projection, training: bool = True, output_unread: bool = False
) -> tuple[torch.Tensor, ...]:
    """y_i = x W_i^T + b_i + scaling_i (drop_i(x) A_i^T) B_i^T [..., O_i] for each projection of `x` [..., I].

    All floating-point tensors have the dtype of `x`. Dropout draws from torch's generator in the order of the
    projections, and only if `training`. Gradients are computed for all tensors that require them, including base
    weights. Differentiable once.

    Raises:
        ValueError: shapes or dtypes do not match, a dropout outside [0, 1], or autocast is enabled.
    """
    names = [f"projection {i}" for i in range(len(projections))]
    _check(x, dict(zip(names, projections, strict=True)))
    settings, tensors = _for_autograd(projections, training)
    return _LoraLinear.apply(x, settings, output_unread, *tensors)


def lora_mlp(
    x: torch.Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    activation: Activation = "silu",
    *,
    training: bool = True,
    recompute: bool = False,
    output_unread: bool = False,
) -> torch.Tensor:
    """down(activation(gate(x)) * up(x)) [..., D], each a projection as in `lora_linear`, for `x` [..., D].

    Of the intermediate tensors, gate(x) and up(x) are saved; their product is recomputed. With `recompute` gate(x) and
    up(x) are computed again as well, from x and x A^T, to the same bits: 2 F fewer elements per token are saved.

    Raises:
        ValueError: shapes or dtypes do not match, an unknown activation, a dropout outside [0, 1], or autocast.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected {', '.join(ACTIVATIONS)}, got {activation!r}")
    _check(x, {"gate": gate, "up": up})
    if gate.shape[0] != up.shape[0]:
        raise ValueError(f"gate and up: expected the same width, got {gate.shape[0]} and {up.shape[0]}")
    _check(x.new_empty(0, gate.shape[0]), {"down": down})
    settings, tensors = _for_autograd((gate, up, down), training)
    how = _MlpHow(activation, recompute, output_unread)
    return _LoraMlp.apply(x, how, settings, *tensors)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, settings: Sequence[_Setting], unread: bool, *tensors: Any
    ) -> tuple[torch.Tensor, ...]:
        layers = _layers(settings, tensors, ctx.needs_input_grad[3:])
        outs, kept = _project(x, layers, unread)
        need_x = ctx.needs_input_grad[0]
        ctx.set_materialize_grads(False)  # an unused output has no gradient instead of zeros
        ctx.settings, ctx.x_shape = settings, x.shape
        ctx.save_for_backward(
            x if _need_input(layers) else None, *_parameters_for(layers, need_x), *_for_backward(kept, layers, need_x)
        )
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: torch.Tensor | None
    ) -> tuple[Any, ...]:
        if all(grad is None for grad in grad_outputs):
            return (None,) * len(ctx.needs_input_grad)
        x, *saved = ctx.saved_tensors
        layers = _layers(ctx.settings, saved, ctx.needs_input_grad[3:])
        kept = saved[4 * len(layers) :]
        grads = [None if grad is None else _rows(grad) for grad in grad_outputs]
        inner = _inner_gradients(grads, layers, ctx.needs_input_grad[0])
        dx = _input_gradient(grads, inner, layers, kept).view(ctx.x_shape) if ctx.needs_input_grad[0] else None
        return dx, None, None, *_parameter_gradients(x, grads, inner, layers, kept)


class _LoraMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, how: _MlpHow, settings: Sequence[_Setting], *tensors: Any) -> torch.Tensor:
        layers = _layers(settings, tensors, ctx.needs_input_grad[3:])
        first, last = layers[:2], layers[2:]
        (gate, up), kept_first = _project(x, first)
        (out,), kept_last = _project(gated(gate, up, how.activation), last, how.output_unread)
        need_x = ctx.needs_input_grad[0]
        need_product = need_x or any(any(layer.needs) for layer in first)
        need_gate = need_product or _need_input(last)
        again, save_gate = need_gate and how.recompute, need_gate and not how.recompute
        ctx.set_materialize_grads(False)
        ctx.how, ctx.settings, ctx.x_shape, ctx.num_kept = how, settings, x.shape, 2 * len(kept_first)
        ctx.save_for_backward(
            x if again or _need_input(first) else None,
            gate if save_gate else None,
            up if save_gate else None,
            *(tensors[:8] if again else _parameters_for(first, need_x)),
            *_parameters_for(last, need_product),
            *_for_backward(kept_first, first, need_x, need_inner=again),
            *_for_backward(kept_last, last, need_product),
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: torch.Tensor | None
    ) -> tuple[Any, ...]:
        (grad,) = grad_outputs
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        x, gate, up, *saved = ctx.saved_tensors
        layers = _layers(ctx.settings, saved, ctx.needs_input_grad[3:])
        first, last = layers[:2], layers[2:]
        kept_first, kept_last = saved[12 : 12 + ctx.num_kept], saved[12 + ctx.num_kept :]
        need_x, want_product = ctx.needs_input_grad[0], _need_input(last)
        need_product = need_x or any(any(layer.needs) for layer in first)
        if ctx.how.recompute and (need_product or want_product):
            gate, up = _project_again(x, first, kept_first)
        grads: list[torch.Tensor | None] = [_rows(grad)]
        dgate = dup = product = None
        inner = _inner_gradients(grads, last, need_product)
        if need_product:
            dproduct = _input_gradient(grads, inner, last, kept_last)
            # All three are ours, but with retain_graph a later backward reads saved ones again.
            keeps = torch._C._autograd._get_current_graph_task_keep_graph()  # type: ignore[attr-defined]
            overwrite = ctx.how.recompute or not keeps
            dgate, dup, product = gated_gradients(
                dproduct, _rows(gate), _rows(up), ctx.how.activation, want_value=want_product, overwrite=overwrite
            )
            del dproduct
        elif want_product:
            product = gated(gate, up, ctx.how.activation)
        del gate, up
        last_gradients = _parameter_gradients(product, grads, inner, last, kept_last)
        del product
        grads = [dgate, dup]
        inner = _inner_gradients(grads, first, need_x)
        dx = _input_gradient(grads, inner, first, kept_first).view(ctx.x_shape) if need_x else None
        return dx, None, None, *_parameter_gradients(x, grads, inner, first, kept_first), *last_gradients


@dataclass(frozen=True)
class _MlpHow:
    """The settings of a call of `lora_mlp`."""

    activation: Activation
    recompute: bool
    output_unread: bool


@dataclass(frozen=True)
class _Setting:
    """The settings of a projection, without the tensors that autograd tracks."""

    rank: int  # 0: no adapter
    scaling: float
    dropout: float  # 0 in evaluation
    scales: Nf4Scales | RowScales | None


@dataclass(frozen=True)
class _Layer:
    """A projection inside an autograd function; in the backward pass, tensors that it does not read are None."""

    setting: _Setting
    weight: Any
    bias: Any
    A: Any
    B: Any
    needs: Sequence[bool]  # which of these four need a gradient


def _for_autograd(projections: Sequence[Projection], training: bool) -> tuple[tuple[_Setting, ...], list[Any]]:
    """(settings, four tensors of each: weight, bias, A, B)."""
    settings = tuple(
        _Setting(0 if p.lora_A is None else p.lora_A.shape[0], p.scaling, p.dropout if training else 0.0, p.scales)
        for p in projections
    )
    return settings, [tensor for p in projections for tensor in (p.weight, p.bias, p.lora_A, p.lora_B)]


def _layers(settings: Sequence[_Setting], tensors: Sequence[Any], needs: Sequence[bool]) -> list[_Layer]:
    return [
        _Layer(setting, *tensors[4 * i : 4 * i + 4], needs=needs[4 * i : 4 * i + 4])
        for i, setting in enumerate(settings)
    ]


def _need_input(layers: Sequence[_Layer]) -> bool:
    """Whether the gradients of weights or of A read the layers' input."""
    return any(layer.needs[0] or layer.needs[2] for layer in layers)


def _parameters_for(layers: Sequence[_Layer], need_x: bool) -> list[Any]:
    """The tensors that the backward pass reads: W and A for dx, B for that of A's output."""
    return [
        tensor
        for layer in layers
        for tensor in (
            layer.weight if need_x else None,
            None,
            layer.A if need_x else None,
            layer.B if need_x or layer.needs[2] else None,
        )
    ]


def _groups(layers: Sequence[_Layer]) -> list[list[int]]:
    """The layers whose adapters have the same input: all those without dropout; each one with dropout alone."""
    adapted = [i for i, layer in enumerate(layers) if layer.setting.rank]
    same = [i for i in adapted if not layers[i].setting.dropout]
    return ([same] if same else []) + [[i] for i in adapted if layers[i].setting.dropout]


# Per group: drop(x) A^T [T, S] and the dropout mask [T, I].
_Saved = tuple[Any, Any]


def _project(
    x: torch.Tensor, layers: Sequence[_Layer], unread: bool = False
) -> tuple[list[torch.Tensor], list[_Saved]]:
    """(each output [..., O], the tensors to save of each group); `unread` outputs are not computed."""
    x_TI = _rows(x)
    outs = _base_products(x, layers, unread)
    kept: list[_Saved] = []
    for group in _groups(layers):
        dropped_TI, mask_TI = x_TI, None
        if dropout := layers[group[0]].setting.dropout:
            dropped_TI, mask_TI = torch.native_dropout(x_TI, dropout, True)
        kept.append((dropped_TI @ _stacked_A(layers, group).T, mask_TI))
    if not unread:
        _add_adapters(outs, [inner_TS for inner_TS, _ in kept], layers)
    return outs, kept


def _project_again(x: torch.Tensor, layers: Sequence[_Layer], kept: Sequence[Any]) -> list[torch.Tensor]:
    """The outputs of `_project`, from what it saved."""
    outs = _base_products(x, layers)
    _add_adapters(outs, kept[::2], layers)
    return outs


def _base_products(x: torch.Tensor, layers: Sequence[_Layer], unread: bool = False) -> list[torch.Tensor]:
    """x W^T + b [..., O] of each layer."""
    x_TI, quantised = _rows(x), None
    outs: list[torch.Tensor] = []
    for layer in layers:
        num_outputs = layer.weight.shape[0] if layer.setting.scales is None else layer.setting.scales.shape[0]
        outs.append(x.new_empty((*x.shape[:-1], num_outputs)))  # not a view: a caller may modify it in place
        if unread:
            continue
        if (weight := _in_rows(layer)) is not None:
            quantised = quantised or fp8.quantize_rows(x_TI)
            fp8.scaled_product(quantised, weight, _rows(outs[-1]))
            if layer.bias is not None:
                outs[-1].add_(layer.bias)
            continue
        weight_OI = _dense(layer, x.dtype)
        if layer.bias is None:
            torch.mm(x_TI, weight_OI.T, out=_rows(outs[-1]))
        else:
            torch.addmm(layer.bias, x_TI, weight_OI.T, out=_rows(outs[-1]))
        del weight_OI  # before the next one is decoded
    return outs


def _add_adapters(outs: Sequence[torch.Tensor], inner: Sequence[torch.Tensor], layers: Sequence[_Layer]) -> None:
    """Add scaling drop(x) A^T B^T to each output, in place."""
    for group, inner_TS in zip(_groups(layers), inner, strict=True):
        for i, inner_TR in _split(inner_TS, layers, group):
            _rows(outs[i]).addmm_(inner_TR, layers[i].B.T, alpha=layers[i].setting.scaling)


def _for_backward(
    kept: Sequence[_Saved], layers: Sequence[_Layer], need_x: bool, need_inner: bool = False
) -> list[Any]:
    """The tensors of the groups that the backward pass reads: two per group."""
    saved: list[Any] = []
    for group, (inner_TS, mask_TI) in zip(_groups(layers), kept, strict=True):
        saved.append(inner_TS if need_inner or any(layers[i].needs[3] for i in group) else None)
        saved.append(mask_TI if need_x or any(layers[i].needs[2] for i in group) else None)
    return saved


def _inner_gradients(
    grads: Sequence[torch.Tensor | None], layers: Sequence[_Layer], need_x: bool
) -> list[torch.Tensor | None]:
    """scaling dy B, the gradient of drop(x) A^T [T, S], of each group; None if unused."""
    inner: list[torch.Tensor | None] = []
    for group in _groups(layers):
        given = [grad for i in group if (grad := grads[i]) is not None]
        if not given or not (need_x or any(layers[i].needs[2] for i in group)):
            inner.append(None)
            continue
        inner_TS = given[0].new_empty((given[0].shape[0], sum(layers[i].setting.rank for i in group)))
        for i, inner_TR in _split(inner_TS, layers, group):
            grad_TO = grads[i]
            if grad_TO is None:
                inner_TR.zero_()
            else:
                inner_TR.addmm_(grad_TO, layers[i].B, beta=0, alpha=layers[i].setting.scaling)
        inner.append(inner_TS)
    return inner


def _input_gradient(
    grads: Sequence[torch.Tensor | None],
    inner: Sequence[torch.Tensor | None],
    layers: Sequence[_Layer],
    kept: Sequence[Any],
) -> torch.Tensor:
    """dx [T, I]: the sum of dy W and, through the dropout mask, of (scaling dy B) A."""
    dx: Any = None
    for grad_TO, layer in zip(grads, layers, strict=True):
        if grad_TO is None:
            continue
        if (weight := _in_rows(layer)) is not None:
            part = fp8.fp8_input_gradient(grad_TO, weight)
            dx = part if dx is None else dx.add_(part)
        elif dx is None:
            dx = grad_TO @ _dense(layer, grad_TO.dtype)
        else:
            dx.addmm_(grad_TO, _dense(layer, grad_TO.dtype))
    for group, inner_TS, mask_TI in zip(_groups(layers), inner, kept[1::2], strict=True):
        if inner_TS is None:
            continue
        if mask_TI is None:
            dx.addmm_(inner_TS, _stacked_A(layers, group))
        else:
            layer = layers[group[0]]
            dx.addcmul_(inner_TS @ layer.A, mask_TI, value=_dropout_scale(layer))
    return dx


def _parameter_gradients(
    x: torch.Tensor | None,
    grads: Sequence[torch.Tensor | None],
    inner: Sequence[torch.Tensor | None],
    layers: Sequence[_Layer],
    kept: Sequence[Any],
) -> list[torch.Tensor | None]:
    """The gradients of weight, bias, A and B of each layer, None where not needed."""
    x_TI: Any = None if x is None else _rows(x)
    gradients: list[torch.Tensor | None] = [None] * (4 * len(layers))
    for i, (grad_TO, layer) in enumerate(zip(grads, layers, strict=True)):
        if grad_TO is not None and layer.needs[0]:
            gradients[4 * i] = grad_TO.T @ x_TI
        if grad_TO is not None and layer.needs[1]:
            gradients[4 * i + 1] = grad_TO.sum(0)
    for group, dinner_TS, inner_TS, mask_TI in zip(_groups(layers), inner, kept[::2], kept[1::2], strict=True):
        if dinner_TS is not None and any(layers[i].needs[2] for i in group):
            dropped_TI = x_TI
            if mask_TI is not None:  # one pass, the same as in the forward pass
                dropped_TI = torch.ops.aten.native_dropout_backward(x_TI, mask_TI, _dropout_scale(layers[group[0]]))
            dA_SI = dinner_TS.T @ dropped_TI
            for i, dA_RI in _split(dA_SI, layers, group, dim=0):
                gradients[4 * i + 2] = dA_RI if layers[i].needs[2] and grads[i] is not None else None
        if inner_TS is None:
            continue
        for i, inner_TR in _split(inner_TS, layers, group):
            grad_TO = grads[i]
            if grad_TO is not None and layers[i].needs[3]:
                dB_OR = grad_TO.new_empty((grad_TO.shape[1], inner_TR.shape[1]))
                gradients[4 * i + 3] = dB_OR.addmm_(grad_TO.T, inner_TR, beta=0, alpha=layers[i].setting.scaling)
    return gradients


def _dropout_scale(layer: _Layer) -> float:
    """The factor of the elements that dropout keeps."""
    return 0.0 if layer.setting.dropout == 1.0 else 1.0 / (1.0 - layer.setting.dropout)


def _in_rows(layer: _Layer) -> QuantisedRows | None:
    """W in e4m3, if it is stored so."""
    scales = layer.setting.scales
    return QuantisedRows(layer.weight, scales.scales) if isinstance(scales, RowScales) else None


def _dense(layer: _Layer, dtype: torch.dtype) -> torch.Tensor:
    """W [O, I] in `dtype`, not of e4m3."""
    scales = layer.setting.scales
    if scales is None:
        return layer.weight
    assert isinstance(scales, Nf4Scales)
    return dequantize_nf4(layer.weight, scales.absmax, scales.shape, torch.bfloat16, nested=scales.nested).to(dtype)


def _stacked_A(layers: Sequence[_Layer], group: Sequence[int]) -> torch.Tensor:
    """The A of a group, concatenated to [S, I]."""
    return layers[group[0]].A if len(group) == 1 else torch.cat([layers[i].A for i in group])


def _split(
    tensor: torch.Tensor, layers: Sequence[_Layer], group: Sequence[int], dim: int = 1
) -> Iterator[tuple[int, torch.Tensor]]:
    """(index of the layer, its slice of S) for each layer of the group."""
    return zip(group, tensor.split([layers[i].setting.rank for i in group], dim), strict=True)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[..., I] as [T, I]: a view if possible."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _check(x: torch.Tensor, projections: dict[str, Projection]) -> None:
    if torch.is_autocast_enabled(x.device.type):
        raise ValueError("autocast is enabled: these functions compute in the dtype of x, so cast it before the call")
    for name, p in projections.items():
        floating = {"lora_A": p.lora_A, "lora_B": p.lora_B, "bias": p.bias}
        if p.scales is None:
            floating["weight"] = p.weight
        other = [f"{key} {t.dtype}" for key, t in floating.items() if t is not None and t.dtype != x.dtype]
        if other:
            raise ValueError(f"{name}: expected {x.dtype} as x, got {', '.join(other)}")
        if (p.lora_A is None) != (p.lora_B is None):
            raise ValueError(f"{name}: expected both lora_A and lora_B, or neither")
        if not 0.0 <= p.dropout <= 1.0:
            raise ValueError(f"{name}: expected a dropout from 0 to 1, got {p.dropout}")
        out, width = p.shape[0], x.shape[-1] if x.ndim else 0
        rank = 0 if p.lora_A is None else p.lora_A.shape[0]
        expected = {"weight": (out, width), "bias": (out,), "lora_A": (rank, width), "lora_B": (out, rank)}
        shapes = {key: tuple(t.shape) for key, t in floating.items() if t is not None} | {"weight": p.shape}
        wrong = [f"{key} {[*actual]}" for key, actual in shapes.items() if actual != expected[key]]
        if wrong:
            raise ValueError(f"{name}: does not match x {[*x.shape]} and {out} outputs: {', '.join(wrong)}")
