"""From a recipe to the module that trains: the base, its adapter, what trains, and what identifies it."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_cpt.adapters import quantize
from dist_cpt.adapters.lora import adapter_aliases, apply_lora, canonical_name, write_adapter_config
from dist_cpt.config.schema import ModelConfig, RunConfig
from dist_cpt.errors import ConfigError
from dist_cpt.model.architectures import TESTED, Parts, check_config, parts_of
from dist_cpt.model.attention import choose, install
from dist_cpt.model.fuse import Fusion, fuse
from dist_cpt.model.loss import CausalLMForLoss, install_loss_head, prove_parts
from dist_cpt.model.prove import prove_fusion

WEIGHTS_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}
_WEIGHTS = "model*.safetensors"  # the names transformers loads
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class TrainableModel:
    """A model ready for an engine. Names are canonical: the keys of the saved files."""

    module: CausalLMForLoss  # what engines wrap
    trainable: dict[str, nn.Parameter]  # fp32, in the module's order
    ties: list[tuple[str, str]]  # (name in `trainable` or frozen, second name of the same tensor)
    layers: list[nn.Module]  # decoder layers: sharding and checkpointing units
    identity: dict[str, Any]  # of the base, for manifests
    hf_config: Any
    adapter_config: dict[str, Any] | None  # content of adapter_config.json; None without an adapter
    fusion: Fusion  # which modules run fused

    @property
    def aliases(self) -> dict[str, str]:
        """Second keys that a checkpoint's adapter file needs for tied matrices: {alias: name}."""
        return adapter_aliases(self.trainable, self.ties) if self.adapter_config is not None else {}

    def write_config(self, folder: str | Path) -> None:
        """Write what makes a folder with the trainable tensors open elsewhere: adapter_config.json, or
        config.json and generation_config.json of a full-parameter model."""
        if self.adapter_config is not None:
            write_adapter_config(folder, self.adapter_config)
            return
        self.hf_config.save_pretrained(folder)
        generation_config = getattr(self.module.hf_model, "generation_config", None)
        if generation_config is not None:
            generation_config.save_pretrained(folder)


def load_model(config: RunConfig, *, device: torch.device, vocab_size: int | None = None) -> TrainableModel:
    """Load or initialise the recipe's model, apply its adapter and move it to `device`.

    The frozen base is stored in `model.weights`, every trainable tensor in fp32. `vocab_size` is the
    tokenizer's; a model from scratch takes it where its config names none.

    Raises:
        ConfigError: no such model, no safetensors weights, an unknown architecture or config key, too small
            a vocabulary, too few positions, or adapter targets that do not exist.
        MissingExtraError: weights are nf4 and bitsandbytes is not installed.
    """
    model, identity = _base(config, vocab_size, device)
    check_config(model.config)
    parts = parts_of(model)
    _check_sizes(config, parts, vocab_size)
    head_name, embeddings_name = (_name_of(model, m) for m in (parts.head, parts.embeddings))
    softcap = getattr(model.config, "final_logit_softcapping", None)
    install_loss_head(parts.head, use_reference=config.model.kernels == "reference", softcap=softcap)
    if model.config.model_type not in TESTED:
        prove_parts(model)
    choice = choose(device)
    install(model, choice)
    causal_lm, adapter_config = _make_trainable(config, model, parts)
    fusion = fuse(model, parts, config.model.kernels, device)
    module = CausalLMForLoss(causal_lm, choice).to(device)
    if fusion.swapped:
        prove_fusion(module, fusion.swapped, WEIGHTS_DTYPE[config.model.compute_dtype])
    prefix = "base_model.model." if adapter_config is not None else ""
    tied = parts.head.weight is parts.embeddings.weight
    return TrainableModel(
        module=module,
        trainable={canonical_name(name): p for name, p in module.named_parameters() if p.requires_grad},
        ties=[(f"{prefix}{embeddings_name}.weight", f"{prefix}{head_name}.weight")] if tied else [],
        layers=parts.layers,
        identity=identity,
        hf_config=model.config,
        adapter_config=adapter_config,
        fusion=fusion,
    )


def frozen_hash(module: nn.Module) -> str:
    """sha256 over the names and raw bytes of every frozen parameter, what unpacks it and every buffer; not for
    shards."""
    digest = hashlib.sha256()
    frozen = [(name, p) for name, p in module.named_parameters() if not p.requires_grad]
    for name, tensor in (*frozen, *quantize.quantisation_state(module), *module.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def locate_base(path: str, revision: str | None) -> Path:
    """The local folder of a model: itself, or the hub snapshot (downloaded if need be).

    Raises:
        ConfigError: no such folder or hub repository, no network, or no safetensors weights.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if path.startswith((".", "/", "~")):
            raise ConfigError(f"model.path: folder not found: {path}", remedy="give a model folder or a hub id")
        folder = _snapshot(path, revision)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model.path: {path} has no config.json", remedy="give a Hugging Face model folder")
    if not list(folder.glob(_WEIGHTS)):
        pickled = any(list(folder.glob(pattern)) for pattern in _PICKLES)
        why = "only pickled weights, which are never opened" if pickled else "no weights"
        raise ConfigError(f"model.path: {path} has {why}", remedy=f"give a folder with {_WEIGHTS}")
    return folder


def weights_sha256(folder: Path) -> str:
    """One sha256 for the safetensors files of a folder: over each file's name and sha256, by name."""
    files = sorted(folder.glob(_WEIGHTS))
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing releases the interpreter lock
        digests = list(pool.map(_file_sha256, files))
    lines = "".join(f"{digest}  {file.name}\n" for file, digest in zip(files, digests, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()


def build_config(values: dict[str, Any], vocab_size: int | None) -> Any:
    """A transformers config from the recipe's `model.config`; dropouts it does not name are off.

    Raises:
        ConfigError: an unknown model_type, an unknown key, or a value its config refuses.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = values["model_type"]
    if kind not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(kind), list(CONFIG_MAPPING.keys()), n=1)
        raise ConfigError(
            f"model.config: unknown model_type {kind!r}", remedy=f"did you mean {near[0]}?" if near else None
        )
    config_class = CONFIG_MAPPING[kind]
    known = {f.name for f in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    known |= {"model_type", "architectures", "rope_theta", "rope_scaling"}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=1)
            raise ConfigError(
                f"model.config: {kind} has no key {key!r}", remedy=f"did you mean {near[0]}?" if near else None
            )
    given = {key: value for key, value in values.items() if key not in ("model_type", "architectures")}
    if vocab_size is not None:
        given.setdefault("vocab_size", vocab_size)
    try:
        hf_config = AutoConfig.for_model(kind, **given)
    except Exception as error:  # transformers raises its own validation errors here
        raise ConfigError(f"model.config: {_one_line(error)}") from error
    _switch_off_dropout(hf_config, keep=set(given))
    return hf_config


def _base(config: RunConfig, vocab_size: int | None, device: torch.device) -> tuple[Any, dict[str, Any]]:
    trains_in_full = config.adapter.kind == "none"
    dtype = torch.float32 if trains_in_full else WEIGHTS_DTYPE[config.model.compute_dtype]
    if config.model.config is not None:
        return _from_scratch(config.model.config, config.seed, dtype, vocab_size)
    return _from_folder(config.model, dtype, device)


def _from_scratch(
    values: dict[str, Any], seed: int, dtype: torch.dtype, vocab_size: int | None
) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    hf_config = build_config(values, vocab_size)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(hf_config, dtype=dtype, trust_remote_code=False)
    except ValueError as error:
        raise ConfigError(f"model.config: {_one_line(error)}") from error
    model.config.architectures = [type(model).__name__]
    given = {"config": values, "seed": seed, "vocab_size": hf_config.vocab_size}
    digest = hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()
    identity = {"path": None, "revision": None, "sha256": digest, "from_scratch": {"config": values, "seed": seed}}
    return model, identity | _description(model.config)


def _from_folder(chosen: ModelConfig, dtype: torch.dtype, device: torch.device) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    assert chosen.path is not None
    folder = locate_base(chosen.path, chosen.revision)
    logging.disable_progress_bar()  # one bar per rank says nothing
    try:
        hf_config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        _switch_off_dropout(hf_config, keep=set())
        if getattr(hf_config, "quantization_config", None) is not None:
            raise ConfigError(
                f"model.path: {chosen.path} holds quantised weights (quantization_config in its config.json)",
                remedy="give the unquantised model; model.weights: nf4 quantises it while loading",
            )
        if chosen.weights == "nf4":
            model = quantize.load_nf4(folder, hf_config, device)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                folder, config=hf_config, dtype=dtype, use_safetensors=True, trust_remote_code=False
            )
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        raise ConfigError(f"model.path: {chosen.path} cannot be loaded: {_one_line(error)}") from error
    # a hub snapshot lies in a folder named after its commit
    revision = folder.name if folder.parent.name == "snapshots" else chosen.revision
    identity = {"path": chosen.path, "revision": revision, "sha256": weights_sha256(folder)}
    if chosen.weights == "nf4":
        identity |= quantize.IDENTITY
    return model, identity | _description(model.config)


def _description(hf_config: Any) -> dict[str, Any]:
    return {
        "model_type": hf_config.model_type,
        "architectures": list(hf_config.architectures or []),
        "vocab_size": hf_config.vocab_size,
        "config": {key: value for key, value in hf_config.to_diff_dict().items() if key != "quantization_config"},
    }


def _make_trainable(config: RunConfig, model: Any, parts: Parts) -> tuple[nn.Module, dict[str, Any] | None]:
    if config.adapter.kind == "none":
        return model.requires_grad_(True), None
    adapted = apply_lora(
        model,
        config.adapter,
        head=parts.head,
        embeddings=parts.embeddings,
        train=config.embeddings.train,
        base_path=config.model.path,
        revision=config.model.revision,
        seed=config.seed,
    )
    return adapted.model, adapted.adapter_config


def _check_sizes(config: RunConfig, parts: Parts, vocab_size: int | None) -> None:
    rows = parts.embeddings.num_embeddings
    if vocab_size is not None and vocab_size > rows:
        raise ConfigError(
            f"the tokenizer has {vocab_size} tokens, the model's embedding {rows} rows",
            remedy="use the model's own tokenizer (data.tokenizer)",
        )
    if parts.max_positions is not None and config.data.seq_len > parts.max_positions:
        raise ConfigError(
            f"data.seq_len {config.data.seq_len} exceeds the model's {parts.max_positions} positions",
            remedy=f"use at most {parts.max_positions}",
        )


def _switch_off_dropout(hf_config: Any, keep: set[str]) -> None:
    """CPT sees most tokens once, and a resume is exact only without dropout; on only where asked for."""
    for key, value in hf_config.to_dict().items():
        if key.endswith(("dropout", "pdrop", "drop")) and isinstance(value, float) and key not in keep:
            setattr(hf_config, key, 0.0)


def _snapshot(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = [_WEIGHTS, "*.json", "*.txt", "*.jinja", "tokenizer.model"]
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"model.path: {repository} is no folder and cannot be fetched from the hub: {_one_line(error)}",
            remedy="give a local model folder, or check the name and the network",
        ) from error


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _name_of(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, candidate in model.named_modules() if candidate is module)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."
