"""From a recipe to the module that trains: the base, its adapter, what trains, and what identifies it."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_cpt.adapters import quantize
from dist_cpt.adapters.lora import VOCABULARY_NAMES, adapter_aliases, apply_lora, canonical_name, write_adapter_config
from dist_cpt.adapters.vocabulary import NewVocabulary, extend_vocabulary, train_new_rows_only, untie
from dist_cpt.config.schema import ModelConfig, RunConfig
from dist_cpt.errors import ConfigError
from dist_cpt.model.architectures import TESTED, Parts, check_config, parts_of
from dist_cpt.model.attention import choose, install
from dist_cpt.model.classify import HEAD, ClassHead, as_classifier, write_labels
from dist_cpt.model.continue_from import ProbeBlock, Standing, stand_on
from dist_cpt.model.fuse import Fusion, fuse
from dist_cpt.model.loss import CausalLMForLoss, install_loss_head, install_low_rank_head
from dist_cpt.model.safety_checks import code_sha256s, require_code_consent
from dist_cpt.model.self_check import self_check_attention, self_check_fusion, self_check_packing

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
    standing: Standing | None = None  # the earlier adapter under the one that trains

    @property
    def class_head(self) -> ClassHead | None:
        """The head of task classify."""
        head = getattr(self.module.hf_model, HEAD, None)
        return head if isinstance(head, ClassHead) else None

    @property
    def aliases(self) -> dict[str, str]:
        """Second keys that a checkpoint's adapter file needs for tied matrices: {alias: name}."""
        return adapter_aliases(self.trainable, self.ties) if self.adapter_config is not None else {}

    def write_config(self, folder: str | Path) -> None:
        """Write what makes a folder with the trainable tensors open elsewhere: adapter_config.json, or
        config.json and generation_config.json of a full-parameter model."""
        if self.adapter_config is not None:
            write_adapter_config(folder, self.adapter_config)
            if self.class_head is not None:  # a full model's are in its config.json
                write_labels(folder, self.hf_config)
            return
        self.hf_config.save_pretrained(folder)
        generation_config = getattr(self.module.hf_model, "generation_config", None)
        if generation_config is not None:
            generation_config.save_pretrained(folder)


def load_model(
    config: RunConfig,
    *,
    device: torch.device,
    vocab_size: int | None = None,
    vocabulary: NewVocabulary | None = None,
    probe: Sequence[ProbeBlock] | None = None,
) -> TrainableModel:
    """Load or initialise the recipe's model, apply its adapter and move it to `device`.

    The frozen base is stored in `model.weights`, every trainable tensor in fp32. `vocab_size` is the
    tokenizer's; a model from scratch takes it where its config names none. `vocabulary` is what
    `embeddings.new_tokens` adds, for which the base gets rows before anything else is done with it.
    With `probe` blocks, an earlier adapter that is folded or stacked is shown to be in effect on them.

    Raises:
        ConfigError: no such model, no safetensors weights, an unknown architecture or config key, too small
            a vocabulary, too few positions, nothing to untie, or adapter targets that do not exist.
        MissingExtraError: weights are nf4 or int8 and bitsandbytes is not installed.
    """
    model, identity = _base(config, vocab_size, device)
    check_config(model.config)
    parts = parts_of(model)
    identity |= _change_vocabulary(config, model, vocabulary)
    _check_sizes(config, parts, vocab_size)
    softcap = getattr(model.config, "final_logit_softcapping", None)
    install_loss_head(parts.head, use_reference=config.model.kernels == "reference", softcap=softcap)
    if model.config.model_type not in TESTED:
        self_check_packing(model)
    dtype = WEIGHTS_DTYPE[config.model.compute_dtype]
    choice = choose(device, model.config, config.model.attention, dtype)
    standing = None
    chosen = config.adapter.continue_from
    if chosen is not None and chosen.mode != "train":
        install(model, choice)
        bare = CausalLMForLoss(model, choice).to(device)
        standing = stand_on(bare, config, chosen, identity, probe)
        identity |= standing.identity(identity)
    if vocabulary is not None:
        _require_saved_rows(config, model, parts, standing)
    if config.classify is not None:
        model, parts = as_classifier(model, parts, config.classify, config.seed)
    head_name, embeddings_name = (_name_of(model, m) for m in (parts.head, parts.embeddings))
    if config.embeddings.train or config.adapter.kind == "none":
        _require_known_names(model.config.model_type, head_name, embeddings_name)
    install(model, choice)
    if standing is not None and config.classify is not None:
        standing = standing.under_classes(CausalLMForLoss(model, choice).to(device), probe)
    causal_lm, adapter_config = _make_trainable(config, model, parts)
    if standing is not None and adapter_config is not None:
        standing.finish(causal_lm, dtype)
        adapter_config |= standing.note(config.model.path)
    if vocabulary is not None and config.embeddings.rows == "new":
        matrices = (parts.embeddings,) if config.classify is not None else (parts.embeddings, parts.head)
        train_new_rows_only(matrices, vocabulary.first_row)
    fusion = fuse(model, parts, config.model.kernels, device)
    module = CausalLMForLoss(causal_lm, choice).to(device)
    if device.type == "cuda":
        self_check_attention(module, dtype)
    if fusion.swapped:
        self_check_fusion(module, fusion.swapped, dtype)
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
        standing=standing,
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


