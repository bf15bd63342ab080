"""Experts of a frozen mixture in 4 or 8 bits: the matrix of each is quantised by itself, as a linear layer is.

E experts, O and I features out and in, S = tokens x experts per token.

A parameter [E, O, I], or [E, I, O] where the model stores it transposed, becomes codes whose first dimension is E, so
that engines shard them as they shard 16-bit experts. The scales are neither a parameter nor a buffer, and on every
rank. A product dequantises the experts one by one, or all of one parameter where it multiplies in groups; backward
dequantises again.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from dist_cpt.adapters.experts import PARAMETERS, Groups, adapted_experts, can_group, experts_of
from dist_cpt.adapters.placeholders import placeholder
from dist_cpt.runtime.log import LOGGER

Spec = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # shape and dtype of codes and scales


class ExpertFormat(Protocol):
    """How one matrix [O, I] is stored, and how a stack of them is read; `tables` are scales that all experts share."""

    tables: tuple[str, ...]

    def fits(self, outputs: int, inputs: int) -> bool: ...
    def expert_spec(self, outputs: int, inputs: int) -> Spec: ...
    def quantise_expert(self, weight: torch.Tensor) -> dict[str, torch.Tensor]: ...
    def dequantise_experts(
        self, codes: torch.Tensor, scales: Mapping[str, torch.Tensor], outputs: int, dtype: torch.dtype
    ) -> torch.Tensor: ...
    def row_factors(self, scales: Mapping[str, torch.Tensor]) -> torch.Tensor | None: ...


@dataclass(frozen=True)
class Stack:
    """The matrices of one parameter: how they are stored, and the scales of the codes, none before these are read."""

    form: ExpertFormat
    shape: tuple[int, int, int]  # E, O, I
    transposed: bool  # in the model's own files
    scales: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        """Of the 16-bit parameter."""
        experts, outputs, inputs = self.shape
        return (experts, inputs, outputs) if self.transposed else self.shape

    def empty(self, device: torch.device | str) -> dict[str, torch.Tensor]:
        """Codes and scales of the right shapes, to be overwritten."""
        experts, outputs, inputs = self.shape
        return {
            key: torch.zeros(shape if key in self.form.tables else (experts, *shape), dtype=dtype, device=device)
            for key, (shape, dtype) in self.form.expert_spec(outputs, inputs).items()
        }

    def quantise(self, weight: torch.Tensor) -> torch.Tensor:
        """The codes of the parameter `weight`, as the model stores it; their scales are kept."""
        weight_EOI = weight.transpose(-2, -1) if self.transposed else weight
        quantised = [self.form.quantise_expert(weight_OI.contiguous()) for weight_OI in weight_EOI]
        codes = torch.stack([expert.pop("codes") for expert in quantised])
        for key, first in quantised[0].items():
            self.scales[key] = first if key in self.form.tables else torch.stack([expert[key] for expert in quantised])
        return codes

    def matrices(self, codes: torch.Tensor, dtype: torch.dtype, expert: int | None = None) -> torch.Tensor:
        """[E, O, I], or [1, O, I] of one expert, still to be multiplied by `row_factors`."""
        scales = self.scales
        if expert is not None:
            one = slice(expert, expert + 1)
            codes = codes[one]
            scales = {key: scale if key in self.form.tables else scale[one] for key, scale in scales.items()}
        return self.form.dequantise_experts(codes, scales, self.shape[1], dtype)

    def row_factors(self) -> torch.Tensor | None:
        """fp32 [E, O], or None: `matrices` are the weights themselves."""
        return self.form.row_factors(self.scales)

    def plain(self, codes: torch.Tensor) -> torch.Tensor:
        """The fp32 parameter that the codes stand for, as the model stores it."""
        weight_EOI, factors_EO = self.matrices(codes, torch.float32), self.row_factors()
        weight_EOI = weight_EOI if factors_EO is None else weight_EOI * factors_EO[..., None]
        return (weight_EOI.transpose(-2, -1) if self.transposed else weight_EOI).contiguous()


class QuantisedExperts:
    """Mixed into a model's class of experts; `stacks` by the name of the parameter that has the codes."""

    stacks: dict[str, Stack]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        by_loop = not can_group(self, hidden_states)
        return adapted_experts(self, {}, hidden_states, top_k_index, top_k_weights, by_loop)

    def frozen_product(self, x_SI: torch.Tensor, name: str, groups: Groups) -> torch.Tensor | None:
        """[S, O] of x and the matrices of parameter `name`; None if it is not quantised."""
        if name not in self.stacks:
            return None
        return _Product.apply(x_SI, groups.expert_S, groups.ends_E, self, name, groups.by_loop)


class _Product(torch.autograd.Function):
    """x W^T by groups. Row factors multiply the product, not the codes, which are exact in 16 bits."""

    @staticmethod
    def forward(
        ctx: Any,
        x_SI: torch.Tensor,
        expert_S: torch.Tensor,
        ends_E: torch.Tensor,
        experts: Any,
        name: str,
        by_loop: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(expert_S, ends_E)
        ctx.rest = experts, name, by_loop
        stack, codes = experts.stacks[name], getattr(experts, name).data
        y_SO = _grouped(x_SI, stack, codes, (ends_E, by_loop), backward=False)
        factors_EO = stack.row_factors()
        return y_SO if factors_EO is None else (y_SO * factors_EO[expert_S]).to(x_SI.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_SO,), (expert_S, ends_E) = grads, ctx.saved_tensors
        experts, name, by_loop = ctx.rest
        stack, codes = experts.stacks[name], getattr(experts, name).data  # an engine may just have gathered them
        factors_EO = stack.row_factors()
        if factors_EO is not None:
            grad_SO = (grad_SO * factors_EO[expert_S]).to(grad_SO.dtype)
        return _grouped(grad_SO.contiguous(), stack, codes, (ends_E, by_loop), backward=True), *(None,) * 5


def _grouped(
    x: torch.Tensor, stack: Stack, codes: torch.Tensor, groups: tuple[torch.Tensor, bool], *, backward: bool
) -> torch.Tensor:
    """Rows of x times the transposed matrix of their expert, in backward times the matrix itself."""
    ends_E, by_loop = groups
    if not by_loop:
        weight_EOI = stack.matrices(codes, x.dtype)
        return torch._grouped_mm(x, weight_EOI if backward else weight_EOI.transpose(-2, -1), offs=ends_E)
    products = [x.new_empty(0, stack.shape[2 if backward else 1])]
    for expert, (start, stop) in enumerate(itertools.pairwise([0, *ends_E.tolist()])):
        if start < stop:
            weight_OI = stack.matrices(codes, x.dtype, expert)[0]
            products.append(F.linear(x[start:stop], weight_OI.T if backward else weight_OI))
    return torch.cat(products)


def make_quantised(model: nn.Module, form: ExpertFormat, weights: str) -> None:
    """Make the experts of a model on the meta device wait for codes in place of their matrices; those of sizes that do
    not fit stay as they are, with a line in the log."""
    plain: set[str] = set()
    for _, module in experts_of(model):
        stacks = {}
        for name in PARAMETERS:
            parameter: Any = getattr(module, name, None)
            if parameter is None or parameter.ndim != 3:
                continue
            transposed = bool(module.is_transposed)
            experts, outputs, inputs = (parameter.mT if transposed else parameter).shape
            if not form.fits(outputs, inputs):
                plain.add(f"{name} {outputs} x {inputs}")
                continue
            stacks[name] = Stack(form, (experts, outputs, inputs), transposed)
            codes = stacks[name].empty("meta")["codes"]
            setattr(module, name, nn.Parameter(codes, requires_grad=False))
        if stacks:
            module.__class__ = type(type(module).__name__, (QuantisedExperts, type(module)), {})
            vars(module)["stacks"] = stacks
    if plain:
        LOGGER.info("model.weights: %s: experts of these sizes stay in bf16: %s", weights, ", ".join(sorted(plain)))


def stacks_of(model: nn.Module) -> Iterator[tuple[str, Any, str, Stack]]:
    """(path, module, name of the parameter, its matrices) of all quantised experts; the path is the parameter's."""
    for path, module in model.named_modules():
        if isinstance(module, QuantisedExperts):
            for name, stack in module.stacks.items():
                yield f"{path}.{name}".removeprefix("."), module, name, stack


@contextlib.contextmanager
def as_declared(model: nn.Module) -> Iterator[None]:
    """Inside the context quantised experts have placeholders of their 16-bit shapes, from which PEFT makes its own."""
    codes = [(module, name, getattr(module, name)) for _, module, name, _ in stacks_of(model)]
    for _, module, name, stack in stacks_of(model):
        empty = placeholder(stack.stored_shape, torch.bfloat16, getattr(module, name).device)
        setattr(module, name, nn.Parameter(empty, requires_grad=False))
    try:
        yield
    finally:
        for module, name, parameter in codes:
            setattr(module, name, parameter)


def dequantise_experts(model: nn.Module) -> None:
    """Give quantised experts plain fp32 parameters, and their own class back."""
    for _, module, name, stack in stacks_of(model):
        setattr(module, name, nn.Parameter(stack.plain(getattr(module, name).data), requires_grad=False))
    for module in model.modules():
        if isinstance(module, QuantisedExperts):
            module.__class__ = type(module).__mro__[2]
            del module.stacks


def with_experts(quantizer_class: Any, form: Any, weights: str) -> Any:
    """`quantizer_class` of transformers, which quantises linear layers, for experts too: each parameter as soon as it
    has been read in bf16."""
    from transformers.core_model_loading import ConversionOps

    operation: Any = ConversionOps  # whose subclasses override attributes as transformers' own do

    def stack_of(model: Any, parameter: str) -> Stack | None:
        module, _, name = parameter.rpartition(".")
        return getattr(model.get_submodule(module), "stacks", {}).get(name)

    class Quantise(operation):
        def __init__(self, linear: Any) -> None:
            self.linear = linear

        def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, Any]:
            converted: dict[str, Any] = {}
            for name, value in input_dict.items():
                if (stack := stack_of(model, name)) is None:
                    converted |= self.linear.convert({name: value}, model=model, **kwargs)
                else:
                    codes = stack.quantise(value[0] if isinstance(value, list) else value)
                    converted[name] = nn.Parameter(codes, requires_grad=False)
            return converted

    class Quantizer(quantizer_class):
        def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
            is_expert = stack_of(model, param_name) is not None
            return is_expert or super().param_needs_quantization(model, param_name, **kwargs)

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            processed = super()._process_model_before_weight_loading(model, **kwargs)
            make_quantised(model, form, weights)
            return processed

        def get_quantize_ops(self) -> Any:
            return Quantise(super().get_quantize_ops())

    return Quantizer
