"""The weights of a base that its module does not have yet, read matrix by matrix when an engine asks for them.

transformers builds the model on the meta device and reads a folder into it in one call. Here the call is cut in two:
the model without its weights first, then any part of it by the same conversions, with the same dtypes and quantisation,
so that every bit is the one that reading the whole folder gives. The parts are units: a decoder layer, or one of the
other parameters. A unit is read by one rank, which sends the others what they need of it (`dist_cpt.engines.fill`).
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_cpt.adapters import quantize
from dist_cpt.adapters.placeholders import placeholder
from dist_cpt.errors import ConfigError
from dist_cpt.model.architectures import parts_of
from dist_cpt.runtime.progress_bars import loading_counts
from dist_cpt.storage import patiently

_BUFFERS = "buffers"  # the unit of all persistent buffers


@dataclass(frozen=True)
class Skeleton:
    """A transformers model on the meta device whose computed buffers are real, and how its folder is read."""

    model: Any
    files: list[str]
    load_config: Any  # transformers' LoadStateDictConfig


def skeleton(model_class: Any, folder: Path, **options: Any) -> Skeleton:
    """What `model_class.from_pretrained(folder, **options)` builds before it reads a weight.

    A subclass takes the place of its two steps that read. Anything before them (the configuration, quantised layers,
    generation settings) is transformers' own.
    """
    parts: dict[str, Any] = {}

    def keep(model: Any, _: Any, files: list[str], load_config: Any, *__: Any) -> tuple[Any, None]:
        parts.update(model=model, files=files, load_config=load_config)
        return None, None

    def with_buffers(model: Any, load_config: Any, _: Any) -> Any:
        model._move_missing_keys_from_meta_to_device(set(), load_config.device_map, None, load_config.hf_quantizer)
        for parameter in model.parameters():
            parameter._is_hf_initialized = True  # nothing to draw: only buffers are computed
        model._initialize_missing_keys(load_config.is_quantized)
        model.tie_weights(recompute_mapping=False)
        return None

    readers = {"_load_pretrained_model": staticmethod(keep), "_finalize_model_loading": staticmethod(with_buffers)}
    # Its name is looked up in transformers' table of conversions.
    reading = type(model_class.__name__, (model_class,), {"__module__": model_class.__module__, **readers})
    model = reading.from_pretrained(folder, use_safetensors=True, **options)
    model.__class__ = model_class
    for parameter in model.parameters():
        del parameter._is_hf_initialized
    return Skeleton(model, parts["files"], parts["load_config"])


def set_placeholders(model: nn.Module) -> None:
    """Replace every parameter on the meta device by a placeholder; tied ones stay tied."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.is_meta:
                empty = placeholder(parameter.shape, parameter.dtype)
                made.setdefault(parameter, nn.Parameter(empty, requires_grad=parameter.requires_grad))
                setattr(module, name, made[parameter])


