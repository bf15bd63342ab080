"""An MLP that computes a long block tile by tile, forward and backward: its [tokens, F] tensors never exist whole.

It saves its input alone. Backward repeats the forward of a tile and goes back through it before the next one, so a step
computes what it would under `engine.activation_checkpointing: full`. Gradients of weights are summed in fp32 over the
tiles, and handed to autograd once: an engine reduces them once, and gathers the weights once for all tiles.

Source: Bekman et al. 2025, Arctic Long Sequence Training (arXiv 2506.13996), section 3.3, for the idea.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable


class TiledMlp:
    """The forward of an MLP in tiles of `tile_tokens` tokens; a shorter input is one tile."""

    def __init__(self, mlp: Any, tile_tokens: int) -> None:
        self._module, self._forward, self._tile = mlp, mlp.forward, tile_tokens
        mlp.forward = self
        mlp.output_unread = False  # while a checkpoint repeats the forward pass for what it saves
        mlp.gathers_at_once = True  # ZeRO-3: for all tiles

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [..., D] -> [..., D]."""
        trained = self.trained()
        if not (torch.is_grad_enabled() and (x.requires_grad or trained)):
            return self.whole(x)
        return _Tiled.apply(self, x, self._module.output_unread, *trained)

    def trained(self) -> list[nn.Parameter]:
        """The parameters with a gradient, as the engine has them at this moment."""
        return [parameter for parameter in self._module.parameters() if parameter.requires_grad]

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """The output, of which only a tile's inner tensors exist at a time."""
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        rows = [tensor.view(-1, x.shape[-1]).split(self._tile) for tensor in (x.contiguous(), out)]
        for tile, into in zip(*rows, strict=True):
            into.copy_(self._forward(tile[None])[0])
        return out

    def gradients(self, x: torch.Tensor, grad: torch.Tensor, needs_x: bool) -> list[torch.Tensor | None]:
        """Of `x` and of each trained parameter, or None where none is needed; `grad` is that of the output."""
        trained = self.trained()
        dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_x else None
        sums: list[torch.Tensor | None] = [None] * len(trained)
        rows = [tensor.reshape(-1, tensor.shape[-1]).split(self._tile) for tensor in (x, grad)]
        into = [None] * len(rows[0]) if dx is None else dx.view(-1, dx.shape[-1]).split(self._tile)
        for tile, grad_tile, dx_tile in zip(*rows, into, strict=True):
            tile = tile.detach()[None].requires_grad_(needs_x)
            with torch.enable_grad(), self._last_product_unread():
                out = self._forward(tile)
            wanted = [*([tile] if needs_x else []), *trained]
            found = list(torch.autograd.grad(out, wanted, grad_tile[None], allow_unused=True))
            del out
            if dx_tile is not None:
                dx_tile.copy_(found.pop(0)[0])
            for number, one in enumerate(found):
                if one is not None:
                    total = sums[number]
                    sums[number] = one.to(torch.float32, copy=True) if total is None else total.add_(one)
        return [dx, *(None if s is None else s.to(p.dtype) for s, p in zip(sums, trained, strict=True))]

    @contextmanager
    def _last_product_unread(self) -> Iterator[None]:
        self._module.output_unread = True  # a fused MLP then leaves it out
        try:
            yield
        finally:
            self._module.output_unread = False


def can_be_tiled(mlp: nn.Module) -> bool:
    """Whether every token passes it by itself: its children are maps with one weight, or have no matrices."""
    bases = [getattr(child, "base_layer", child) for child in mlp.children()]
    with_matrices = [base for base in bases if any(parameter.ndim > 1 for parameter in base.parameters())]
    maps = all(isinstance(getattr(base, "weight", None), torch.Tensor) for base in with_matrices)
    own = any(True for _ in mlp.parameters(recurse=False))
    return maps and not own and len(inspect.signature(mlp.forward).parameters) == 1


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mlp: TiledMlp, x: torch.Tensor, unread: bool, *trained: torch.Tensor) -> torch.Tensor:
        ctx.mlp, ctx.random = mlp, _RandomState(x.device)
        ctx.save_for_backward(x)
        return torch.empty_like(x) if unread else mlp.whole(x.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        with ctx.random.again():
            dx, *gradients = ctx.mlp.gradients(x, grad_outputs[0], ctx.needs_input_grad[1])
        return None, dx, None, *gradients


class _RandomState:
    """Torch's random numbers at this moment, to draw the same dropout again."""

    def __init__(self, device: torch.device) -> None:
        self._devices = [device] if device.type == "cuda" else []
        self._cpu = torch.get_rng_state()
        self._of_devices = [torch.cuda.get_rng_state(one) for one in self._devices]

    @contextmanager
    def again(self) -> Iterator[None]:
        with torch.random.fork_rng(self._devices):
            torch.set_rng_state(self._cpu)
            for device, state in zip(self._devices, self._of_devices, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield
