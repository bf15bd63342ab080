"""A prior adapter under a new one: opened by name, then folded into the base, or stacked under the new one, frozen.

All of it happens before an engine shards the model. Folding depends on the base, the adapter file and the dtype of the
weights alone, so a resume folds to the same bits.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dist_cpt.adapters.lora import import_peft, is_linear
from dist_cpt.adapters.peft_folder import (
    BASE_PREFIX,
    PRIOR_KEY,
    ROPE_KEY,
    canonical_key,
    copy_whole_tensors,
    file_sha256,
    manifest_content,
    read_adapter_config,
    read_tensor,
    refusal,
    require_adapter_folder,
    tensor_shapes,
    whole_matrices,
)
from dist_cpt.adapters.quantize import is_quantised, read_weight, write_weight
from dist_cpt.errors import CheckpointError
from dist_cpt.run_folder.names import ADAPTER_WEIGHTS, MANIFEST

MERGE_FIRST = "merge that adapter into the base and start from the merged model (model.path)"
_PEFT_NAME = "prior"  # of PEFT's second adapter
_OTHER_BASE = "use the base that the adapter was trained on"

# Keys of adapter_config.json that do not change what the adapter computes, given its tensors' names and shapes.
_FREE_KEYS = {
    *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_version"),
    *("peft_type", "r", "lora_alpha", "use_rslora", "lora_dropout", "modules_to_save", "ensure_weight_tying"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("megatron_config", "megatron_core", "qalora_group_size", "fan_in_fan_out", PRIOR_KEY),
    ROPE_KEY,  # a context grows in stages
}
_INITS_THAT_KEEP_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")  # the others change its weights


@dataclass(frozen=True)
class PriorAdapter:
    """An opened PEFT folder of plain LoRA. Tensors are read when they are needed."""

    folder: Path
    config: Mapping[str, Any]
    sha256: str  # of its safetensors file
    lora: Mapping[str, tuple[str, str]]  # module of the base -> keys of A and B
    vocabulary: Mapping[str, str]  # module of the base -> key of its matrix, trained in full
    shapes: Mapping[str, tuple[int, ...]]  # by key

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the sum of base and adapter: the file, and the numbers that scale it."""
        return {"adapter_sha256": self.sha256} | {
            key: self.config.get(key) for key in ("r", "lora_alpha", "use_rslora")
        }

    def scale(self, rank: int) -> float:
        """alpha / rank; rank-stabilised alpha / sqrt(rank)."""
        return float(self.config["lora_alpha"]) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def pair(self, module: str, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor, float]:
        """A [r, in] and B [out, r] of a module in fp32, and the factor of B A."""
        a, b = (read_tensor(self.folder, key, device) for key in self.lora[module])
        return a, b, self.scale(len(a))

    def require_fit(self, model: Any) -> None:
        """Refuse an adapter whose modules or shapes differ from `model`'s.

        Raises:
            ConfigError: another base or vocabulary, LoRA on the head, or a tied pair that was trained apart.
        """
        modules: dict[str, Any] = dict(model.named_modules())
        head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
        for name, (key_a, key_b) in self.lora.items():
            layer = modules.get(name)
            if layer is None or not (is_linear(layer) or is_quantised(layer)):
                raise refusal(self.folder, f"has LoRA on {name}, which is not a linear layer of this base", _OTHER_BASE)
            if layer is head:
                raise refusal(self.folder, f"has LoRA on the output head {name}", MERGE_FIRST)
            (rank, columns), (rows, rank_b) = self.shapes[key_a], self.shapes[key_b]
            if (rows, columns, rank_b) != (*_size(layer), rank):
                problem = f"has {name} of shape [{rows}, {columns}] (rank {rank}), here {list(_size(layer))}"
                raise refusal(self.folder, problem, _OTHER_BASE)
        for name, key in self.vocabulary.items():
            layer = modules.get(name)
            if layer is None or (layer is not head and layer is not embeddings):
                classifier = "continue that classifier: adapter.continue_from.mode: train"
                problem = f"has {name} trained in full, which is neither embedding nor head here"
                raise refusal(self.folder, problem, classifier if name == "score" else MERGE_FIRST)
            theirs, here = self.shapes[key], tuple(layer.weight.shape)
            if theirs != here:
                problem = f"has {name} of shape {list(theirs)}, here {list(here)}"
                if theirs[1:] == here[1:]:
                    problem = f"has a vocabulary of {theirs[0]}, here {here[0]}: it {problem}"
                raise refusal(self.folder, problem, "use the base and tokenizer that the adapter was trained on")
        if head.weight is embeddings.weight and self.vocabulary:
            keys = list(self.vocabulary.values())
            if len(keys) == 1 or not torch.equal(*(read_tensor(self.folder, key) for key in keys)):
                problem = "trained embedding and head apart, but this base ties them"
                raise refusal(self.folder, problem, "set embeddings.tie: untie, or leave it out")

    def trained_vocabulary(self, model: Any) -> set[str]:
        """`embed_tokens`, `lm_head`: the matrices it trained in full, as the recipe names them."""
        modules, head = dict(model.named_modules()), model.get_output_embeddings()
        return {"lm_head" if modules[name] is head else "embed_tokens" for name in self.vocabulary}

    def copy_vocabulary(self, model: Any) -> None:
        """Set the embedding and the head to the adapter's, in the dtype stored there."""
        copy_whole_tensors(self.folder, model, {f"{name}.weight": key for name, key in self.vocabulary.items()})

    @contextlib.contextmanager
    def beside(self, model: Any) -> Iterator[None]:
        """Inside the context every target adds scale x B A x to its output, as under PEFT; no weight is rounded."""
        handles = []
        try:
            for name in self.lora:
                layer = model.get_submodule(name)
                handles.append(layer.register_forward_hook(_adding(*self.pair(name, layer.weight.device))))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def fold(self, model: Any) -> None:
        """W + scale x B A in fp32 for every target, then rounded or quantised as the layer stores it."""
        for name in self.lora:
            layer = model.get_submodule(name)
            a, b, scale = self.pair(name, layer.weight.device)
            write_weight(layer, read_weight(layer).addmm_(b, a, alpha=scale))

    @torch.no_grad()
    def stack(self, peft_model: Any, dtype: torch.dtype) -> None:
        """Add it to `peft_model` as a second adapter: active, frozen, in the compute dtype `dtype`."""
        peft = import_peft()
        config = peft.LoraConfig(
            r=max(self.shapes[key_a][0] for key_a, _ in self.lora.values()),
            lora_alpha=self.config["lora_alpha"],
            use_rslora=bool(self.config.get("use_rslora")),
            target_modules=sorted(self.lora),
            fan_in_fan_out=bool(self.config.get("fan_in_fan_out")),
            init_lora_weights=False,
            task_type=peft.TaskType.CAUSAL_LM,
        )
        trainable = {parameter for parameter in peft_model.parameters() if parameter.requires_grad}
        with torch.random.fork_rng(devices=[]):
            peft_model.add_adapter(_PEFT_NAME, config)
        peft_model.base_model.set_adapter(["default", _PEFT_NAME])
        base = peft_model.get_base_model()
        for name in self.lora:
            layer = base.get_submodule(name)
            matrices = layer.lora_A[_PEFT_NAME], layer.lora_B[_PEFT_NAME]
            for matrix, values in zip(matrices, self.pair(name, matrices[0].weight.device)[:2], strict=True):
                matrix.weight = nn.Parameter(values.to(dtype))
        for parameter in peft_model.parameters():  # set_adapter makes every active adapter trainable
            parameter.requires_grad_(parameter in trainable)