class BaseWeights:
    """The weights of a model folder, by the names of its parameters and of their scales."""

    def __init__(self, folder: Path, made: Skeleton) -> None:
        self._folder, self._made = folder, made  # on the meta device but for the unit that is being read
        self._names: dict[str, list[str]] = {}  # of every parameter: all of them, if it is tied
        by_parameter: dict[int, list[str]] = defaultdict(list)
        for name, parameter in made.model.named_parameters(remove_duplicate=False):
            by_parameter[id(parameter)].append(name)
            self._names[name] = by_parameter[id(parameter)]
        layers = {id(layer) for layer in parts_of(made.model).layers}
        self._layers = [f"{name}." for name, module in made.model.named_modules() if id(module) in layers]
        self._buffers = [name for name in made.model.state_dict() if name not in self._names]
        self._keys = patiently(folder, self._keys_by_unit)

    def stored_name(self, name: str) -> str:
        """The name under which `read` returns parameter `name`: that of the first of the modules that share it."""
        return self._names[name][0]

    def unit(self, name: str) -> str:
        """What is read together with parameter `name`: its decoder layer, or that parameter alone; all buffers."""
        if name in self._buffers:
            return _BUFFERS
        return next((prefix for prefix in self._layers if name.startswith(prefix)), self._names[name][0])

    def read(self, unit: str) -> dict[str, torch.Tensor]:
        """Every parameter of `unit`, and the scales of quantised ones as `quantisation_state` names them.

        Raises:
            ConfigError: the folder lacks one of them, or has it in another shape.
        """
        try:
            with loading_counts():
                return patiently(self._folder, lambda: self._read(unit))
        except (ValueError, OSError, RuntimeError, KeyError) as error:
            raise ConfigError(f"model.path: {self._folder} cannot be loaded: {error}") from error

    def read_buffers(self, model: nn.Module) -> None:
        """Set the persistent buffers of `model`: weights that never train, small, and whole on every rank.

        Raises:
            ConfigError: the folder lacks one of them.
        """
        if not self._buffers:
            return
        with loading_counts():
            patiently(self._folder, lambda: self._load(_BUFFERS))
        read = {name: self._made.model.get_buffer(name) for name in self._buffers}
        missing = [name for name, buffer in read.items() if buffer.is_meta]
        quantize.require_complete(self._folder, model, {"missing_keys": missing})
        for name, buffer in read.items():
            module, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(module), attribute, buffer)

    def _load(self, unit: str) -> Any:
        """What transformers says of having read `unit` into the model on the meta device."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        with _opened(self._keys.get(unit, [])) as slices:
            info, _ = convert_and_load_state_dict_in_model(self._made.model, slices, self._made.load_config)
        return info

    def _read(self, unit: str) -> dict[str, torch.Tensor]:
        model = self._made.model
        wanted = [name for name, _ in model.named_parameters() if self.unit(name) == unit]
        unread = {alias: model.get_parameter(alias) for name in wanted for alias in self._names[name]}
        try:
            info = self._load(unit)
            _require_read(self._folder, info, model, {name: self._names[name] for name in wanted})
            values = {name: _first_read(model, self._names[name]).data for name in wanted}
            return values | dict(quantize.take_scales(self._folder, model))
        finally:
            for name, parameter in unread.items():
                module, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(module), attribute, parameter)

    def _keys_by_unit(self) -> dict[str, list[tuple[str, str]]]:
        """(file, key) of what is read for each unit, as transformers would assign the keys."""
        from safetensors import safe_open
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        mapping = self._made.load_config.weight_mapping or []
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        model = self._made.model
        known, prefix = model.state_dict(), model.base_model_prefix
        keys: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for file in self._made.files:
            with safe_open(file, framework="pt", backend="pread") as opened:
                for key in opened.keys():  # noqa: SIM118
                    name, _ = rename_source_key(key, renamings, converters, prefix, known)
                    if name not in known and key in known:
                        name, _ = rename_source_key(key, [], [], prefix, known)
                    if name in self._names or name in self._buffers:
                        keys[self.unit(name)].append((file, key))
        return keys


@contextlib.contextmanager
def _opened(keys: Sequence[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """safetensors slices by key, which are read when they are indexed."""
    from safetensors import safe_open

    with contextlib.ExitStack() as files:
        # Not mapped: a private mapping of a whole file counts as this process's memory where that is limited.
        opened = {f: files.enter_context(safe_open(f, framework="pt", backend="pread")) for f in dict(keys)}
        yield {key: opened[file].get_slice(key) for file, key in keys}


def _require_read(folder: Path, info: Any, model: Any, names: Mapping[str, Sequence[str]]) -> None:
    problems = {name for name, aliases in names.items() if _first_read(model, aliases).is_meta}
    if wrong := [key for key in info.mismatched_keys if key[0] in names]:
        name, there, here = wrong[0]
        raise ConfigError(f"model.path: {folder} has {name} of shape {list(there)}, its config.json {list(here)}")
    if info.conversion_errors:
        raise ConfigError(f"model.path: {folder} cannot be loaded: {next(iter(info.conversion_errors.values()))}")
    quantize.require_complete(folder, model, {"missing_keys": problems})


def _first_read(model: Any, names: Sequence[str]) -> torch.Tensor:
    """The parameter with one of these names; a file may contain a tied matrix under any of them."""
    parameters = [model.get_parameter(name) for name in names]
    return next((parameter for parameter in parameters if not parameter.is_meta), parameters[0])


@dataclass(frozen=True)
class Source:
    """What a parameter of a module is made of: one of the base's weights, in `dtype`, changed by `change`."""

    name: str
    dtype: torch.dtype
    change: Callable[[torch.Tensor], torch.Tensor] | None = None


@dataclass(frozen=True)
class UnreadBase:
    """The parameters of a module that are still placeholders, by path in the module, and where their values are."""

    weights: BaseWeights
    sources: Mapping[str, Source]

    @property
    def units(self) -> list[list[str]]:
        """Paths that are read together, in the module's order."""
        units: dict[str, list[str]] = defaultdict(list)
        for path, source in self.sources.items():
            units[self.weights.unit(source.name)].append(path)
        return list(units.values())

    def read(self, paths: Sequence[str]) -> dict[str, torch.Tensor]:
        """The parameters of one of `units`, and the scales of quantised ones, by path."""
        read = self.weights.read(self.weights.unit(self.sources[paths[0]].name))
        values: dict[str, torch.Tensor] = {}
        for path in paths:
            source = self.sources[path]
            value = read[source.name]
            values[path] = value if source.change is None else source.change(value)
            for key in read:
                if key.startswith(f"{source.name}."):
                    values[path + key.removeprefix(source.name)] = read[key]
        return values
