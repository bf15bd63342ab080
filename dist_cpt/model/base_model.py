"""The base model of a recipe: located, checked, identified, and loaded or initialised."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from dist_cpt.adapters import quantize
from dist_cpt.adapters.language_model import auto_class
from dist_cpt.adapters.peft_folder import file_sha256
from dist_cpt.config.schema import ModelConfig, RunConfig
from dist_cpt.errors import ConfigError, brief
from dist_cpt.model.architectures import one_line
from dist_cpt.model.base_weights import BaseWeights, set_placeholders, skeleton
from dist_cpt.model.rope import scale_rope
from dist_cpt.model.safety_checks import code_sha256s, require_trusted_code
from dist_cpt.run_folder.names import MODEL_CONFIG
from dist_cpt.runtime.collectives import gather_json, on_every_rank, rank, ranks_that_see
from dist_cpt.runtime.progress_bars import PieceBar, loading_counts
from dist_cpt.storage import patiently

WEIGHTS_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}
VOCABULARY_MULTIPLE = 64  # rows of a new vocabulary matrix, for the tiles of a GPU's matrix product
_WEIGHTS = "model*.safetensors"  # the names that transformers loads
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def locate_base(path: str, revision: str | None, *, own_code: bool = False) -> Path:
    """The local folder of a model: `path`, or a snapshot from the hub, downloaded if necessary; with code on request.

    Raises:
        ConfigError: no such folder or hub repository, no network, or no safetensors weights.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if path.startswith((".", "/", "~")):
            raise ConfigError(f"model.path: folder not found: {path}", remedy="give a model folder or a hub id")
        folder = _snapshot(path, revision, own_code)
    if not (folder / MODEL_CONFIG).is_file():
        raise ConfigError(f"model.path: {path} has no {MODEL_CONFIG}", remedy="give a Hugging Face model folder")
    if not list(folder.glob(_WEIGHTS)):
        pickled = any(list(folder.glob(pattern)) for pattern in _PICKLES)
        weights = "only pickled weights, which are never opened" if pickled else "no weights"
        raise ConfigError(f"model.path: {path} has {weights}", remedy=f"give a folder with {_WEIGHTS}")
    return folder


def check_base(settings: ModelConfig) -> tuple[Path, bool, str | None]:
    """(folder, whether its own code runs, how its stored weights are quantised) of the base that a recipe names.

    Raises:
        ConfigError: as `locate_base`; code that is not trusted; stored weights quantised unlike `model.weights`.
    """
    assert settings.path is not None
    folder = locate_base(settings.path, settings.revision, own_code=settings.trust_remote_code)
    own_code, stored = require_trusted_code(folder, settings), quantize.stored_weights(folder)
    if stored not in (None, settings.weights):
        raise ConfigError(
            f"model.path: {settings.path} has {stored} weights, not {settings.weights}",
            remedy=f"set model.weights: {stored}, or give the unquantised model",
        )
    return folder, own_code, stored


def commit_of(folder: Path, revision: str | None) -> str | None:
    """The commit of a hub snapshot, whose folder is named after it; of any other folder `revision`."""
    return folder.name if folder.parent.name == "snapshots" else revision


def weights_sha256(folder: Path) -> str:
    """The sha256 of a folder's safetensors files: over the name and sha256 of each, in order of names."""
    return _one_sha256(_sha256s(list(folder.glob(_WEIGHTS))))


def base_sha256s(settings: ModelConfig) -> tuple[str, dict[str, str]]:
    """(`weights_sha256`, sha256 by name of the files that are loaded) of the base. Collective.

    Ranks of a host that see the same files hash each of them once between them; other hosts may have other copies.

    Raises:
        ConfigError: as `check_base`.
    """
    folder, own_code, _ = on_every_rank("model.path", lambda: check_base(settings))
    patterns = (_WEIGHTS, MODEL_CONFIG, *(("*.py",) if own_code else ()))
    files = sorted(path for pattern in patterns for path in folder.glob(pattern))
    hashes = sha256s_together(files)
    return _one_sha256({name: sha256 for name, sha256 in hashes.items() if fnmatch(name, _WEIGHTS)}), hashes