def locate_base(path: str, revision: str | None, *, own_code: bool = False) -> Path:
    """The local folder of a model: itself, or the hub snapshot (downloaded if need be), with its code if wanted.

    Raises:
        ConfigError: no such folder or hub repository, no network, or no safetensors weights.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if path.startswith((".", "/", "~")):
            raise ConfigError(f"model.path: folder not found: {path}", remedy="give a model folder or a hub id")
        folder = _snapshot(path, revision, own_code)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model.path: {path} has no config.json", remedy="give a Hugging Face model folder")
    if not list(folder.glob(_WEIGHTS)):
        pickled = any(list(folder.glob(pattern)) for pattern in _PICKLES)
        why = "only pickled weights, which are never opened" if pickled else "no weights"
        raise ConfigError(f"model.path: {path} has {why}", remedy=f"give a folder with {_WEIGHTS}")
    return folder


def check_base(chosen: ModelConfig) -> tuple[Path, bool, str | None]:
    """(folder, whether its own code runs, how its weights are quantised already) of a base that the recipe may use.

    Raises:
        ConfigError: as `locate_base`; code that must not run; weights quantised otherwise than model.weights says.
    """
    assert chosen.path is not None
    folder = locate_base(chosen.path, chosen.revision, own_code=chosen.trust_remote_code)
    own_code, stored = require_code_consent(folder, chosen), quantize.stored_weights(folder)
    if stored not in (None, chosen.weights):
        raise ConfigError(
            f"model.path: {chosen.path} holds {stored} weights, not {chosen.weights}",
            remedy=f"set model.weights: {stored}, or give the unquantised model",
        )
    return folder, own_code, stored


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
    folder, own_code, stored = check_base(chosen)
    logging.disable_progress_bar()  # one bar per rank says nothing
    try:
        hf_config = AutoConfig.from_pretrained(folder, trust_remote_code=own_code)
        _switch_off_dropout(hf_config, keep=set())
        if chosen.weights in quantize.QUANTISED:
            model = quantize.load_quantised(folder, hf_config, device, chosen.weights, own_code=own_code)
        else:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=hf_config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=own_code,
                output_loading_info=True,
            )
            model = quantize.whole_model(folder, *loaded)
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        raise ConfigError(f"model.path: {chosen.path} cannot be loaded: {_one_line(error)}") from error
    # a hub snapshot lies in a folder named after its commit
    revision = folder.name if folder.parent.name == "snapshots" else chosen.revision
    identity = {"path": chosen.path, "revision": revision, "sha256": weights_sha256(folder)}
    if chosen.weights in quantize.QUANTISED:
        identity |= quantize.identity_of(model, chosen.weights, stored is not None)
    if own_code:
        identity["code"] = code_sha256s(folder)
    return model, identity | _description(model.config)


def _change_vocabulary(config: RunConfig, model: Any, vocabulary: NewVocabulary | None) -> dict[str, Any]:
    """Untie and extend as the recipe says; what that changes of the base's identity."""
    assert (vocabulary is None) == (config.embeddings.new_tokens is None), "new_tokens and vocabulary come together"
    if config.embeddings.tie == "untie":
        untie(model)
    if vocabulary is None:
        return _description(model.config)
    extend_vocabulary(model, vocabulary, config.embeddings.pad_rows_to)
    new = {"tokenizer_sha256": vocabulary.tokenizer_sha256, "first_row": vocabulary.first_row}
    new |= {"count": len(vocabulary.pieces), "init": config.embeddings.init}
    if vocabulary.mixtures_sha256 is not None:
        new |= {"mixtures": len(vocabulary.mixtures), "mixtures_sha256": vocabulary.mixtures_sha256}
    return _description(model.config) | {"new_tokens": new}


def _require_known_names(kind: str, *names: str) -> None:
    """Refuse matrices that would train at the learning rate and decay of all others.

    Raises:
        ConfigError: names the first.
    """
    for name in names:
        if name.rpartition(".")[2] not in (*VOCABULARY_NAMES, HEAD):
            raise ConfigError(
                f"model type {kind} calls a vocabulary matrix {name}, which is not known as one",
                remedy="use adapter.kind: lora without embeddings.train",
            )


def _require_saved_rows(config: RunConfig, model: Any, parts: Parts, standing: Standing | None) -> None:
    """Refuse new rows that neither this run trains nor the adapter it stands on: they would be in no file.

    Raises:
        ConfigError: there are such.
    """
    if config.adapter.kind == "none":
        return
    saved = set(config.embeddings.train) | (set() if standing is None else standing.earlier.words(model).keys())
    lost = {"embed_tokens", "lm_head"} - ({"lm_head"} if config.task == "classify" else set()) - saved
    tied = parts.head.weight is parts.embeddings.weight
    if lost and not (tied and saved):
        raise ConfigError(
            f"embeddings.new_tokens: neither this run nor the adapter it stands on trains {', '.join(sorted(lost))}",
            remedy="name it in embeddings.train: else no file holds the new rows",
        )


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
        classifies=config.classify is not None,
        low_rank_vocabulary=config.embeddings.kind == "lora",
    )
    install_low_rank_head(model.get_output_embeddings())
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


def _snapshot(repository: str, revision: str | None, own_code: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = [_WEIGHTS, "*.json", "*.txt", "*.jinja", "tokenizer.model"] + ["*.py"] * own_code
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
