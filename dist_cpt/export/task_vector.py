"""A task vector: what a publisher's instruct model learned beyond its base, added to a trained base.

W = trained + scale x (instruct - base), tensor by tensor in fp32: besides the shard that is being written, one tensor
of each model is in memory. The tokenizer, with its chat template, comes from the instruct model.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dist_cpt.adapters.peft_folder import manifest_content
from dist_cpt.adapters.quantize import quantisation_of
from dist_cpt.errors import ConfigError
from dist_cpt.export.merge import merge
from dist_cpt.export.model_folder import DTYPES, TOKENIZER_FILES, has_tokenizer, require_dtype
from dist_cpt.model.base_model import locate_base, weights_sha256
from dist_cpt.run_folder.names import MODEL_CONFIG, MODEL_INDEX
from dist_cpt.run_folder.staging import new_output, require_new

# Keys of config.json in which an instruct model differs from its base: it ends a turn with another token.
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class TaskVector:
    """Two model folders or hub ids, and the factor of their difference."""

    instruct: str
    base: str
    scale: float = 1.0


def merge_with_task_vector(
    checkpoint: str | Path,
    out: str | Path,
    vector: TaskVector,
    dtype: str = "bf16",
    *,
    base: str | None = None,
    scale: float = 1.0,
) -> bool:
    """`merge` in fp32, add the task vector and store in `dtype`; returns whether `vector.base` is the run's own base.

    Raises:
        ConfigError: another architecture, shape or vocabulary, quantised or pickled weights, or weights beyond fp16.
        CheckpointError: as `merge`.
        WriteError: `out` cannot be written.
    """
    out = Path(out)
    require_dtype(dtype)
    require_new(out)
    instruct, origin = _locate(vector.instruct), _locate(vector.base)
    with new_output(out) as folder:
        trained = folder.with_name("trained")
        merge(checkpoint, trained, "fp32", base=base, scale=scale)
        _require_one_vocabulary(trained, instruct)
        folder.mkdir()
        with ExitStack() as stack:
            models = _Models(*(_Tensors(path, stack) for path in (trained, instruct, origin)))
            models.write_sum(folder, vector.scale, dtype)
        _write_configs(trained, instruct, folder, dtype)
    manifest = manifest_content(Path(checkpoint))
    return manifest is not None and weights_sha256(origin) == manifest["base"]["sha256"]


class _Tensors:
    """The tensors of a model folder by name, read one at a time; `stack` closes the files."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        from safetensors import safe_open

        self.folder = folder
        self.shards: dict[str, list[str]] = {}
        self._files: dict[str, Any] = {}
        for path in sorted(folder.glob("model*.safetensors")):
            file = stack.enter_context(safe_open(path, framework="pt"))
            self.shards[path.name] = list(file.keys())
            self._files |= dict.fromkeys(file.keys(), file)
        self.model_type: str = _read_json(folder / MODEL_CONFIG).get("model_type", "")
        self._requested: set[str] = set()

    def find(self, name: str) -> str:
        """The key of tensor `name`; some folders leave out the name of the backbone.

        Raises:
            ConfigError: there is none.
        """
        for key in (name, name.partition(".")[2]):
            if key in self._files:
                self._requested.add(key)
                return key
        raise ConfigError(f"{self.folder} has no tensor {name}", remedy="give models of one architecture")

    def shape(self, key: str) -> list[int]:
        return list(self._files[key].get_slice(key).get_shape())

    def read(self, key: str) -> torch.Tensor:
        """As fp32."""
        return self._files[key].get_tensor(key).float()

    def unused(self) -> list[str]:
        """Keys that were never found, apart from buffers that old folders contain."""
        buffers = (".attn.bias", ".masked_bias", "inv_freq")
        return sorted(key for key in self._files.keys() - self._requested if not key.endswith(buffers))


