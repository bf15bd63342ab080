"""FSDP2: `fully_shard` over all tensors, over a node's ranks, or over the trainable tensors only.

full        every tensor is sharded over all ranks, along its first dimension.
hybrid      sharded over `dp_shard` ranks, replicated over the others (mesh dp_replicate x dp_shard).
trainable   the trainable tensors are sharded over all ranks, the frozen base is whole on each.

The decoder layers are units; so are embeddings and head where they are apart, each gathered once per micro-batch and
reduced while the layers beside it compute. What is left, the last norm and tied matrices, is the root unit, gathered
throughout, so that a tied output matrix is whole wherever the loss needs it.

Accumulation: every micro-batch is reduced into fp32 shards, or with `engine.reduce: step` their sum with the last one,
which keeps a full fp32 gradient on each rank: 4 bytes per trainable element, 32 GB for 8B parameters. Under hybrid the
all-reduce between shard groups always waits for the last micro-batch: it works on shards and costs no memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from dist_cpt.adapters.placeholders import is_placeholder
from dist_cpt.config.schema import EngineConfig, RunConfig
from dist_cpt.data.batch import Batch
from dist_cpt.engines.engine import LateStats
from dist_cpt.engines.fill import Receive, Rows, fill, send_rows
from dist_cpt.engines.forward import Forward
from dist_cpt.engines.gradients import StepLoss, judge, probe
from dist_cpt.engines.slices import SlicedState, frozen_tensors, storage_bytes
from dist_cpt.errors import ConfigError
from dist_cpt.model.base_weights import UnreadBase
from dist_cpt.model.loss import CausalLMForLoss
from dist_cpt.optim.groups import ParamGroup, eight_bit_names
from dist_cpt.optim.optimizer import AdamW, Part
from dist_cpt.runtime.collectives import gather_json
from dist_cpt.runtime.env import process_env
from dist_cpt.training_state import ReadingOrder, ReadState


class Fsdp2Engine:
    """fp32 shards are the masters; the gathered copies compute in the dtype of the recipe."""

    def __init__(
        self,
        module: CausalLMForLoss,
        trainable: Mapping[str, nn.Parameter],
        groups: Sequence[ParamGroup],
        layers: Sequence[nn.Module],
        config: RunConfig,
        device: torch.device,
        unread: UnreadBase | None = None,
    ) -> None:
        engine = config.engine
        self.kind = f"fsdp-{engine.shard}"
        self._device = device
        self._groups = list(groups)
        self._max_norm = config.optim.max_grad_norm
        self._hybrid = engine.shard == "hybrid"
        self._once_per_step = engine.reduce == "step"
        mesh = _mesh(engine, device)
        self._replicas = mesh.size(0) if self._hybrid else 1
        path_of = {id(parameter): path for path, parameter in module.named_parameters()}
        paths = {name: path_of[id(trainable[name])] for group in groups for name in group.names}
        if unread is not None:
            _put_on_meta(module)
        self._units = _shard(module, layers, mesh, config, device)
        self._module = module.train()
        if unread is not None or engine.offload != "none":
            _place(module, self._units, engine, device)
        if unread is not None:
            fill(unread, module, _receiver(unread, module, mesh, device))
        # Sharding replaces the parameters, so they are looked up again by path.
        self._parameters = {name: module.get_parameter(path) for name, path in paths.items()}
        shards = {name: _local(parameter) for name, parameter in self._parameters.items()}
        self._adam = AdamW(shards, config.optim, eight_bit_names(groups, config.optim), config.model.kernels)
        self._state = SlicedState(
            {name: parameter.shape for name, parameter in self._parameters.items()},
            {name: _range(parameter, mesh) for name, parameter in self._parameters.items()},
            self._adam.read,
            self._adam.write,
            device,
            primary=not self._hybrid or mesh.get_local_rank(0) == 0,
        )
        self.export_state = self._state.export
        self.snapshot = self._state.snapshot
        self._loss = StepLoss(module.routing)
        self._forward = Forward(self._module, device, after_inference=self._reshard)
        self.evaluate = self._forward.evaluate
        self.logits = self._forward.logits

    def accumulate(self, batch: Batch, num_tokens: int, last: bool) -> None:
        root = self._units[0]  # sets all units
        if self._once_per_step:
            root.set_requires_gradient_sync(last)
        elif self._hybrid:
            root.set_requires_all_reduce(last)
        loss, loss_sum = self._forward.loss(batch, 1.0 / num_tokens)
        loss.backward()
        self._loss.add(loss_sum, num_tokens)

    def step(self, lrs: Mapping[str, float], spike_limit: float = math.inf) -> LateStats:
        grads = {name: self._grad(name) for name in self._parameters}
        present = [grad for grad in grads.values() if grad is not None]
        limits = {"max_norm": self._max_norm, "spike_limit": spike_limit}
        means, norm, judged = judge(self._loss, present, **limits, replicas=self._replicas)
        masters, clip = self._adam.masters, judged.to(self._adam.steps.device)
        parts = [
            Part(
                group.names,
                [torch.zeros_like(masters[name]) if (grad := grads[name]) is None else grad for name in group.names],
                lrs[group.name],
                group.weight_decay,
            )
            for group in self._groups
        ]
        self._adam.update(parts, clip)
        self._adam.steps += 1 - clip.skip
        self._drop_gradients()
        return LateStats(means, norm, judged.skip)

    def import_state(self, read: ReadState, step: int, order: ReadingOrder | None = None) -> None:
        self._state.import_(read, order)
        self._adam.steps.fill_(step)

    def gradient_probe(self) -> dict[str, tuple[float, float]]:
        return probe({name: self._grad(name) for name in self._parameters}, self._device, self._replicas)

    def frozen_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        return frozen_tensors(self._module, self._parameters.values(), _local)

    def sharded_bytes(self) -> dict[str, int]:
        # The compute copies exist from gather to reshard only; the shards are the masters, counted as trainable.
        return storage_bytes(
            trainable=self._adam.masters.values(),
            frozen=(tensor for _, tensor in self.frozen_tensors()),
            optimizer=self._adam.moments(),
        )

    def close(self) -> None:
        self._drop_gradients()

    def _drop_gradients(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None

    def _reshard(self) -> None:
        """A forward without a backward leaves units gathered: the next one would use them even after an import."""
        for unit in self._units:
            unit.reshard()

    def _grad(self, name: str) -> torch.Tensor | None:
        grad = self._parameters[name].grad
        return None if grad is None else _local(grad)


def _mesh(engine: EngineConfig, device: torch.device) -> DeviceMesh:
    """1-D over all ranks, or dp_replicate x dp_shard.

    Raises:
        ConfigError: dp_shard does not divide the ranks.
    """
    ranks = dist.get_world_size()
    if engine.shard != "hybrid":
        return init_device_mesh(device.type, (ranks,), mesh_dim_names=("dp_shard",))
    shard = engine.dp_shard or process_env().local_world_size
    if ranks % shard:
        raise ConfigError(
            f"engine.dp_shard {shard} does not divide {ranks} ranks",
            remedy="set engine.dp_shard to a divisor of the number of ranks, usually the ranks of one node",
        )
    return init_device_mesh(device.type, (ranks // shard, shard), mesh_dim_names=("dp_replicate", "dp_shard"))


def _shard(
    module: nn.Module, layers: Sequence[nn.Module], mesh: DeviceMesh, config: RunConfig, device: torch.device
) -> list[FSDPModule]:
    """Apply fully_shard to each layer and the root; the units, root first."""
    engine = config.engine
    compute = torch.bfloat16 if config.model.compute_dtype == "bf16" else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    ignored = {p for p in module.parameters() if not p.requires_grad} if engine.shard == "trainable" else None
    for parameter in ignored or ():
        parameter.data = parameter.data.to(device)
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "ignored_params": ignored}
    for layer in layers:
        fully_shard(layer, reshard_after_forward=engine.reshard_after_forward, **options)
    # Backward begins with the head and the root, and the embeddings' needs no weights: freeing them after the forward
    # would only gather them twice.
    for part in [*_vocabulary(module), module]:
        fully_shard(part, reshard_after_forward=False, **options)
    units: list[FSDPModule] = [unit for unit in module.modules() if isinstance(unit, FSDPModule)]
    for unit in units:
        # A plain sum: the loss is already divided by the tokens of the whole step. gloo refuses the factor without
        # the second line; with the second line alone torch still divides by the ranks.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    return units


def _put_on_meta(module: nn.Module) -> None:
    """Replace placeholders, which fully_shard refuses for their strides."""
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied ones stay tied
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
            if is_placeholder(parameter):
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                made.setdefault(parameter, nn.Parameter(empty, requires_grad=parameter.requires_grad))
                setattr(part, name, made[parameter])


def _place(module: nn.Module, units: Sequence[FSDPModule], engine: EngineConfig, device: torch.device) -> None:
    """Give shards on the meta device memory, and move those that `engine.offload` names to the host.

    torch's CPUOffloadPolicy is for all parameters of a unit; a layer has frozen and trainable ones. Each has its own
    copy of the policy's two attributes.
    """
    on_host = {part == "optimizer": engine.offloads(part) for part in ("base", "optimizer")}  # by requires_grad
    for unit in units:
        for group in unit._get_fsdp_state()._fsdp_param_groups:
            for parameter in group.fsdp_params:
                shard: Any = parameter.sharded_param
                parameter.offload_to_cpu = on_host[shard.requires_grad]
                parameter.pin_memory = parameter.offload_to_cpu and device.type == "cuda"
                if parameter.offload_to_cpu and not shard.is_meta:
                    shard._local_tensor = shard._local_tensor.cpu()

    def with_memory(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_meta:
            return tensor
        return torch.empty_like(tensor, device="cpu" if on_host[tensor.requires_grad] else device)

    module._apply(with_memory)  # and each unit pins what is on the host


def _receiver(unread: UnreadBase, module: nn.Module, mesh: DeviceMesh, device: torch.device) -> Receive:
    """Fills this rank's shard of a parameter."""
    shard_of_rank = gather_json(mesh.get_local_rank(mesh.ndim - 1))

    def receive(path: str, owner: int, value: torch.Tensor | None) -> None:
        parameter = module.get_parameter(path)
        rows = Rows(parameter.shape, unread.sources[path].dtype, device, shard_of_rank)
        send_rows(_local(parameter), rows, owner, value)

    return receive


def _vocabulary(module: Any) -> list[nn.Module]:
    """The embeddings and the head, if they share no matrix with one another."""
    parts: list[nn.Module] = [module.hf_model.get_input_embeddings(), module.head]
    embedded, read = ({id(parameter) for parameter in part.parameters()} for part in parts)
    return [] if embedded & read else parts


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard, sharing memory with the DTensor; a plain tensor itself."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def _range(parameter: torch.Tensor, mesh: DeviceMesh) -> tuple[int, int]:
    """Elements of the flattened tensor in this rank's shard: ceil(rows / ranks) rows, fewer on the last ranks."""
    row = parameter.numel() // parameter.shape[0]
    ranks, index = mesh.size(-1), mesh.get_local_rank(mesh.ndim - 1)
    rows = -(-parameter.shape[0] // ranks)
    start = min(index * rows, parameter.shape[0])
    stop = min(start + rows, parameter.shape[0])
    local = _local(parameter)
    assert local.numel() == (stop - start) * row, "a shard is not a range of whole rows"
    return start * row, stop * row
