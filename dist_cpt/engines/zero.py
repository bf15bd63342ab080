"""ZeRO stages 1, 2 and 3 through deepspeed; the only file that imports it.

The private names below belong to deepspeed 0.19.8, which is checked. What it does that one must know:

- It takes its fp32 masters from the bf16 module, which rounds; they are loaded again from the fp32 values.
- Moments appear only after a first step, and with several groups the bookkeeping around them then breaks.
  Here they exist, zero, from the start, and the state is read and written through the flat buffers that
  AdamW itself uses, so there is no second set of views that could go stale.
- Nothing refreshes the compute copies after a master was written; stage 3 also keeps small parameters
  gathered and needs those gathered anew.
- Stage 1 in bf16 with fp32 accumulation is another class (BF16_Optimizer) with other names.
- It divides gradients by the ranks, and by the micro-batches if it may: the loss is multiplied by the ranks
  and handed over as a new tensor, with its scaling off.
- A gradient that is not finite anywhere makes all ranks skip before the optimizer: each class takes one norm
  over all ranks first.
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
from dist_cpt.config.schema import EngineConfig, OptimConfig, RunConfig
from dist_cpt.data.batch import Batch
from dist_cpt.engines.engine import GradStats
from dist_cpt.engines.forward import inference, last_logits, scaled_loss
from dist_cpt.engines.slices import SlicedState, storage_bytes
from dist_cpt.errors import ConfigError, MissingExtraError
from dist_cpt.optim.groups import ParamGroup, eight_bit_names
from dist_cpt.optim.optimizer import AdamW, FlatAdamW
from dist_cpt.training_state import STATE_KINDS, ExportedTensor, ExportState, OwnerOf, ReadState, StateKind

TESTED_VERSION = "0.19.8"
BUCKET_ELEMENTS = 200_000_000  # of one reduction, in fp32 0.8 GB on the device


class ZeroEngine:
    """deepspeed's engine with torch's AdamW on its flat fp32 partitions."""

    def __init__(
        self,
        module: nn.Module,
        trainable: Mapping[str, nn.Parameter],
        groups: Sequence[ParamGroup],
        config: RunConfig,
        engine: EngineConfig,
        device: torch.device,
    ) -> None:
        deepspeed = _import_deepspeed(device)
        assert engine.stage is not None
        self.kind = f"zero-{engine.stage}"
        self._device = device
        self._parameters = {name: trainable[name] for group in groups for name in group.names}
        self._lr_order = [group.name for group in groups]
        # deepspeed puts new bf16 tensors into the parameters; the fp32 values live on in this dictionary.
        initial = {name: parameter.data for name, parameter in self._parameters.items()}
        named = [
            {"params": [trainable[n] for n in group.names], "lr": 0.0, "weight_decay": group.weight_decay}
            for group in groups
        ]
        eight_bit = eight_bit_names(groups, config.optim)
        optimizer: torch.optim.Optimizer = FlatAdamW(named)
        if not eight_bit:
            optimizer = torch.optim.AdamW(named, betas=config.optim.betas, eps=config.optim.eps, fused=True)
        self._module = module.train()
        if engine.stage == 3:
            for part in module.modules():  # what reads its children's matrices itself
                if getattr(part, "gathers_at_once", False):
                    deepspeed.utils.set_z3_leaf_module(part, True)
                    part.register_forward_pre_hook(_input_with_gradient, with_kwargs=True)
        settings = _deepspeed_config(config, engine, trainable)
        logger = deepspeed.utils.logger
        level = logger.level
        if eight_bit:
            logger.setLevel("ERROR")  # else it warns on every rank that FlatAdamW is not on its list
        with contextlib.redirect_stdout(io.StringIO()):  # memory reports that ask no logger
            self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        logger.setLevel(level)
        self._zero = self._engine.optimizer
        self._adam = self._zero.optimizer
        self._layout = _Stage3(self._zero) if engine.stage == 3 else _Stage12(self._zero)
        self._state = self._slices()
        self._named: AdamW | None = None  # what keeps the moments, if some are in 8 bit
        if eight_bit:
            self._name_the_moments(config.optim, eight_bit)
        else:
            self._set_moments_to_zero()
        if config.model.compute_dtype == "bf16":  # in fp32 the masters were copied without rounding
            for name, (start, stop) in self._state.ranges.items():
                if start < stop:
                    self._live("master", name).copy_(initial[name].reshape(-1)[start:stop])
            self._layout.refresh()

    def accumulate(self, batch: Batch, num_tokens: int, last: bool) -> torch.Tensor:
        self._engine.set_gradient_accumulation_boundary(last)
        scale = dist.get_world_size() / num_tokens
        loss, loss_sum = scaled_loss(self._engine, batch.to(self._device), scale)
        # A new tensor: BF16_Optimizer would divide the forward's own output by the micro-batches.
        self._engine.backward(loss * 1.0, scale_wrt_gas=False)
        return loss_sum

    def step(self, lrs: Mapping[str, float]) -> GradStats:
        for group, name in zip(self._adam.param_groups, self._lr_order, strict=True):
            group["lr"] = lrs[name]
        self._engine.step()
        skipped = bool(self._zero.overflow)
        if self._named is not None:
            self._named.steps += not skipped
        norm = math.nan if skipped else float(self._zero._global_grad_norm)
        return GradStats(norm, skipped)

    def discard(self) -> None:
        # deepspeed's own way to drop a step, its bookkeeping included: a gradient that is not finite.
        self._layout.spoil_gradient(next(iter(self._parameters.values())))
        self._engine.step()
        assert self._zero.overflow, "deepspeed applied a step that was to be dropped"

    def evaluate(self, batch: Batch) -> torch.Tensor:
        with inference(self._engine):
            return scaled_loss(self._engine, batch.to(self._device), 1.0)[1]

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        with inference(self._engine):
            return last_logits(self._engine, input_ids.to(self._device))

    def export_state(self, owner_of: OwnerOf, kinds: Sequence[StateKind] = STATE_KINDS) -> Iterator[ExportedTensor]:
        return self._state.export(owner_of, kinds)

    def snapshot(self) -> ExportState:
        return self._state.snapshot()

    def import_state(self, read: ReadState, step: int) -> None:
        self._state.import_(read)
        if self._named is not None:
            self._named.steps = step
        else:
            for flat in self._layout.flats:
                self._adam.state[flat]["step"].fill_(float(step))
        self._layout.refresh()

    def gradient_probe(self) -> dict[str, tuple[float, float]]:
        from deepspeed.utils import safe_get_full_grad

        found: dict[str, tuple[float, float]] = {}
        for name, parameter in self._parameters.items():
            grad = safe_get_full_grad(parameter)
            if grad is None:
                found[name] = (0.0, 0.0)
                continue
            largest = grad.abs().amax().float().nan_to_num(nan=math.inf, posinf=math.inf)
            found[name] = (float(torch.linalg.vector_norm(grad, dtype=torch.float32)), float(largest))
        return found

    def frozen_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        training = {id(parameter) for parameter in self._parameters.values()}
        for name, parameter in self._module.named_parameters():
            if id(parameter) not in training:
                yield name, _local(parameter)
        yield from quantisation_state(self._module)

    def sharded_bytes(self) -> dict[str, int]:
        training = {id(parameter) for parameter in self._parameters.values()}
        frozen = [p for p in self._module.parameters() if id(p) not in training]
        beside = [tensor for _, tensor in quantisation_state(self._module)]
        flats = self._layout.flats
        if self._named is not None:
            moments = self._named.held()
        else:
            moments = [self._adam.state[flat][kind] for flat in flats for kind in ("exp_avg", "exp_avg_sq")]
        seen: set[int] = set()
        return {
            "trainable": storage_bytes(_held(self._parameters.values()), seen),
            "frozen": storage_bytes([*_held(frozen), *beside], seen),
            "optimizer": storage_bytes([flat.data for flat in flats] + moments, seen),
        }

    def close(self) -> None:
        self._engine.destroy()

    def _slices(self) -> SlicedState:
        full = {name: getattr(p, "ds_shape", p.shape) for name, p in self._parameters.items()}
        ranges = {name: self._layout.range(parameter) for name, parameter in self._parameters.items()}
        return SlicedState(full, ranges, self._read, self._write, self._device)

    def _read(self, kind: StateKind, name: str) -> torch.Tensor:
        if kind != "master" and self._named is not None:
            return self._named.read(kind, name)
        return self._live(kind, name)

    def _live(self, kind: StateKind, name: str) -> torch.Tensor:
        """This rank's elements of the flat buffer that AdamW reads: never a copy, never a linked fragment."""
        flat, offset = self._layout.place(self._parameters[name])
        start, stop = self._state.ranges[name]
        buffer = flat.data if kind == "master" else self._adam.state[flat][kind]
        return buffer.narrow(0, offset, stop - start)

    def _write(self, kind: StateKind, name: str, values: torch.Tensor) -> None:
        if kind != "master" and self._named is not None:
            self._named.write(kind, name, values)
        else:
            self._live(kind, name).copy_(values)

    def _name_the_moments(self, optim: OptimConfig, eight_bit: frozenset[str]) -> None:
        """Keep the moments by name; deepspeed gets nothing to link, and calls the update with its flat gradients."""
        masters = {n: self._live("master", n) for n, (start, stop) in self._state.ranges.items() if start < stop}
        self._named = self._adam.adam = AdamW(masters, optim, eight_bit)
        for name, part in masters.items():
            flat, offset = self._layout.place(self._parameters[name])
            self._adam.parts.setdefault(id(flat), []).append((name, offset, part.numel()))
        for flat in self._layout.flats:
            self._adam.state[flat] = {}

    def _set_moments_to_zero(self) -> None:
        for flat in self._layout.flats:
            self._adam.state[flat] = {
                "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                "exp_avg": torch.zeros_like(flat.data),
                "exp_avg_sq": torch.zeros_like(flat.data),
            }


