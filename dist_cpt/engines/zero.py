"""ZeRO stages 1, 2 and 3 through deepspeed; the only file that imports it.

The private names below are those of deepspeed 0.19.8, which is checked. What makes them necessary:

- It takes its fp32 masters from the bf16 module, which rounds: they are loaded again from the fp32 values.
- Moments appear only after a first step, and with several groups its bookkeeping then breaks. Here they exist from the
  start, as zeros, and the state is read and written through the flat buffers that AdamW uses, not through views.
- Nothing refreshes the compute copies after a master was written; stage 3 also keeps small parameters gathered, which
  must be gathered again.
- Stage 1 in bf16 with fp32 accumulation is another class (BF16_Optimizer) with other names.
- It divides gradients by the ranks, and by the micro-batches if it may: the loss is multiplied by the ranks and passed
  as a new tensor, with that scaling off.
- Stages 1 and 2 sum micro-batches in bf16 as soon as the optimizer is in host memory, so only stage 3 offloads here.
- Every class takes one gradient norm over all ranks and reads it on the host: if it is not finite, all skip before the
  optimizer. A step whose loss is bad gets a NaN into its gradient, on the device.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dist_cpt.adapters.quantize import quantisation_state
from dist_cpt.config.schema import RunConfig
from dist_cpt.data.batch import Batch
from dist_cpt.engines.engine import LateStats
from dist_cpt.engines.fill import fill, send_whole
from dist_cpt.engines.forward import Forward
from dist_cpt.engines.gradients import StepLoss, is_bad
from dist_cpt.engines.slices import SlicedState, frozen_tensors, storage_bytes
from dist_cpt.errors import ConfigError, MissingExtraError
from dist_cpt.model.base_weights import UnreadBase
from dist_cpt.model.loss import CausalLMForLoss
from dist_cpt.optim.groups import ParamGroup, eight_bit_names
from dist_cpt.optim.optimizer import AdamW, FlatAdamW
from dist_cpt.training_state import ReadingOrder, ReadState, StateKind

TESTED_VERSION = "0.19.8"
_TORCH_LINEAR = nn.functional.linear  # stage 3 replaces it in the whole process, for good
BUCKET_ELEMENTS = 200_000_000  # of one reduction, in fp32 0.8 GB on the device


class ZeroEngine:
    """deepspeed's engine with torch's AdamW on its flat fp32 partitions."""

    def __init__(
        self,
        module: CausalLMForLoss,
        trainable: Mapping[str, nn.Parameter],
        groups: Sequence[ParamGroup],
        config: RunConfig,
        device: torch.device,
        unread: UnreadBase | None = None,
    ) -> None:
        deepspeed = _import_deepspeed(device)
        stage = config.engine.stage
        self.kind = f"zero-{stage}"
        self._parameters = {name: trainable[name] for group in groups for name in group.names}
        self._lr_order = [group.name for group in groups]
        # deepspeed puts new bf16 tensors into the parameters; this dictionary keeps the fp32 values.
        initial = {name: parameter.data for name, parameter in self._parameters.items()}
        self._module = module.train()
        if stage == 3:
            for part in module.modules():  # modules that read their children's weights themselves
                if getattr(part, "gathers_at_once", False):
                    deepspeed.utils.set_z3_leaf_module(part, True)
                    part.register_forward_pre_hook(_input_with_gradient, with_kwargs=True)
        eight_bit = eight_bit_names(groups, config.optim)
        parts = {} if unread is None else self._read_base(deepspeed, unread, config, device)
        self._engine = _initialize(deepspeed, module, _optimizer(self._parameters, groups, config), config)
        self._zero = self._engine.optimizer
        self._adam = self._zero.optimizer
        self._layout = _Stage3(self._zero) if stage == 3 else _Stage12(self._zero)
        self._ranges = {name: self._layout.range(parameter) for name, parameter in self._parameters.items()}
        masters = {n: self._flat_slice("master", n) for n, (start, stop) in self._ranges.items() if start < stop}
        # With 8-bit moments they are kept by name, and the flat buffers have no state of their own.
        self._named = AdamW(masters, config.optim, eight_bit, config.model.kernels) if eight_bit else None
        self._create_moments(masters)
        self._state = SlicedState(
            {name: getattr(p, "ds_shape", p.shape) for name, p in self._parameters.items()},
            self._ranges,
            self._read,
            self._write,
            device,
        )
        if config.model.compute_dtype == "bf16":  # in fp32 the masters were copied without rounding
            for name, master in masters.items():
                start, stop = self._ranges[name]
                master.copy_(parts.pop(name) if name in parts else initial[name].reshape(-1)[start:stop])
            self._layout.refresh()
        self.export_state = self._state.export
        self.snapshot = self._state.snapshot
        self._loss = StepLoss(module.routing)
        self._forward = Forward(self._engine, device)
        self.evaluate = self._forward.evaluate
        self.logits = self._forward.logits

    def _read_base(
        self, deepspeed: Any, unread: UnreadBase, config: RunConfig, device: torch.device
    ) -> dict[str, torch.Tensor]:
        """Partition each parameter of the base as soon as it is read; this rank's fp32 values of those that train.

        deepspeed then takes the module for one that was built under `zero.Init`, and casts and moves nothing.
        """
        compute = torch.bfloat16 if config.model.compute_dtype == "bf16" else torch.float32
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        parts: dict[str, torch.Tensor] = {}
        # Of an empty module: it makes deepspeed's settings, patches included, and converts nothing.
        init = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=_settings(config), dtype=compute)

        def receive(path: str, owner: int, value: torch.Tensor | None) -> None:
            parameter: Any = self._module.get_parameter(path)
            whole = torch.empty(parameter.shape, dtype=unread.sources[path].dtype, device=device)
            send_whole(whole, owner, value)
            name = names.get(id(parameter))
            parameter.data = whole if name is None else whole.to(compute)
            init._convert_to_deepspeed_param(parameter)
            parameter.partition()
            if name is not None:
                start, stop = _part(parameter)
                parts[name] = whole.view(-1)[start:stop].float().clone()

        fill(unread, self._module, receive)
        for parameter in self._parameters.values():
            if not hasattr(parameter, "ds_id"):
                parameter.data = parameter.data.to(compute)
        return parts

    def accumulate(self, batch: Batch, num_tokens: int, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        loss, loss_sum = self._forward.loss(batch, dist.get_world_size() / num_tokens)
        # A new tensor: BF16_Optimizer would divide the forward's own output by the micro-batches.
        self._engine.backward(loss * 1.0, scale_wrt_gas=False)
        self._loss.add(loss_sum, num_tokens)

    def step(self, lrs: Mapping[str, float], spike_limit: float = math.inf) -> LateStats:
        for group, name in zip(self._adam.param_groups, self._lr_order, strict=True):
            group["lr"] = lrs[name]
        sums = self._loss.take()
        dist.all_reduce(sums)
        means = self._loss.means(sums)
        loss = means.loss
        if dist.get_rank() == 0:  # whose part of the first tensor has no padding, in which a NaN would remain
            # A non-finite gradient is deepspeed's own way to drop a step, its bookkeeping included.
            first = self._layout.first_gradient().view(-1)[:1]
            first.copy_(torch.where(is_bad(loss, spike_limit).to(first.device), math.nan, first))
        self._engine.step()
        skipped = bool(self._zero.overflow)  # deepspeed has read it
        if self._named is not None:
            self._named.steps += not skipped
        norm = math.nan if skipped else self._zero._global_grad_norm
        norm = norm if isinstance(norm, torch.Tensor) else torch.full_like(loss, norm)
        return LateStats(means, norm.reshape(()).to(loss.device), torch.full_like(loss, skipped))

    def import_state(self, read: ReadState, step: int, order: ReadingOrder | None = None) -> None:
        self._state.import_(read, order)
        if self._named is not None:
            self._named.steps.fill_(step)
        else:
            for flat in self._layout.flats:
                self._adam.state[flat]["step"].fill_(float(step))
        self._layout.refresh()

    def gradient_probe(self) -> dict[str, tuple[float, float]]:
        from deepspeed.utils import safe_get_full_grad

        probes: dict[str, tuple[float, float]] = {}
        for name, parameter in self._parameters.items():
            grad = safe_get_full_grad(parameter)
            if grad is None:
                probes[name] = (0.0, 0.0)
                continue
            largest = grad.abs().amax().float().nan_to_num(nan=math.inf, posinf=math.inf)
            probes[name] = (float(torch.linalg.vector_norm(grad, dtype=torch.float32)), float(largest))
        return probes

    def frozen_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        return frozen_tensors(self._module, self._parameters.values(), _local)

    def sharded_bytes(self) -> dict[str, int]:
        trained = {id(parameter) for parameter in self._parameters.values()}
        frozen = [p for p in self._module.parameters() if id(p) not in trained]
        scales = [tensor for _, tensor in quantisation_state(self._module)]
        flats = self._layout.flats
        if self._named is not None:
            moments = self._named.moments()
        else:
            moments = [self._adam.state[flat][kind] for flat in flats for kind in ("exp_avg", "exp_avg_sq")]
        return storage_bytes(
            trainable=_storages(self._parameters.values()),
            frozen=[*_storages(frozen), *scales],
            optimizer=[*(flat.data for flat in flats), *moments],
        )

    def close(self) -> None:
        self._engine.destroy()
        nn.functional.linear = _TORCH_LINEAR

    def _read(self, kind: StateKind, name: str) -> torch.Tensor:
        if kind != "master" and self._named is not None:
            return self._named.read(kind, name)
        return self._flat_slice(kind, name)

    def _write(self, kind: StateKind, name: str, values: torch.Tensor) -> None:
        if kind != "master" and self._named is not None:
            self._named.write(kind, name, values)
        else:
            self._flat_slice(kind, name).copy_(values)

    def _flat_slice(self, kind: StateKind, name: str) -> torch.Tensor:
        """This rank's elements in the flat buffer that AdamW reads; never a copy."""
        flat, offset = self._layout.place(self._parameters[name])
        start, stop = self._ranges[name]
        buffer = flat.data if kind == "master" else self._adam.state[flat][kind]
        return buffer.narrow(0, offset, stop - start)

    def _create_moments(self, masters: Mapping[str, torch.Tensor]) -> None:
        """Create zero moments before the first step, where deepspeed and the optimizer look for them."""
        for flat in self._layout.flats:
            self._adam.state[flat] = {}
            if self._named is None:
                self._adam.state[flat] = {
                    "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                    "exp_avg": torch.zeros_like(flat.data),
                    "exp_avg_sq": torch.zeros_like(flat.data),
                }
        if self._named is not None:
            self._adam.adam = self._named
            for name, part in masters.items():
                flat, offset = self._layout.place(self._parameters[name])
                self._adam.parts.setdefault(id(flat), []).append((name, offset, part.numel()))


