"""What runs on every rank: the bytes that an engine holds, for comparison with what a plan predicts."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dist_cpt.engines.engine import InspectableEngine
from dist_cpt.engines.slices import storage_bytes
from tests.contract.cases import accumulate, running
from tests.contract.model import batches, num_tokens
from tests.contract.reference import learning_rates


def measured(base: str, engine: dict[str, Any], variant: str, weights: str) -> dict[str, int]:
    """Bytes between steps by part, and of the gradients after a step's micro-batches; the latter not under ZeRO."""
    with running(base, engine, variant, weights) as (built, groups):
        found = built.sharded_bytes()
        accumulate(built, step=1)
        if engine["kind"] != "zero":
            found["gradients"] = gradient_bytes(built)
        built.step(learning_rates(groups, 1))
    return found


def gradient_bytes(engine: InspectableEngine) -> int:
    """Of the storages that single or fsdp keeps from one micro-batch to the next."""
    kept: Any = getattr(engine, "_grads", None)
    if kept is None:
        parameters: dict[str, nn.Parameter] = getattr(engine, "_parameters")  # noqa: B009 - only checks read it
        kept = {name: p.grad.to_local() for name, p in parameters.items() if p.grad is not None}  # type: ignore[attr-defined]
    return storage_bytes(gradients=kept.values())["gradients"]


def moved(base: str, engine: dict[str, Any], variant: str, weights: str) -> dict[str, int]:
    """Bytes of whole tensors that FSDP gathers and reduces in a step, and of gradients before its last micro-batch."""
    found = {"gathered": 0, "reduced": 0}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            for name, what, whole in (("_allgather_base_", "gathered", 0), ("_reduce_scatter_base_", "reduced", 1)):
                if function.overloadpacket.__name__ == name:
                    found[what] += args[whole].nbytes
            return function(*args, **(kwargs or {}))

    with running(base, engine, variant, weights) as (built, _), Count():
        *before, last = batches(1, dist.get_rank(), dist.get_world_size())
        for batch in before:
            built.accumulate(batch, num_tokens(1), False)
        kept = gradient_bytes(built) + whole_gradient_bytes(built)
        built.accumulate(last, num_tokens(1), True)
    return found | {"gradients": kept}


def whole_gradient_bytes(engine: InspectableEngine) -> int:
    """Of the gradients that FSDP keeps whole, since they are not reduced yet."""
    units: Any = getattr(engine, "_units")  # noqa: B009 - only checks read it
    groups = [group for unit in units if (group := unit._get_fsdp_state()._fsdp_param_group) is not None]
    kept = [parameter.unsharded_accumulated_grad for group in groups for parameter in group.fsdp_params]
    return storage_bytes(gradients=(grad for grad in kept if grad is not None))["gradients"]
