"""LoRA on the experts of a mixture: parameters of three dimensions, one matrix for each expert.

T tokens, S = T x experts per token, D model, I and O features in and out, E experts, R rank.

The adapter is PEFT's `target_parameters`, which wraps the module of the experts once for each adapted parameter: the
outermost wrapper belongs to the last one. Its A [E * R, I] and B [O, R * E] are those of PEFT's file. PEFT itself adds
B A to all experts in every forward; here a token passes the two small matrices of its own experts only.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")
_ALIGNMENT = 16  # bytes, of the rows that a grouped product reads


def experts_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every module whose matrices are parameters of transformers' expert layout."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "is_transposed", None), bool) and not getattr(
            module, "has_post_expert_norm", True
        ):
            yield name, module


def routers_of(model: nn.Module) -> list[tuple[str, Any]]:
    """(name, module) of every router of transformers: it returns logits [T, E], then weights and indices of the chosen
    experts."""
    return [(name, m) for name, m in model.named_modules() if type(m).__name__.lower().endswith("topkrouter")]


def expert_parameters(model: nn.Module) -> list[str]:
    """The full names of all experts' matrices."""
    return [
        f"{name}.{parameter}"
        for name, module in experts_of(model)
        for parameter in PARAMETERS
        if isinstance(getattr(module, parameter, None), nn.Parameter) and getattr(module, parameter).ndim == 3
    ]


def install_expert_lora(model: Any) -> None:
    """Give the outermost of PEFT's wrappers around each module of experts a forward that multiplies in groups."""
    inner = {id(module.base_layer) for module in model.modules() if _is_wrapper(module)}
    outermost: list[Any] = [m for m in model.modules() if _is_wrapper(m) and id(m) not in inner]
    for module in outermost:
        module.__class__ = type("GroupedExperts", (type(module),), {"forward": _forward})
        module.gathers_at_once = True  # it reads the weights of the wrappers inside without calling them


@dataclass(frozen=True)
class Groups:
    """Which rows belong to which expert: the expert of each row, in order, and where the rows of each end."""

    expert_S: torch.Tensor
    ends_E: torch.Tensor  # int32
    by_loop: bool  # instead of a grouped product


@dataclass(frozen=True)
class LowRank:
    """A [E, R, I] and B [E, O, R] of one parameter."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


def grouped_linear(x_SI: torch.Tensor, weight_EOI: torch.Tensor, ends_E: torch.Tensor, by_loop: bool) -> torch.Tensor:
    """[S, O]: rows `ends[e - 1]` to `ends[e]` of x times the transposed matrix of expert e.

    The loop is the specification; it reads `ends` on the host. `torch._grouped_mm` does not.
    """
    if not by_loop:
        return torch._grouped_mm(x_SI, weight_EOI.transpose(-2, -1), offs=ends_E)
    borders = [0, *ends_E.tolist()]
    products = [
        F.linear(x_SI[start:stop], weight_OI)
        for (start, stop), weight_OI in zip(itertools.pairwise(borders), weight_EOI, strict=True)
    ]
    return torch.cat(products)


def adapted_experts(
    experts: Any,
    low_rank: dict[str, LowRank],
    hidden_TD: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    by_loop: bool,
) -> torch.Tensor:
    """The output [T, D] of `experts` with `low_rank` by parameter; indices and weights are [T, experts per token]."""
    num_tokens, per_token = top_k_index.shape
    frozen = getattr(experts, "frozen_product", lambda *_: None)
    expert_S, order_S = top_k_index.reshape(-1).sort(stable=True)
    ends_E = torch.searchsorted(
        expert_S, torch.arange(experts.num_experts, device=expert_S.device), right=True, out_int32=True
    )

    def product(x_SI: torch.Tensor, name: str) -> torch.Tensor:
        y_SO = frozen(x_SI, name, Groups(expert_S, ends_E, by_loop))
        if y_SO is None:
            weight = getattr(experts, name)
            weight_EOI = (weight.transpose(-2, -1) if experts.is_transposed else weight).to(x_SI.dtype)
            y_SO = grouped_linear(x_SI, weight_EOI, ends_E, by_loop)
        if (pair := low_rank.get(name)) is not None:
            low_SR = grouped_linear(x_SI, pair.a.to(x_SI.dtype), ends_E, by_loop)
            y_SO = y_SO + pair.scale * grouped_linear(low_SR, pair.b.to(x_SI.dtype), ends_E, by_loop)
        return y_SO + getattr(experts, f"{name}_bias")[expert_S] if experts.has_bias else y_SO

    x_SD = hidden_TD[order_S // per_token]
    if experts.has_gate:
        inner_SF = experts._apply_gate(product(x_SD, "gate_up_proj"))
    else:
        inner_SF = experts.act_fn(product(x_SD, "up_proj"))
    out_SD = product(inner_SF, "down_proj") * top_k_weights.reshape(-1)[order_S, None]
    back_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(len(order_S), device=order_S.device))
    return out_SD[back_S].view(num_tokens, per_token, -1).sum(1).to(hidden_TD.dtype)


def _forward(
    wrapper: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    low_rank: dict[str, LowRank] = {}
    layer = wrapper
    while _is_wrapper(layer):
        low_rank[layer.parameter_name] = _low_rank(layer, hidden_states.is_cuda)
        layer = layer.base_layer
    by_loop = not can_group(layer, hidden_states)
    return adapted_experts(layer, low_rank, hidden_states, top_k_index, top_k_weights, by_loop)


def _low_rank(wrapper: Any, padded: bool) -> LowRank:
    """The two halves as PEFT's file stores them: B has the expert as its fastest dimension."""
    name = wrapper.active_adapters[0]
    a_RI, b_OR = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
    a = a_RI.view(wrapper.num_experts, -1, a_RI.shape[1])
    b = b_OR.view(b_OR.shape[0], -1, wrapper.num_experts).permute(2, 0, 1).contiguous()
    if padded and (missing := -a.shape[1] % (_ALIGNMENT // 2)):  # zero rows, for a grouped product of bf16
        a, b = F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))
    return LowRank(a, b, wrapper.scaling[name])


def can_group(experts: Any, x: torch.Tensor) -> bool:
    """Whether `torch._grouped_mm` multiplies these matrices on this device."""
    if not x.is_cuda or x.dtype != torch.bfloat16 or torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    sizes = {size for name in PARAMETERS if hasattr(experts, name) for size in matrix_shape(experts, name)[1:]}
    return all(size * x.element_size() % _ALIGNMENT == 0 for size in sizes)


def matrix_shape(experts: Any, name: str) -> tuple[int, ...]:
    """The three dimensions of a parameter of experts, quantised or not."""
    stack = getattr(experts, "stacks", {}).get(name)
    return tuple(getattr(experts, name).shape) if stack is None else stack.shape


def _is_wrapper(module: Any) -> bool:
    """Whether `module` is PEFT's LoRA around a parameter."""
    return hasattr(module, "parameter_name") and hasattr(module, "lora_A")