class _Stage12:
    """Where a parameter lies under stage 1 or 2: one flat vector per group, cut over the ranks."""

    def __init__(self, zero: Any) -> None:
        self._zero = zero
        bf16_stage1 = hasattr(zero, "fp32_groups_flat_partition")  # BF16_Optimizer
        self.flats = zero.fp32_groups_flat_partition if bf16_stage1 else zero.single_partition_of_fp32_groups

    def range(self, parameter: Any) -> tuple[int, int]:
        """(start, stop) of this rank in the flattened parameter; the cut ignores the borders of tensors."""
        if parameter._hp_mapping is None:
            return (0, 0)
        address = parameter._hp_mapping.lp_fragment_address
        return (address.start, address.start + address.numel)

    def place(self, parameter: Any) -> tuple[torch.Tensor, int]:
        mapping = parameter._hp_mapping
        return self.flats[mapping.param_group_index], mapping.hp_fragment_address.start

    def refresh(self) -> None:
        self._zero.update_lp_params()

    def spoil_gradient(self, parameter: Any) -> None:
        if hasattr(self._zero, "fp32_groups_gradient_flat_partition"):  # BF16_Optimizer
            self._zero.fp32_groups_gradient_flat_partition[0].fill_(math.nan)
            return
        from deepspeed.utils import safe_set_full_grad

        safe_set_full_grad(parameter, torch.full(parameter.shape, math.nan))


