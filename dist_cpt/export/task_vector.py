"""The instruction residual: what a publisher's instruct model learned beyond its base, added to a trained base.

W = trained + scale x (instruct - base), tensor by tensor in fp32: of each model no more than one tensor is in memory,
beside the shard that is being written. The tokenizer, with its chat template, comes from the instruct model.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dist_cpt.adapters.quantize import stored_weights
from dist_cpt.errors import ConfigError, WriteError
from dist_cpt.export.merge import DTYPES, TOKENIZER_FILES, merge, publish, require_new
from dist_cpt.model.load import locate_base, weights_sha256

_INDEX = "model.safetensors.index.json"
_ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # of config.json: an instruct model ends its turns otherwise


@dataclass(frozen=True)
class Residual:
    """Two model folders or hub ids, and how much of their difference is added."""

    instruct: str
    base: str
    scale: float = 1.0


def merge_with_residual(
    checkpoint: str | Path,
    out: str | Path,
    residual: Residual,
    dtype: str = "bf16",
    *,
    base: str | None = None,
    scale: float = 1.0,
) -> bool:
    """`merge` in fp32, then the residual on top, stored in `dtype`; whether `residual.base` is the run's own base.

    Raises:
        ConfigError: another architecture, shape or vocabulary, quantised or pickled weights, or weights beyond fp16.
        CheckpointError: as `merge`.
        WriteError: `out` cannot be written.
    """
    out = Path(out)
    require_new(out, dtype)
    instruct, origin = (_model("--add-residual", given) for given in (residual.instruct, residual.base))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as work:
            trained, staging = Path(work) / "trained", Path(work) / "sum"
            merge(checkpoint, trained, "fp32", base=base, scale=scale)
            _require_one_vocabulary(trained, instruct)
            staging.mkdir()
            _add(trained, instruct, origin, staging, residual.scale, dtype)
            _write_configs(trained, instruct, staging, dtype)
            publish(staging, out)
    except OSError as error:
        raise WriteError(f"{out} cannot be written: {error}", remedy="check space and permissions") from error
    return weights_sha256(origin) == _run_base(Path(checkpoint))


class Tensors:
    """The tensors of a model folder by name, read one at a time. Close it with its ExitStack."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        from safetensors import safe_open

        self.folder = folder
        self._files: dict[str, Any] = {}
        for path in sorted(folder.glob("model*.safetensors")):
            file = stack.enter_context(safe_open(path, framework="pt"))
            self._files |= dict.fromkeys(file.keys(), file)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.kind: str = config.get("model_type", "")
        self._found: set[str] = set()

    def find(self, name: str) -> str:
        """The key of a tensor that another folder calls `name`: some leave out the name of the backbone.

        Raises:
            ConfigError: there is none.
        """
        for key in (name, name.partition(".")[2]):
            if key in self._files:
                self._found.add(key)
                return key
        raise ConfigError(f"{self.folder} has no tensor {name}", remedy="give models of one architecture")

    def shape(self, key: str) -> list[int]:
        return list(self._files[key].get_slice(key).get_shape())

    def read(self, key: str) -> torch.Tensor:
        """As fp32."""
        return self._files[key].get_tensor(key).float()

    def left(self) -> list[str]:
        """Keys that nobody asked for; buffers that old folders hold do not count."""
        return sorted(
            k for k in self._files.keys() - self._found if not k.endswith((".attn.bias", ".masked_bias", "inv_freq"))
        )


def _add(trained: Path, instruct: Path, base: Path, out: Path, scale: float, dtype: str) -> None:
    from safetensors.torch import save_file

    with ExitStack() as stack:
        ours, theirs, origin = (Tensors(folder, stack) for folder in (trained, instruct, base))
        for other in (theirs, origin):
            if other.kind != ours.kind:
                raise ConfigError(
                    f"--add-residual: {other.folder} is a {other.kind}, the trained model a {ours.kind}",
                    remedy="give the instruct model and the base that it was made from",
                )
        files = _shards(trained)
        pairs = {name: (theirs.find(name), origin.find(name)) for names in files.values() for name in names}
        for name, keys in pairs.items():
            for other, key in zip((theirs, origin), keys, strict=True):
                _require_shape(name, ours.shape(ours.find(name)), other.folder, other.shape(key))
        for other in (theirs, origin):
            if other.left():
                raise ConfigError(
                    f"--add-residual: {other.folder} has {other.left()[0]}, which the trained model has not",
                    remedy="give models that tie head and embedding alike",
                )
        for file, names in files.items():
            save_file(dict(_sums(names, pairs, ours, theirs, origin, scale, dtype)), out / file, {"format": "pt"})
        _write_index(trained, out, sum(math.prod(ours.shape(n)) for n in pairs) * DTYPES[dtype].itemsize)


def _sums(
    names: list[str],
    pairs: dict[str, tuple[str, str]],
    ours: Tensors,
    theirs: Tensors,
    origin: Tensors,
    scale: float,
    dtype: str,
) -> Iterator[tuple[str, torch.Tensor]]:
    for name in names:
        instruct, base = pairs[name]
        values = theirs.read(instruct).sub_(origin.read(base)).mul_(scale).add_(ours.read(name)).to(DTYPES[dtype])
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
    """Every token of the trained model must have the same id in the instruct model's tokenizer.

    Raises:
        ConfigError: one has not, or there is no tokenizer.
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

    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ConfigError(f"--add-residual: {folder} has no tokenizer", remedy="put its files there")
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab()


def _model(where: str, given: str) -> Path:
    try:
        folder = locate_base(given, None)
    except ConfigError as error:
        raise ConfigError(error.message.replace("model.path", where), remedy=error.remedy) from None
    if stored_weights(folder) is not None:
        raise ConfigError(f"{where}: {folder} holds quantised weights", remedy="give the 16-bit model")
    return folder


def _shards(folder: Path) -> dict[str, list[str]]:
    from safetensors import safe_open

    found = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found[path.name] = list(file.keys())
    return found


def _write_index(trained: Path, out: Path, num_bytes: int) -> None:
    if (trained / _INDEX).is_file():
        index = json.loads((trained / _INDEX).read_text(encoding="utf-8"))
        index["metadata"]["total_size"] = num_bytes
        (out / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_configs(trained: Path, instruct: Path, out: Path, dtype: str) -> None:
    ours, theirs = (json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (trained, instruct))
    ours |= {key: theirs[key] for key in _ENDS if key in theirs}
    ours["dtype"] = str(DTYPES[dtype]).removeprefix("torch.")
    (out / "config.json").write_text(json.dumps(ours, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (instruct / name).is_file():
            shutil.copyfile(instruct / name, out / name)


def _run_base(checkpoint: Path) -> str | None:
    """sha256 of the base that the manifest names; None for a PEFT folder."""
    try:
        content = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return content.get("content", content)["base"]["sha256"]
