"""What a decoder layer keeps from forward to backward: everything, what is expensive to recompute, or its input alone.

selective   gate and up are computed again, within the MLP's function where it is fused; outputs of norms are rebuilt
            from their inputs. What attention needs stays.
full        the layer keeps its input, and its forward runs again in backward, up to the last thing that it saves.
offload     the same, and the input waits in host memory.

Under each of them an MLP of more than TILE_TOKENS tokens computes in tiles (`tiled_mlp`). Up to that length loss and
gradients are bitwise those of `none`, beyond it up to the order of sums. Only `forward` of layers, MLPs and norms is
replaced: parameter names do not change, and the hooks of a sharding engine run around the recomputation. Dropout draws
the same mask again.

A recomputation needs what forward saved, not its result. torch ends it at the last saved tensor, but a map under an
adapter, or a fused MLP, saves after its product: the product of the layer's last map is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from dist_cpt.engines.host_copies import HostCopies
from dist_cpt.engines.tiled_mlp import TiledMlp, can_be_tiled
from dist_cpt.errors import ConfigError
from dist_cpt.model.fused_modules import FusedMlp, FusedNorm
from dist_cpt.model.recurrence import ByDocument
from dist_cpt.plan.recomputation import TILE_TOKENS, Policy

SAVE_NOTHING = ("AddBackward", "CloneBackward", "ToCopyBackward")  # nodes of autograd, with a number after the name


def checkpoint_layers(layers: Sequence[nn.Module], policy: Policy, device: torch.device, tokens: int = 0) -> None:
    """Apply engine.activation_checkpointing to the decoder layers; `tokens` are those of one forward on this rank.

    Raises:
        ConfigError: selective, and a layer has no MLP of its own that could be recomputed.
    """
    if policy == "none":
        return
    host = HostCopies(device) if policy == "offload" else None
    for number, layer in enumerate(layers):
        mlp = mlp_of(layer)
        tiled = mlp is not None and tokens > TILE_TOKENS and can_be_tiled(mlp)
        if tiled:
            TiledMlp(mlp, TILE_TOKENS)
        if policy != "selective":
            Recomputed(layer, mlp, host)
        elif mlp is None:
            raise ConfigError(
                f"engine.activation_checkpointing: selective recomputes MLPs, and layer {number}, a "
                f"{type(layer).__name__}, has none that is a module",
                remedy="use full",
            )
        else:
            if not tiled:
                _recompute_mlp(mlp)
            RebuiltNorms(layer)


def mlp_of(layer: nn.Module) -> nn.Module | None:
    """The layer's MLP or block of experts: its one child beside attention and recurrence with children of its own."""
    inner = [
        child
        for name, child in layer.named_children()
        if not _mixes_tokens(name, child) and any(parameter.ndim > 1 for parameter in child.parameters())
    ]
    return inner[0] if len(inner) == 1 and list(inner[0].children()) else None


def _mixes_tokens(name: str, child: nn.Module) -> bool:
    """Nemotron-H calls its attention, recurrence and MLPs `mixer`; attention of transformers has `is_causal`."""
    return "att" in name or isinstance(child, ByDocument) or hasattr(child, "is_causal")


def _recompute_mlp(mlp: nn.Module) -> None:
    if isinstance(mlp, FusedMlp) and mlp.is_one_function:
        mlp.recomputes = True
    else:
        Recomputed(mlp, mlp)


