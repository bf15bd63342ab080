"""From a recipe to the module that trains: the base, its adapter, what trains, and what identifies it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_cpt.adapters.language_model import is_multimodal, outside
from dist_cpt.adapters.lora import apply_lora, left_out
from dist_cpt.adapters.peft_folder import BASE_PREFIX, canonical_name, write_adapter_config
from dist_cpt.adapters.placeholders import moved
from dist_cpt.adapters.quantize import is_dequantised
from dist_cpt.adapters.vocabulary import NewVocabulary, extend_vocabulary, train_new_rows_only, untie, with_rows
from dist_cpt.config.adapter_settings import VOCABULARY_NAMES
from dist_cpt.config.schema import RunConfig
from dist_cpt.errors import ConfigError
from dist_cpt.model.architectures import TESTED, TRY_ANOTHER, Parts, check_config, one_line, parts_of
from dist_cpt.model.attention import choose, install
from dist_cpt.model.base_model import WEIGHTS_DTYPE, check_base, describe, load_base, model_class, open_base
from dist_cpt.model.base_weights import BaseWeights, Source, UnreadBase
from dist_cpt.model.classify import HEAD, ClassHead, as_classifier, write_labels
from dist_cpt.model.context_parallel import check_context_parallel
from dist_cpt.model.continue_from import PriorInUse, ProbeBlock, use_prior_adapter
from dist_cpt.model.fuse import Fusion, fuse
from dist_cpt.model.loss import CausalLMForLoss, install_loss_head, install_low_rank_head
from dist_cpt.model.rope import require_length, require_plain_rope, rope_record
from dist_cpt.model.routing import watch_routers
from dist_cpt.model.self_check import (
    kinds_of_layers,
    one_layer,
    self_check_attention,
    self_check_fp8,
    self_check_fusion,
    self_check_packing,
)
from dist_cpt.plan.loading import why_whole
from dist_cpt.runtime.log import LOGGER


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
    left_out: dict[str, int]  # matrices of the layers that all-linear does not reach -> their parameters
    prior: PriorInUse | None = None  # the prior adapter under the one that trains
    unread: UnreadBase | None = None  # what an engine has to read into the module's placeholders; None: nothing
    buffers: Mapping[str, torch.Tensor] = field(default_factory=dict)  # persistent ones of a full-parameter model, CPU

    @property
    def class_head(self) -> ClassHead | None:
        """The head of task classify."""
        head = getattr(self.module.hf_model, HEAD, None)
        return head if isinstance(head, ClassHead) else None

    @property
    def aliases(self) -> dict[str, str]:
        """{second key: name} of tied matrices in an adapter file: PEFT restores a tie only if it finds both keys."""
        tied = {alias: name for name, alias in self.ties if name in self.trainable}
        return tied if self.adapter_config is not None else {}

    def write_config(self, folder: str | Path) -> None:
        """Write what other programs need to open the trainable tensors: adapter_config.json, or config.json and
        generation_config.json of a full-parameter model."""
        if self.adapter_config is not None:
            write_adapter_config(folder, self.adapter_config)
            if self.class_head is not None:  # a full model has them in its config.json
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
    vocabulary: NewVocabulary | None = None,
    probe: Sequence[ProbeBlock] | None = None,
    base_sha256: str | None = None,
    by_slices: bool = False,
) -> TrainableModel:
    """Load or initialise the recipe's model, apply its adapter and move it to `device`.

    With `by_slices` the base is left for the engine to read (`TrainableModel.unread`).

    The frozen base is stored in `model.weights`, every trainable tensor in fp32. `vocabulary` has the tokens of
    `embeddings.new_tokens`. On `probe` blocks the effect of a folded or stacked prior adapter is measured.

    Raises:
        ConfigError: no such model, no safetensors weights, an unknown architecture or config key, too few
            positions, nothing to untie, or adapter targets that do not exist.
        MissingExtraError: weights are nf4 or int8 and bitsandbytes is not installed.
    """
    if config.adapter.continue_from is not None and config.model.rope_scaling is None:
        require_plain_rope(Path(config.adapter.continue_from.path))
    weights = None
    if by_slices:
        model, identity, weights = open_base(config, device, base_sha256)
    else:
        model, identity = load_base(config, device, base_sha256)
    parts, changed = _prepare_base(config, model, vocabulary)
    identity |= changed
    sources = {} if weights is None else _sources(model, parts, vocabulary, weights)
    routing = watch_routers(model, config)
    dtype = WEIGHTS_DTYPE[config.model.compute_dtype]
    context_parallel = config.engine.context_parallel
    check_context_parallel(model.config.get_text_config(), context_parallel)
    attention = choose(device, model.config.get_text_config(), config.model.attention, dtype, context_parallel)
    prior = None
    if config.adapter.continue_from is not None and config.adapter.continue_from.mode != "train":
        install(model, attention)
        prior = use_prior_adapter(CausalLMForLoss(model, attention).to(device), config, identity, probe)
        identity |= prior.identity(identity)
    if vocabulary is not None:
        _require_saved_rows(config, model, parts, prior)
    if config.classify is not None:
        model, parts = as_classifier(model, parts, config.classify, config.seed)
    head_name, embeddings_name = (_name_of(model, m) for m in (parts.head, parts.embeddings))
    if config.embeddings.train or config.adapter.kind == "none":
        _require_known_names(model.config.model_type, head_name, embeddings_name)
    install(model, attention)
    if prior is not None and config.classify is not None:
        prior = prior.with_class_loss(CausalLMForLoss(model, attention).to(device), probe)
    causal_lm, adapter_config = _under_adapter(config, model, parts, prior, vocabulary)
    for parent, name in outside(model):
        setattr(parent, name, None)  # after the adapter, whose names must not match anything in it
    fusion = fuse(model, parts, config.model.kernels, device)
    module = CausalLMForLoss(causal_lm, attention)
    module._apply(lambda tensor: moved(tensor, device))
    unread = None if weights is None else UnreadBase(weights, _by_path(module, sources))
    _self_check(module, parts, fusion, dtype, unread)
    module.routing = routing
    prefix = BASE_PREFIX if adapter_config is not None else ""
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
        left_out=left_out(parts.layers) if adapter_config and config.adapter.targets == "all-linear" else {},
        prior=prior,
        unread=unread,
        buffers={} if adapter_config is not None else _persistent_buffers(model),
    )


def _persistent_buffers(model: Any) -> dict[str, torch.Tensor]:
    """Copies by name: transformers fills what a checkpoint lacks with whatever is in memory."""
    saved = model.state_dict()
    return {name: buffer.cpu().clone() for name, buffer in model.named_buffers() if name in saved}


def _self_check(
    module: CausalLMForLoss, parts: Parts, fusion: Fusion, dtype: torch.dtype, unread: UnreadBase | None
) -> None:
    """On a GPU the attention, and fused modules anywhere; of an unread base one layer of each kind, alone."""
    on_gpu = next(module.parameters()).device.type == "cuda"
    if not (on_gpu or fusion.swapped):
        return
    if on_gpu:
        self_check_fp8(module)
    layers = [None] if unread is None else kinds_of_layers(module.hf_model.config)
    for number in layers:
        with nullcontext() if number is None or unread is None else one_layer(module, parts.layers, number, unread):
            if on_gpu:
                self_check_attention(module, dtype)
            if fusion.swapped:
                self_check_fusion(module, fusion.swapped, dtype)


def why_base_is_whole(config: RunConfig, engine: str) -> str | None:
    """`why_whole`, or an architecture that is checked with all of its weights.

    Raises:
        ConfigError: as `check_base`.
    """
    reason = why_whole(config, engine)
    if reason is None:
        known = model_class(config.model)
        if known is None or known.config_class.model_type not in TESTED:
            reason = "its architecture is not a tested one"
        elif config.model.path is not None and is_dequantised(check_base(config.model)[0]):
            reason = "its weights are dequantised while they are read"
    return reason


def _by_path(module: nn.Module, sources: Mapping[int, Source]) -> dict[str, Source]:
    """The sources of the parameters that `module` still has, by path."""
    return {path: sources[id(p)] for path, p in module.named_parameters() if id(p) in sources}


def _sources(model: Any, parts: Parts, vocabulary: NewVocabulary | None, weights: BaseWeights) -> dict[int, Source]:
    """What each parameter of the base is made of, by its id: the weight with its name, an untied head that of the
    embeddings; with the rows of `vocabulary`."""
    sources = {}
    for name, parameter in model.named_parameters():
        change = None
        if vocabulary is not None and (parameter is parts.embeddings.weight or parameter is parts.head.weight):
            change = partial(with_rows, new=vocabulary, rows=len(parameter))
        sources[id(parameter)] = Source(weights.stored_name(name), parameter.dtype, change)
    return sources


def _prepare_base(config: RunConfig, model: Any, vocabulary: NewVocabulary | None) -> tuple[Parts, dict[str, Any]]:
    """Its vocabulary and its loss head as the recipe says: (its parts, the changed keys of its identity)."""
    with one_line(f"model type {model.config.model_type}: its parts are not found", remedy=TRY_ANOTHER):
        check_config(model.config)
        parts = parts_of(model)
    if is_multimodal(model.config):
        _require_text_training(config, model.config.model_type)
    identity = _change_vocabulary(config, model, vocabulary)
    if parts.max_positions is not None and config.data.seq_len > parts.max_positions:
        raise ConfigError(
            f"data.seq_len {config.data.seq_len} exceeds the model's {parts.max_positions} positions",
            remedy=f"use at most {parts.max_positions}",
        )
    if config.model.rope_scaling is not None:
        require_length(model.config.get_text_config(), config.model.rope_scaling, config.data.seq_len)
    install_loss_head(parts.head, model.config, use_reference=config.model.kernels == "reference")
    if model.config.model_type not in TESTED:
        with one_line(f"model type {model.config.model_type} cannot run on packed documents", remedy=TRY_ANOTHER):
            self_check_packing(model)
    return parts, identity


def _require_text_training(config: RunConfig, kind: str) -> None:
    """Refuse what would need the parts of a multimodal model that are not in memory while its text model trains.

    Raises:
        ConfigError: full parameters or a classifier.
    """
    if config.adapter.kind == "none":
        raise ConfigError(
            f"adapter.kind: none: {kind} is multimodal, and checkpoints of all its parameters are not implemented",
            remedy="use adapter.kind: lora, with embeddings.train for the vocabulary matrices",
        )
    if config.task == "classify":
        raise ConfigError(f"task: classify: {kind} is multimodal", remedy="use a text model")


def _under_adapter(
    config: RunConfig, model: Any, parts: Parts, prior: PriorInUse | None, vocabulary: NewVocabulary | None
) -> tuple[Any, dict[str, Any] | None]:
    """(what trains: `model` itself or under the recipe's adapter, its adapter_config.json)."""
    if config.adapter.kind == "none":
        causal_lm, adapter_config = model.requires_grad_(True), None
    else:
        causal_lm, adapter_config = apply_lora(model, config, head=parts.head, embeddings=parts.embeddings)
        install_low_rank_head(model.get_output_embeddings())
        if prior is not None:
            prior.complete(causal_lm, WEIGHTS_DTYPE[config.model.compute_dtype])
            adapter_config |= prior.adapter_config(config.model.path)
        if config.model.rope_scaling is not None:
            adapter_config |= rope_record(adapter_config, config.model)
    if vocabulary is not None and config.embeddings.rows == "new":
        matrices = (parts.embeddings,) if config.classify is not None else (parts.embeddings, parts.head)
        train_new_rows_only(matrices, vocabulary.first_row)
    return causal_lm, adapter_config


def _change_vocabulary(config: RunConfig, model: Any, vocabulary: NewVocabulary | None) -> dict[str, Any]:
    """Untie and extend as the recipe says; returns the changed keys of the base's identity."""
    assert (vocabulary is None) == (config.embeddings.new_tokens is None)
    prior = config.adapter.continue_from  # whose matrices are apart on every base that does not tie them
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if config.embeddings.tie == "untie" and (prior is None or tied):
        untie(model)
        if prior is not None:
            LOGGER.info("embeddings.tie: untie: %s trained embedding and head apart, this base ties them", prior.path)
    if vocabulary is None:
        return describe(model.config)
    extend_vocabulary(model, vocabulary, config.embeddings.pad_rows_to)
    new = {"tokenizer_sha256": vocabulary.tokenizer_sha256, "first_row": vocabulary.first_row}
    new |= {"count": len(vocabulary.pieces), "init": config.embeddings.init}
    if vocabulary.mixtures_sha256 is not None:
        new |= {"mixtures": len(vocabulary.mixtures), "mixtures_sha256": vocabulary.mixtures_sha256}
    return describe(model.config) | {"new_tokens": new}


def _require_known_names(kind: str, *names: str) -> None:
    """Refuse vocabulary matrices that `param_groups` would not recognise by name.

    Raises:
        ConfigError: names the first.
    """
    for name in names:
        if name.rpartition(".")[2] not in (*VOCABULARY_NAMES, HEAD):
            raise ConfigError(
                f"model type {kind} has a vocabulary matrix with the unknown name {name}",
                remedy="use adapter.kind: lora without embeddings.train",
            )


def _require_saved_rows(config: RunConfig, model: Any, parts: Parts, prior: PriorInUse | None) -> None:
    """Refuse new rows that neither this run nor the prior adapter trains: no file would contain them.

    Raises:
        ConfigError: names the matrices.
    """
    if config.adapter.kind == "none":
        return
    saved = set(config.embeddings.train) | (set() if prior is None else prior.adapter.trained_vocabulary(model))
    lost = {"embed_tokens", "lm_head"} - ({"lm_head"} if config.task == "classify" else set()) - saved
    tied = parts.head.weight is parts.embeddings.weight
    if lost and not (tied and saved):
        raise ConfigError(
            f"embeddings.new_tokens: neither this run nor the prior adapter trains {', '.join(sorted(lost))}",
            remedy="name it in embeddings.train: otherwise no file contains the new rows",
        )


def _name_of(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, candidate in model.named_modules() if candidate is module)