@dataclass(frozen=True)
class _Models:
    """The three models of W = trained + scale x (instruct - base)."""

    trained: _Tensors
    instruct: _Tensors
    base: _Tensors

    def write_sum(self, out: Path, scale: float, dtype: str) -> None:
        """Write W as the same shards that the trained model has.

        Raises:
            ConfigError: the models differ in architecture, tensors or shapes, or a sum is not finite.
        """
        from safetensors.torch import save_file

        self._require_match()
        for file, names in self.trained.shards.items():
            save_file(dict(self._sums(names, scale, dtype)), out / file, {"format": "pt"})
        if (index := self.trained.folder / MODEL_INDEX).is_file():
            content = _read_json(index)
            sizes = (math.prod(self.trained.shape(name)) for names in self.trained.shards.values() for name in names)
            content["metadata"]["total_size"] = sum(sizes) * DTYPES[dtype].itemsize
            _write_json(out / MODEL_INDEX, content)

    def _require_match(self) -> None:
        for other in (self.instruct, self.base):
            if other.model_type != self.trained.model_type:
                raise ConfigError(
                    f"--add-residual: {other.folder} is a {other.model_type}, the trained model a "
                    f"{self.trained.model_type}",
                    remedy="give the instruct model and the base that it was made from",
                )
        for name in (name for names in self.trained.shards.values() for name in names):
            for other in (self.instruct, self.base):
                _require_shape(name, self.trained.shape(name), other.folder, other.shape(other.find(name)))
        for other in (self.instruct, self.base):
            if unused := other.unused():
                raise ConfigError(
                    f"--add-residual: {other.folder} has {unused[0]}, which the trained model lacks",
                    remedy="give models that tie head and embedding alike",
                )

    def _sums(self, names: list[str], scale: float, dtype: str) -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            difference = self.instruct.read(self.instruct.find(name)).sub_(self.base.read(self.base.find(name)))
            values = difference.mul_(scale).add_(self.trained.read(name)).to(DTYPES[dtype])
            if not bool(torch.isfinite(values).all()):
                raise ConfigError(
                    f"--add-residual: {name} is not finite in {dtype}", remedy="check the models, or use bf16"
                )
            yield name, values.contiguous()


def _require_shape(name: str, ours: list[int], folder: Path, theirs: list[int]) -> None:
    if ours == theirs:
        return
    rows = ours[1:] == theirs[1:] and name.endswith(("embed_tokens.weight", "wte.weight", "lm_head.weight"))
    why = "the vocabularies differ" if rows else "the sizes differ"
    raise ConfigError(
        f"--add-residual: {why}: {name} is {ours} in the trained model and {theirs} in {folder}",
        remedy="the three models must have one vocabulary" if rows else "give models of one size",
    )


def _require_one_vocabulary(trained: Path, instruct: Path) -> None:
    """Refuse an instruct model whose tokenizer gives a token of the trained model another id.

    Raises:
        ConfigError: names the first such token, or there is no tokenizer.
    """
    ours, theirs = (_vocabulary(folder) for folder in (trained, instruct))
    for token, index in ours.items():
        if theirs.get(token) != index:
            raise ConfigError(
                f"--add-residual: token {token!r} is id {index} in the trained model and {theirs.get(token)} in "
                f"{instruct}",
                remedy="give the instruct model of the same tokenizer",
            )


def _vocabulary(folder: Path) -> dict[str, int]:
    from transformers import AutoTokenizer

    if not has_tokenizer(folder):
        raise ConfigError(f"--add-residual: {folder} has no tokenizer", remedy="put its files there")
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab()


def _locate(given: str) -> Path:
    try:
        folder = locate_base(given, None)
    except ConfigError as error:
        raise ConfigError(error.message.replace("model.path", "--add-residual"), remedy=error.remedy) from None
    if quantisation_of(folder) is not None:
        raise ConfigError(f"--add-residual: {folder} has quantised weights", remedy="give the 16-bit model")
    return folder


def _write_configs(trained: Path, instruct: Path, out: Path, dtype: str) -> None:
    ours, theirs = _read_json(trained / MODEL_CONFIG), _read_json(instruct / MODEL_CONFIG)
    ours |= {key: theirs[key] for key in _SPECIAL_TOKENS if key in theirs}
    ours["dtype"] = str(DTYPES[dtype]).removeprefix("torch.")
    _write_json(out / MODEL_CONFIG, ours)
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (instruct / name).is_file():
            shutil.copyfile(instruct / name, out / name)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