class _Stage12:
    """Where parameters are under stage 1 or 2: one flat vector per group, sharded over the ranks."""

    def __init__(self, zero: Any) -> None:
        self._zero = zero
        bf16_stage1 = hasattr(zero, "fp32_groups_flat_partition")  # BF16_Optimizer
        self.flats = zero.fp32_groups_flat_partition if bf16_stage1 else zero.single_partition_of_fp32_groups

    def range(self, parameter: Any) -> tuple[int, int]:
        """(start, stop) of this rank in the flattened parameter; shards ignore the borders of tensors."""
        if parameter._hp_mapping is None:
            return (0, 0)
        address = parameter._hp_mapping.lp_fragment_address
        return (address.start, address.start + address.numel)

    def place(self, parameter: Any) -> tuple[torch.Tensor, int]:
        mapping = parameter._hp_mapping
        return self.flats[mapping.param_group_index], mapping.hp_fragment_address.start

    def refresh(self) -> None:
        self._zero.update_lp_params()

    def first_gradient(self) -> torch.Tensor:
        """This rank's first part of the gradient that the next step applies."""
        if hasattr(self._zero, "fp32_groups_gradient_flat_partition"):  # BF16_Optimizer
            return self._zero.fp32_groups_gradient_flat_partition[0]
        return self._zero.averaged_gradients[0][0]