class Recomputed:
    """The forward of a layer, or of its MLP alone, which backward runs again."""

    def __init__(self, module: nn.Module, mlp: nn.Module | None, host: HostCopies | None = None) -> None:
        self._module, self._forward, self._host = module, module.forward, host
        self._last = LastProduct(module, mlp)
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (self._module.training and torch.is_grad_enabled()):
            return self._forward(*args, **kwargs)
        if self._host is None:
            out = self._checkpoint(self._forward, *args, **kwargs)
        else:
            out = self._offload(*args, **kwargs)
        self._last.compare(out)
        return out

    def _checkpoint(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), self._last), **kwargs)

    def _offload(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        assert self._host is not None
        copy = self._host.of(hidden)
        given = [hidden]  # emptied by the first call: nothing else here keeps the input
        del hidden

        def forward() -> Any:
            return self._forward(given.pop() if given else copy.on_device(), *args, **kwargs)

        return self._checkpoint(forward)


class LastProduct:
    """The product that ends an MLP. As a context manager it skips that product, if it is only added to something."""

    def __init__(self, region: nn.Module, mlp: nn.Module | None) -> None:
        self._module = None if mlp is None else _ends_in(mlp)
        self._product: torch.Tensor | None = None
        self._unread = False
        if self._module is not None and self._module is not region:
            self._module.register_forward_hook(self._note)

    def _note(self, _: nn.Module, args: Any, output: torch.Tensor) -> None:
        self._product = output if torch.is_grad_enabled() else None

    def compare(self, out: Any) -> None:
        """Learn from the result of a first forward whether something saves the product."""
        out = out[0] if isinstance(out, tuple) else out
        product, self._product = out if self._product is None else self._product, None
        self._unread = self._module is not None and _is_summand(product.grad_fn, out.grad_fn)

    def __enter__(self) -> None:
        if self._module is not None:
            self._module.output_unread = self._unread

    def __exit__(self, *_: object) -> None:
        self._product = None
        if self._module is not None:
            self._module.output_unread = False


def _ends_in(mlp: Any) -> Any:
    """The module that computes the last product and can skip it: a fused or tiled MLP, or the base under an adapter."""
    if isinstance(mlp.forward, TiledMlp) or (isinstance(mlp, FusedMlp) and "mlp" in mlp.fused_projections):
        return mlp
    if not any(kind.__module__.startswith("transformers.models.") for kind in type(mlp).__mro__):
        return None
    adapted = [child for child in mlp.children() if hasattr(child, "base_layer")]
    if not adapted or getattr(adapted[-1], "lora_variant", True):  # a variant such as DoRA reads the product
        return None
    base: Any = adapted[-1].base_layer
    if any(parameter.requires_grad for parameter in base.parameters()):
        return None
    base.output_unread = False
    base.forward = _without_rows(base, base.forward)
    return base


def _is_summand(node: Any, result: Any, within: int = 4) -> bool:
    """Whether `result` is `node`, or made from it in up to `within` steps that save no operand."""
    if node is None or result is None or node is result:
        return node is not None and node is result
    if not within or not result.name().startswith(SAVE_NOTHING):
        return False
    return any(_is_summand(node, before, within - 1) for before, _ in result.next_functions)


def _without_rows(base: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
    def switched(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not base.output_unread:
            return forward(x, *args, **kwargs)
        saves = forward(x[:0], *args, **kwargs)  # what it saves, the weight, without the product
        return saves.new_empty((*x.shape[:-1], saves.shape[-1]))

    return switched


class RebuiltNorms:
    """Saves the outputs of a layer's norms as their inputs, which are saved anyway, and recomputes them in backward."""

    def __init__(self, layer: nn.Module) -> None:
        self._outputs: list[_NormOutput] = []
        for norm in layer.children():
            if "norm" in type(norm).__name__.lower() and not any(True for _ in norm.children()):
                self._watch(norm)
        self._layer, self._forward = layer, layer.forward
        layer.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (self._layer.training and torch.is_grad_enabled()):
            return self._forward(*args, **kwargs)
        try:
            with saved_tensors_hooks(self._pack, _unpack):
                return self._forward(*args, **kwargs)
        finally:
            self._outputs.clear()

    def _watch(self, norm: nn.Module) -> None:
        forward = norm.forward

        def watched(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if not (norm.training and torch.is_grad_enabled()):
                return forward(x, *args, **kwargs)
            if isinstance(norm, (FusedNorm, nn.LayerNorm)):
                out = forward(x, *args, **kwargs)
            else:  # in eager operations it saves several tensors of its input's size, in fp32
                out = checkpoint(forward, x, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
            # with a residual: (the norm of the sum, the sum)
            normed, source = out if isinstance(out, tuple) else (out, x)
            source = source.detach()
            # Called as a module, so that ZeRO-3's hooks gather its weight.
            self._outputs.append(_NormOutput(normed, normed._version, lambda: norm(source)))
            return out

        norm.forward = watched

    def _pack(self, tensor: torch.Tensor) -> Any:
        for output in self._outputs:
            if output.is_all_of(tensor):
                return _Saved(output.rebuilt(), tensor.shape)
        # A saved output of the node itself must not keep that node alive.
        return tensor if tensor.is_leaf else tensor.detach()


@dataclass
class _NormOutput:
    """One output of a norm, kept while its layer runs so that its memory stays its own."""

    tensor: torch.Tensor
    version: int
    compute: Callable[[], torch.Tensor]
    rebuild: _Rebuild | None = None

    def is_all_of(self, other: torch.Tensor) -> bool:
        mine = self.tensor
        same = mine.untyped_storage()._cdata == other.untyped_storage()._cdata and mine.dtype == other.dtype
        return same and mine.numel() == other.numel() and other.is_contiguous() and other._version == self.version

    def rebuilt(self) -> _Rebuild:
        self.rebuild = self.rebuild or _Rebuild(self.compute)
        self.rebuild.readers += 1
        return self.rebuild


class _Rebuild:
    """Computes once for all readers of a backward pass."""

    def __init__(self, compute: Callable[[], torch.Tensor]) -> None:
        self._compute = compute
        self._value: torch.Tensor | None = None
        self._reads = 0
        self.readers = 0

    def read(self) -> torch.Tensor:
        if self._value is None:
            with torch.no_grad():
                self._value = self._compute()
        value, self._reads = self._value, self._reads + 1
        if self._reads % self.readers == 0:
            self._value = None
        return value


@dataclass(frozen=True)
class _Saved:
    rebuild: _Rebuild
    shape: torch.Size


def _unpack(saved: Any) -> torch.Tensor:
    return saved.rebuild.read().view(saved.shape) if isinstance(saved, _Saved) else saved