class _Stage3:
    """Where a parameter lies under stage 3: ceil(elements / ranks) on each rank, the last one padded."""

    def __init__(self, zero: Any) -> None:
        self._zero = zero
        self.flats = zero.fp32_partitioned_groups_flat

    def range(self, parameter: Any) -> tuple[int, int]:
        part = parameter.partition_numel()
        start = min(dist.get_rank() * part, parameter.ds_numel)
        return (start, min(start + part, parameter.ds_numel))

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

    def spoil_gradient(self, parameter: Any) -> None:
        from deepspeed.utils import safe_set_local_grad

        # The setter of whole gradients fails on the last rank if the elements do not divide by the ranks. Rank 0,
        # which speaks for all, has no padding, where a NaN could stay.
        value = math.nan if dist.get_rank() == 0 else 0.0
        safe_set_local_grad(parameter, torch.full((parameter.partition_numel(),), value))


def _input_with_gradient(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """A leaf module's input, first and with a gradient.

    deepspeed reduces a leaf's gradients in a full backward hook, which torch runs once the positional inputs have their
    gradient. Where none wants one (the first layer over frozen embeddings), that is before the parameters have theirs.
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
        ConfigError: another version than the one whose inner names this file uses.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # deepspeed insists on it
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

    # deepspeed 0.19.8 calls two collectives by names that torch 2.13 deprecates, and says so at every call.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # Else it compiles a shared-memory collective into the home folder, which only its inference uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _deepspeed_config(config: RunConfig, engine: EngineConfig, trainable: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    bucket = min(BUCKET_ELEMENTS, sum(parameter.numel() for parameter in trainable.values()))
    return {
        "train_micro_batch_size_per_gpu": config.batch.micro_batch,
        "gradient_accumulation_steps": 1,  # the boundary is set by hand, so the number may vary
        "gradient_clipping": config.optim.max_grad_norm,
        "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": config.optim.state == "8bit",  # FlatAdamW is not on its list
        "bf16": {"enabled": config.model.compute_dtype == "bf16", "check_grad_overflow": True},
        # The defaults accumulate and reduce in bf16, which costs 1e-3 of the gradient.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {"stage": engine.stage, "reduce_bucket_size": bucket},
    }


def _local(parameter: Any) -> torch.Tensor:
    """What this rank holds between steps: the partition under stage 3, else the tensor."""
    return parameter.ds_tensor.data if hasattr(parameter, "ds_tensor") else parameter.data


def _held(parameters: Any) -> Iterator[torch.Tensor]:
    """Every storage behind the parameters: partitions, and the small ones that stage 3 keeps gathered."""
    for parameter in parameters:
        yield _local(parameter)
        yield parameter.data