class _Stage3:
    """Where parameters are under stage 3: ceil(elements / ranks) on each rank, the last one padded."""

    def __init__(self, zero: Any) -> None:
        self._zero = zero
        self.flats = zero.fp32_partitioned_groups_flat

    def range(self, parameter: Any) -> tuple[int, int]:
        return _part(parameter)

    def place(self, parameter: Any) -> tuple[torch.Tensor, int]:
        group, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
        return self.flats[group], offset

    def refresh(self) -> None:
        for group in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        persistent = self._zero.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)

    def first_gradient(self) -> torch.Tensor:
        """This rank's first part of the gradient that the next step applies; of one in host memory deepspeed has
        taken the norm already, and looks at that."""
        if self._zero.offload_optimizer:
            return next(iter(self._zero.norm_for_param_grads.values()))
        return self._zero.averaged_gradients[0][0]


def _part(parameter: Any) -> tuple[int, int]:
    """(start, stop) of this rank in a flattened parameter of stage 3."""
    part = parameter.partition_numel()
    start = min(dist.get_rank() * part, parameter.ds_numel)
    return (start, min(start + part, parameter.ds_numel))


def _input_with_gradient(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """A leaf module's input as its first positional argument, requiring a gradient.

    deepspeed reduces a leaf's gradients in a full backward hook, which torch runs once the positional inputs have their
    gradient. If none requires one (the first layer over frozen embeddings), that is before the parameters have theirs.
    """
    if not args and "hidden_states" in kwargs:
        args = (kwargs.pop("hidden_states"),)
    if torch.is_grad_enabled() and not args[0].requires_grad:
        args = (args[0].detach().requires_grad_(), *args[1:])
    return args, kwargs


def _import_deepspeed(device: torch.device) -> Any:
    """deepspeed, quiet and on the right accelerator.

    Raises:
        MissingExtraError: it is not installed.
        ConfigError: another version than the one whose private names this file uses.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # deepspeed requires it
    try:
        version = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        raise MissingExtraError("engine.kind: zero", "zero") from None
    if version != TESTED_VERSION:
        raise ConfigError(
            f"engine.kind: zero needs deepspeed {TESTED_VERSION}, found {version}",
            remedy=f"pip install deepspeed=={TESTED_VERSION}, or use engine.kind: fsdp",
        )
    import deepspeed

    # deepspeed 0.19.8 calls two collectives by names that torch 2.13 deprecates, with a warning at every call.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # Otherwise it compiles a shared-memory collective into the home folder, which only its inference uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _optimizer(
    parameters: Mapping[str, nn.Parameter], groups: Sequence[ParamGroup], config: RunConfig
) -> torch.optim.Optimizer:
    param_groups: list[dict[str, Any]] = [
        {"params": [parameters[n] for n in group.names], "lr": 0.0, "weight_decay": group.weight_decay}
        for group in groups
    ]
    if eight_bit_names(groups, config.optim):
        return FlatAdamW(param_groups)
    return torch.optim.AdamW(param_groups, betas=config.optim.betas, eps=config.optim.eps, fused=True)


def _initialize(deepspeed: Any, module: nn.Module, optimizer: torch.optim.Optimizer, config: RunConfig) -> Any:
    """deepspeed's engine, built without its log lines."""
    bucket = min(BUCKET_ELEMENTS, sum(_numel(p) for group in optimizer.param_groups for p in group["params"]))
    settings = _settings(config, bucket)
    logger = deepspeed.utils.logger
    level = logger.level
    if isinstance(optimizer, FlatAdamW):
        logger.setLevel("ERROR")  # otherwise every rank warns that FlatAdamW is not on deepspeed's list
    with contextlib.redirect_stdout(io.StringIO()):  # memory reports that bypass the logger
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    logger.setLevel(level)
    return engine


def _settings(config: RunConfig, bucket: int = BUCKET_ELEMENTS) -> dict[str, Any]:
    """deepspeed's configuration; `bucket` elements are reduced at a time."""
    return {
        "train_micro_batch_size_per_gpu": config.batch.micro_batch,
        "gradient_accumulation_steps": 1,  # `accumulate` sets the boundary, so the number may vary
        "gradient_clipping": config.optim.max_grad_norm,
        "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": config.optim.state == "8bit",  # FlatAdamW is not on deepspeed's list
        "bf16": {"enabled": config.model.compute_dtype == "bf16", "check_grad_overflow": True},
        # The defaults accumulate and reduce in bf16, which costs 1e-3 of the gradient.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW, on the host too
        "zero_optimization": {
            "stage": config.engine.stage,
            "reduce_bucket_size": bucket,
            "offload_param": {"device": "cpu" if config.engine.offloads("base") else "none"},
            "offload_optimizer": {"device": "cpu" if config.engine.offloads("optimizer") else "none"},
        },
    }


def _numel(parameter: Any) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())  # a partitioned one is empty


def _local(parameter: Any) -> torch.Tensor:
    """This rank's storage between steps: the partition under stage 3, else the tensor."""
    return parameter.ds_tensor.data if hasattr(parameter, "ds_tensor") else parameter.data


def _storages(parameters: Any) -> Iterator[torch.Tensor]:
    """Every tensor behind the parameters: partitions, and small parameters that stage 3 keeps gathered."""
    for parameter in parameters:
        yield _local(parameter)
        yield parameter.data