def sha256s_together(files: Sequence[Path]) -> dict[str, str]:
    """sha256 by name of files, each read once by the ranks of this host that see the same ones. Collective."""
    seen = on_every_rank("stat", lambda: [[path.name, *_place(path)] for path in files])
    ranks = ranks_that_see([platform.node(), seen])
    mine = files[ranks.index(rank()) :: len(ranks)]
    everyone = gather_json(on_every_rank("hash", lambda: _sha256s(mine)))
    return {name: sha256 for index in ranks for name, sha256 in everyone[index].items()}


def _place(path: Path) -> tuple[int, ...]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _sha256s(files: Sequence[Path]) -> dict[str, str]:
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing releases the interpreter lock
        return dict(zip([path.name for path in files], pool.map(file_sha256, files), strict=True))


def _one_sha256(hashes: Mapping[str, str]) -> str:
    lines = "".join(f"{sha256}  {name}\n" for name, sha256 in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def build_config(values: dict[str, Any]) -> Any:
    """A transformers config from the recipe's `model.config`; dropout is off unless named there.

    Raises:
        ConfigError: an unknown model_type, an unknown key, or an invalid value.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = values["model_type"]
    if kind not in CONFIG_MAPPING:
        raise _unknown(f"unknown model_type {kind!r}", str(kind), CONFIG_MAPPING.keys())
    config_class = CONFIG_MAPPING[kind]
    known = {f.name for f in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    known |= {"model_type", "architectures", "rope_theta", "rope_scaling"}
    for key in values:
        if key not in known:
            raise _unknown(f"{kind} has no key {key!r}", key, known)
    given = {key: value for key, value in values.items() if key not in ("model_type", "architectures")}
    try:
        hf_config = AutoConfig.for_model(kind, **given)
    except Exception as error:  # transformers raises its own validation errors here
        raise ConfigError(f"model.config: {brief(error)}") from error
    _switch_off_dropout(hf_config, keep=set(given))
    return hf_config


def load_base(config: RunConfig, device: torch.device, base_sha256: str | None = None) -> tuple[Any, dict[str, Any]]:
    """(transformers causal LM, its identity for manifests): from `model.path`, or initialised from `model.config`.

    `base_sha256` is the folder's `weights_sha256`, if that is known already.

    Raises:
        ConfigError: as `check_base` and `build_config`, or weights that cannot be loaded.
        MissingExtraError: weights are nf4 or int8 and bitsandbytes is not installed.
    """
    dtype = _stored_dtype(config)
    if config.model.config is not None:
        return _from_scratch(config.model.config, config.seed, dtype)
    return _from_folder(config.model, dtype, device, base_sha256)


def open_base(
    config: RunConfig, device: torch.device, base_sha256: str | None = None
) -> tuple[Any, dict[str, Any], BaseWeights]:
    """`load_base` of a folder whose weights are not read: (model with placeholders, its identity, its weights).

    Raises:
        ConfigError: as `load_base`, but for what only reading shows.
        MissingExtraError: as `load_base`.
    """
    settings = config.model
    folder, _, stored = check_base(settings)
    options = quantize.loading_options(settings.weights, device, stored)
    dtype = torch.bfloat16 if options else _stored_dtype(config)
    with _explained(settings):
        named = model_class(settings)
        made, twin = (
            skeleton(named, folder, config=_hf_config(settings, folder), dtype=dtype, **options) for _ in range(2)
        )
    model = made.model
    if options:
        quantize.set_placeholders(folder, model, settings.weights, device)
    set_placeholders(model)
    weights = BaseWeights(folder, twin)
    with _explained(settings):
        weights.read_buffers(model)
    return model, _identity(settings, folder, stored, model, base_sha256), weights


def model_class(settings: ModelConfig) -> Any | None:
    """transformers' own class for the base that a recipe names; None for other code, and for several at once."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    folder, own_code, _ = check_base(settings)
    hf_config = _hf_config(settings, folder)
    named: Any = None if own_code else MODEL_FOR_CAUSAL_LM_MAPPING.get(type(hf_config), None)
    return named if isinstance(named, type) and getattr(named, "config_class", None) is type(hf_config) else None


def _stored_dtype(config: RunConfig) -> torch.dtype:
    """Of weights that are not quantised: those that train are masters."""
    return torch.float32 if config.adapter.kind == "none" else WEIGHTS_DTYPE[config.model.compute_dtype]


def with_vocabulary_size(config: RunConfig, num_token_ids: int) -> RunConfig:
    """The recipe with a vocab_size in `model.config`: its own, or rows for all token ids."""
    values = config.model.config
    if values is None or "vocab_size" in values:
        return config
    rows = -(-num_token_ids // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    return config.model_copy(
        update={"model": config.model.model_copy(update={"config": values | {"vocab_size": rows}})}
    )


def describe(hf_config: Any) -> dict[str, Any]:
    """The part of a base's identity that its configuration determines."""
    values = {key: value for key, value in hf_config.to_diff_dict().items() if key != "quantization_config"}
    return {
        "model_type": hf_config.model_type,
        "architectures": list(hf_config.architectures or []),
        "vocab_size": hf_config.get_text_config().vocab_size,
        "config": json.loads(json.dumps(values), parse_constant=str),  # as a manifest has it: inf is a word
    }


def _from_scratch(values: dict[str, Any], seed: int, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    hf_config = build_config(values)
    with one_line("model.config", remedy="correct its sizes"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto_class(hf_config).from_config(hf_config, dtype=dtype, trust_remote_code=False)
    model.config.architectures = [type(model).__name__]
    given = {"config": values, "seed": seed, "vocab_size": hf_config.get_text_config().vocab_size}
    digest = hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()
    identity = {"path": None, "revision": None, "sha256": digest, "from_scratch": {"config": values, "seed": seed}}
    return model, identity | describe(model.config)


def _from_folder(
    settings: ModelConfig, dtype: torch.dtype, device: torch.device, base_sha256: str | None
) -> tuple[Any, dict[str, Any]]:

    folder, own_code, stored = check_base(settings)

    def load() -> Any:
        hf_config = _hf_config(settings, folder, own_code)
        if settings.weights in quantize.QUANTISED:
            return quantize.load_quantised(folder, hf_config, device, settings.weights, own_code=own_code)
        return quantize.load_plain(folder, hf_config, dtype, own_code=own_code)

    with _explained(settings), loading_counts():
        model = patiently(folder, load)
    return model, _identity(settings, folder, stored, model, base_sha256)


def _hf_config(settings: ModelConfig, folder: Path, own_code: bool = False) -> Any:
    from transformers import AutoConfig

    hf_config = patiently(folder, lambda: AutoConfig.from_pretrained(folder, trust_remote_code=own_code))
    _switch_off_dropout(hf_config, keep=set())
    if settings.rope_scaling is not None:
        scale_rope(hf_config, settings.rope_scaling)
    return hf_config


@contextmanager
def _explained(settings: ModelConfig) -> Iterator[None]:
    """What transformers raises for a folder that it cannot load, as a ConfigError."""
    with one_line(f"model.path: {settings.path} cannot be loaded"):
        yield


def _identity(
    settings: ModelConfig, folder: Path, stored: str | None, model: Any, base_sha256: str | None
) -> dict[str, Any]:
    identity: dict[str, Any] = {"path": settings.path, "revision": commit_of(folder, settings.revision)}
    identity["sha256"] = base_sha256 or weights_sha256(folder)
    if settings.weights in quantize.QUANTISED:
        identity |= quantize.identity_of(model, settings.weights, stored is not None)
    if settings.trust_remote_code and (code := code_sha256s(folder)):
        identity["code"] = code
    return identity | describe(model.config)


def _unknown(problem: str, given: str, known: Iterable[str]) -> ConfigError:
    near = difflib.get_close_matches(given, sorted(known), n=1)
    return ConfigError(f"model.config: {problem}", remedy=f"did you mean {near[0]}?" if near else None)


def _switch_off_dropout(hf_config: Any, keep: set[str]) -> None:
    """Dropout off, except for the keys in `keep`: CPT sees most tokens once, and an exact resume needs it off."""
    for key, value in hf_config.to_dict().items():
        if key.endswith(("dropout", "pdrop", "drop")) and isinstance(value, float) and key not in keep:
            setattr(hf_config, key, 0.0)


def _snapshot(repository: str, revision: str | None, own_code: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = [_WEIGHTS, "*.json", "*.txt", "*.jinja", "tokenizer.model"] + ["*.py"] * own_code
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted, tqdm_class=PieceBar))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"model.path: {repository} is not a folder and cannot be downloaded from the hub: {brief(error)}",
            remedy="give a local model folder, or check the name and the network",
        ) from error