def open_prior_adapter(
    folder: Path, base: Mapping[str, Any] | None = None, *, other_base: bool = False
) -> PriorAdapter:
    """Open a PEFT folder of plain LoRA.

    The file of a dist-cpt checkpoint must be the recorded one, and its base the one with the identity `base`, if given:
    the same weights, unless `other_base`, and the same new tokens.

    Raises:
        ConfigError: no such folder, pickled weights, not plain LoRA, another base or other new tokens.
        CheckpointError: one of its files is damaged.
    """
    require_adapter_folder(folder)
    config = read_adapter_config(folder)
    require_plain_lora(folder, config, import_peft().LoraConfig().to_dict())
    sha256 = file_sha256(folder / ADAPTER_WEIGHTS)
    recorded = _recorded_base(folder, sha256)
    shapes = tensor_shapes(folder)
    vocabulary = whole_matrices(shapes)
    prior = PriorAdapter(folder, config, sha256, _lora_pairs(folder, shapes, vocabulary), vocabulary, shapes)
    if recorded is not None and base is not None:
        if not other_base:
            require_same_base(folder, recorded["sha256"], base["sha256"])
        if prior.vocabulary:
            require_same_tokens(folder, recorded, base)
    return prior


def require_plain_lora(folder: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Refuse an adapter_config.json that computes something other than `ours` does.

    Raises:
        ConfigError: names the first key that differs.
    """
    if theirs.get("peft_type") != "LORA":
        raise refusal(folder, f"is of type {theirs.get('peft_type')!r}, not LORA", MERGE_FIRST)
    if theirs.get(PRIOR_KEY) is not None:
        remedy = "merge that run (dist-cpt merge) and set model.path to the result"
        raise refusal(folder, "was trained on top of another adapter, not on the base alone", remedy)
    if theirs.get("init_lora_weights") not in _INITS_THAT_KEEP_THE_BASE:
        init = f"init_lora_weights {theirs['init_lora_weights']!r}"
        raise refusal(folder, f"was initialised with {init}, which changes the base under it", MERGE_FIRST)
    for key in sorted(ours.keys() - _FREE_KEYS):
        left, right = (
            None if not config.get(key) or config[key] == "none" else config[key] for config in (theirs, ours)
        )
        if left != right:
            raise refusal(folder, f"has {key} {theirs.get(key)!r}, here {ours[key]!r}", MERGE_FIRST)


def require_same_base(folder: Path, theirs: str, here: str) -> None:
    """Refuse a checkpoint whose base had other weights than the base here.

    Raises:
        ConfigError: the sha256 differ.
    """
    if theirs != here:
        problem = f"was trained on a base with sha256 {theirs[:12]}, this one has {here[:12]}"
        raise refusal(folder, problem, f"{_OTHER_BASE}, or set adapter.continue_from.other_base: true")


def require_same_tokens(folder: Path, theirs: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse trained rows that belong to other new tokens; padded, the matrices may still have equal shapes.

    Raises:
        ConfigError: the two bases were extended by different tokenizers.
    """
    left, right = ((base.get("new_tokens") or {}).get("tokenizer_sha256", "none") for base in (theirs, here))
    if left != right:
        raise refusal(
            folder,
            f"trained its rows under the new tokens {left[:12]} (sha256 of the tokenizer), here {right[:12]}",
            f"set embeddings.new_tokens to the tokenizer in {folder}" if left != "none" else MERGE_FIRST,
        )


def _recorded_base(folder: Path, sha256: str) -> dict[str, Any] | None:
    """The base's identity in a checkpoint's manifest, which must list the adapter file with `sha256`."""
    manifest = manifest_content(folder)
    if manifest is None:
        return None
    try:
        recorded = manifest["files"][ADAPTER_WEIGHTS]["sha256"]
    except (KeyError, TypeError):
        raise CheckpointError(
            f"{folder}: {MANIFEST} is damaged", remedy="dist-cpt verify lists every problem"
        ) from None
    if recorded != sha256:
        raise CheckpointError(
            f"{folder}: {ADAPTER_WEIGHTS} is not the file that {MANIFEST} lists",
            remedy="use another checkpoint of that run",
        )
    return manifest["base"]


def _lora_pairs(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], whole: Mapping[str, str]
) -> dict[str, tuple[str, str]]:
    """Keys of A and B by module of the base; any other tensor must be one of the `whole` matrices."""
    halves: dict[str, dict[str, str]] = {"lora_A": {}, "lora_B": {}}
    for key in sorted(shapes):
        name = canonical_key(key)
        if name is None or name.removeprefix(BASE_PREFIX).removesuffix(".weight") in whole:
            continue
        module, _, half = name.removeprefix(BASE_PREFIX).removesuffix(".weight").rpartition(".")
        if half not in halves:
            raise refusal(folder, f"has {key}, which is not a matrix of plain LoRA", MERGE_FIRST)
        halves[half][module] = key
    if halves["lora_A"].keys() != halves["lora_B"].keys():
        raise CheckpointError(f"{folder}: {ADAPTER_WEIGHTS} has only one half of a LoRA pair")
    return {module: (key, halves["lora_B"][module]) for module, key in halves["lora_A"].items()}


def _adding(a: torch.Tensor, b: torch.Tensor, scale: float) -> Any:
    def hook(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        x = inputs[0]
        return output + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) * scale

    return hook


def _size(layer: Any) -> tuple[int, int]:
    """(out, in) of a linear layer, stored in any way."""
    if hasattr(layer, "in_features"):
        return layer.out_features, layer.in_features
    return layer.weight.shape[1], layer.weight.shape[0]
