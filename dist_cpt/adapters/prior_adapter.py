"""An earlier adapter under a new one: opened by name, folded into the base, or left beside the new one, frozen.

Everything happens before an engine cuts the model. Folding is a function of the base, the adapter file and the
storage of the weights, so that a resume folds the same bits again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dist_cpt.adapters.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, canonical_key, import_peft, is_linear
from dist_cpt.adapters.quantize import is_quantised, read_weight, write_weight
from dist_cpt.errors import CheckpointError, ConfigError, printable

EARLIER = "earlier"  # its name as PEFT's second adapter
STANDS_ON = "stands_on"  # key of adapter_config.json: without it the folder would look like an adapter of the base
MERGE = "merge that adapter into the base and start from the merged model (model.path)"
_PREFIX = "base_model.model."

# Keys of adapter_config.json that decide nothing about what the adapter computes beyond its tensors' names and shapes.
FREE_KEYS = {
    *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_version"),
    *("peft_type", "r", "lora_alpha", "use_rslora", "lora_dropout", "modules_to_save", "ensure_weight_tying"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("megatron_config", "megatron_core", "qalora_group_size"),
}
KEEPS_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")  # the other starts subtract from its weights


@dataclass(frozen=True)
class EarlierAdapter:
    """An opened PEFT folder. Tensors are read when they are needed."""

    folder: Path
    config: Mapping[str, Any]
    sha256: str  # of its safetensors file
    lora: Mapping[str, tuple[str, str]]  # module of the base -> keys of A and B
    vocabulary: Mapping[str, str]  # module of the base -> key of its matrix, trained in full
    shapes: Mapping[str, tuple[int, ...]]  # by key

    def read(self, key: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """A tensor as fp32 on `device`.

        Raises:
            CheckpointError: a value is not finite.
        """
        from safetensors import safe_open

        with safe_open(self.folder / ADAPTER_WEIGHTS, framework="pt", device="cpu") as file:
            values = file.get_tensor(key).float().to(device)
        if not bool(torch.isfinite(values).all()):
            raise CheckpointError(f"{self.folder}: {key} holds values that are not finite")
        return values

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the sum of base and adapter: the file, and the numbers that scale it."""
        scale = {key: self.config.get(key) for key in ("r", "lora_alpha", "use_rslora")}
        return {"adapter_sha256": self.sha256, **scale}

    def scale_of(self, rank: int) -> float:
        """alpha / rank, rank-stabilised alpha / sqrt(rank)."""
        alpha = float(self.config["lora_alpha"])
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def require_fit(self, model: Any) -> None:
        """Refuse an adapter whose modules or shapes are not those of `model`.

        Raises:
            ConfigError: another base or vocabulary, LoRA on the head, or a tied pair that was trained apart.
        """
        modules = dict(model.named_modules())
        head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
        for name, (key_a, key_b) in self.lora.items():
            layer = modules.get(name)
            if layer is None or not (is_linear(layer) or is_quantised(layer)):
                raise refusal(self.folder, f"has LoRA on {name}, which is no linear layer of this base", _OTHER_BASE)
            if layer is head:
                raise refusal(self.folder, f"has LoRA on the output head {name}", MERGE)
            (rank, columns), (rows, rank_b) = self.shapes[key_a], self.shapes[key_b]
            if (rows, columns, rank_b) != (*_size(layer), rank):
                said = f"has {name} of shape [{rows}, {columns}] (rank {rank}), here {list(_size(layer))}"
                raise refusal(self.folder, said, _OTHER_BASE)
        for name, key in self.vocabulary.items():
            layer = modules.get(name)
            if layer is None or (layer is not head and layer is not embeddings):
                remedy = "go on with that classifier: adapter.continue_from.mode: train" if name == "score" else MERGE
                raise refusal(self.folder, f"has {name} trained in full, which is no embedding or head here", remedy)
            theirs, here = self.shapes[key], tuple(layer.weight.shape)
            if theirs != here:
                said = f"has {name} of shape {list(theirs)}, here {list(here)}"
                if theirs[1:] == here[1:]:
                    said = f"has a vocabulary of {theirs[0]}, here {here[0]}: it {said}"
                raise refusal(self.folder, said, "use the base and tokenizer that the adapter was trained on")
        if head.weight is embeddings.weight and self.vocabulary:
            keys = list(self.vocabulary.values())
            if len(keys) == 1 or not torch.equal(*(self.read(key) for key in keys)):
                raise refusal(self.folder, "trained embedding and head apart, but this base ties them", MERGE)

    def words(self, model: Any) -> dict[str, str]:
        """The recipe's word for each matrix it trained in full -> that module's name."""
        modules = dict(model.named_modules())
        head = model.get_output_embeddings()
        return {"lm_head" if modules[name] is head else "embed_tokens": name for name in self.vocabulary}

    @torch.no_grad()
    def put_vocabulary(self, model: Any) -> None:
        """Set the embedding and the head to the adapter's, in whatever precision they are stored now."""
        for name, key in self.vocabulary.items():
            layer: Any = dict(model.named_modules()).get(name)
            if layer is not None:  # a classifier has dropped the head
                layer.weight.data.copy_(self.read(key, layer.weight.device))

    @contextlib.contextmanager
    def beside(self, model: Any) -> Iterator[None]:
        """Within: every target adds scale x B A x to its output, as under PEFT; nothing is rounded into the base."""
        handles = []
        try:
            for name, (key_a, key_b) in self.lora.items():
                layer = model.get_submodule(name)
                a, b = (self.read(key, layer.weight.device) for key in (key_a, key_b))
                handles.append(layer.register_forward_hook(_adding(a, b, self.scale_of(a.shape[0]))))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def fold(self, model: Any) -> None:
        """W + scale x B A in fp32 for every target, then rounded or quantised again to what the layer stores."""
        for name, (key_a, key_b) in self.lora.items():
            layer = model.get_submodule(name)
            a, b = (self.read(key, layer.weight.device) for key in (key_a, key_b))
            write_weight(layer, read_weight(layer).addmm_(b, a, alpha=self.scale_of(a.shape[0])))

    @torch.no_grad()
    def stack(self, peft_model: Any, dtype: torch.dtype) -> None:
        """Put it under `peft_model` as a second adapter: active, frozen, in `dtype`, which is what computes."""
        peft = import_peft()
        ranks = {self.shapes[key_a][0] for key_a, _ in self.lora.values()}
        config = peft.LoraConfig(
            r=max(ranks),
            lora_alpha=self.config["lora_alpha"],
            use_rslora=bool(self.config.get("use_rslora")),
            target_modules=sorted(self.lora),
            fan_in_fan_out=bool(self.config.get("fan_in_fan_out")),
            init_lora_weights=False,
            task_type=peft.TaskType.CAUSAL_LM,
        )
        trained = {parameter for parameter in peft_model.parameters() if parameter.requires_grad}
        with torch.random.fork_rng(devices=[]):
            peft_model.add_adapter(EARLIER, config)
        peft_model.base_model.set_adapter(["default", EARLIER])
        base = peft_model.get_base_model()
        for name, keys in self.lora.items():
            layer = base.get_submodule(name)
            for matrix, key in zip((layer.lora_A[EARLIER], layer.lora_B[EARLIER]), keys, strict=True):
                matrix.weight = nn.Parameter(self.read(key, matrix.weight.device).to(dtype))
        for parameter in peft_model.parameters():  # set_adapter lets whatever is active train
            parameter.requires_grad_(parameter in trained)


def open_earlier(folder: Path, base: Mapping[str, Any] | None = None, *, other_base: bool = False) -> EarlierAdapter:
    """Open a PEFT folder of plain LoRA. Where it is a checkpoint of this program, its file must be the recorded one,
    and its base that of the identity `base`, if that is given: the weights, unless `other_base`, and the new tokens.

    Raises:
        ConfigError: no such folder, pickled weights, another method than plain LoRA, another base or new tokens.
        CheckpointError: one of its files is damaged.
    """
    wrong, remedy = not_an_adapter(folder)
    if wrong and remedy:
        raise refusal(folder, wrong, remedy)
    config = _json(folder / ADAPTER_CONFIG)
    require_plain_lora(folder, config, import_peft().LoraConfig().to_dict())
    with (folder / ADAPTER_WEIGHTS).open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    theirs = _recorded_base(folder, sha256) if (folder / "manifest.json").is_file() else None
    earlier = EarlierAdapter(folder, config, sha256, *_tensors(folder))
    if theirs is not None and base is not None:
        if not other_base:
            require_same_base(folder, theirs["sha256"], base["sha256"])
        if earlier.vocabulary:
            require_same_tokens(folder, theirs, base)
    return earlier


def require_plain_lora(folder: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Refuse an adapter_config.json that asks for more, or for something else, than `ours`.

    Raises:
        ConfigError: names the first key that differs.
    """
    if theirs.get("peft_type") != "LORA":
        raise refusal(folder, f"is of type {theirs.get('peft_type')!r}, not LORA", MERGE)
    if theirs.get(STANDS_ON) is not None:
        raise refusal(
            folder, "stands on another adapter, not on the base alone", "merge that run (dist-cpt merge) and set "
            "model.path to the result"
        )  # fmt: skip
    if theirs.get("init_lora_weights") not in KEEPS_THE_BASE:
        how = f"init_lora_weights {theirs['init_lora_weights']!r}"
        raise refusal(folder, f"was started with {how}, which changes the base it belongs to", MERGE)
    for key in sorted(ours.keys() - FREE_KEYS - {STANDS_ON}):
        left, right = theirs.get(key, None) or None, ours[key] or None  # {}, False and None all ask for nothing
        if left != right and (left, right) not in ((None, "none"), ("none", None)) and key != "fan_in_fan_out":
            raise refusal(folder, f"has {key} {theirs.get(key)!r}, here {ours[key]!r}", MERGE)


def not_an_adapter(folder: Path) -> tuple[str | None, str | None]:
    """What is wrong with a folder, and what to do; (None, None) for an adapter that can be opened."""
    if not folder.is_dir():
        return "is not a folder", "give a local folder; fetch an adapter from the hub first"
    if not (folder / ADAPTER_CONFIG).is_file():
        inside = sorted([*folder.glob("checkpoints/step-????????"), *folder.glob("checkpoint-*")])
        if inside:
            return f"is a run, not one of its {len(inside)} checkpoints", f"name one, for example {inside[-1]}"
        if (folder / "config.json").is_file():
            return "holds a full model, no adapter", "use it as model.path"
        return f"has no {ADAPTER_CONFIG}", "give a folder that PEFT's save_pretrained wrote"
    if not (folder / ADAPTER_WEIGHTS).is_file():
        pickled = "only a pickled adapter_model.bin, which is never opened"
        return (
            f"has {pickled if (folder / 'adapter_model.bin').exists() else f'no {ADAPTER_WEIGHTS}'}",
            "where you trust it, load it with PEFT and write it again with save_pretrained (safetensors)",
        )
    return None, None


def refusal(folder: Path, said: str, remedy: str) -> ConfigError:
    """One line, whatever names and values a foreign file holds."""
    return ConfigError(printable(f"adapter.continue_from: {folder} {said}"), remedy=printable(remedy))


_OTHER_BASE = "use the base that the adapter was trained on"


def _recorded_base(folder: Path, sha256: str) -> dict[str, Any]:
    """The identity of the base in a manifest that lists the adapter file with `sha256`."""
    manifest = _json(folder / "manifest.json")
    manifest = manifest.get("content", manifest)
    try:
        recorded, base = manifest["files"][ADAPTER_WEIGHTS]["sha256"], manifest["base"]
        base["sha256"]
    except (KeyError, TypeError):
        raise CheckpointError(
            f"{folder}: manifest.json is damaged", remedy="dist-cpt verify names everything"
        ) from None
    if recorded != sha256:
        raise CheckpointError(
            f"{folder}: {ADAPTER_WEIGHTS} is not what manifest.json lists", remedy="use another checkpoint of that run"
        )
    return base


def require_same_base(folder: Path, theirs: str, here: str) -> None:
    """Refuse a checkpoint whose base had other weights than the base here.

    Raises:
        ConfigError: it had.
    """
    if theirs != here:
        said = f"was trained on a base with sha256 {theirs[:12]}, this one has {here[:12]}"
        raise refusal(folder, said, f"{_OTHER_BASE}, or set adapter.continue_from.other_base: true")


def require_same_tokens(folder: Path, theirs: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse trained rows that mean other new tokens here: padded to a multiple, their number may be the same.

    Raises:
        ConfigError: the bases' identities name other extended tokenizers.
    """
    left, right = ((base.get("new_tokens") or {}).get("tokenizer_sha256", "none") for base in (theirs, here))
    if left != right:
        raise refusal(
            folder,
            f"trained its rows under the new tokens {left[:12]} (sha256 of the tokenizer), here {right[:12]}",
            f"set embeddings.new_tokens to the tokenizer in {folder}" if left != "none" else MERGE,
        )


def _tensors(folder: Path) -> tuple[dict[str, tuple[str, str]], dict[str, str], dict[str, tuple[int, ...]]]:
    """Keys of A and B by module, keys of whole matrices by module, and every shape by key."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt", device="cpu") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        line = str(error).partition("\n")[0]
        raise CheckpointError(f"{folder}: {ADAPTER_WEIGHTS} is not a whole safetensors file ({line})") from None
    halves: dict[str, dict[str, str]] = {"lora_A": {}, "lora_B": {}}
    vocabulary: dict[str, str] = {}
    for key in sorted(shapes):
        name = canonical_key(key)
        if name is None:
            continue
        module, _, last = name.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        if last in halves:
            halves[last][module] = key
        elif ".lora_" in name or not name.endswith(".weight"):
            raise refusal(folder, f"holds {key}, which is no matrix of plain LoRA", MERGE)
        else:
            vocabulary[f"{module}.{last}" if module else last] = key
    if halves["lora_A"].keys() != halves["lora_B"].keys():
        raise CheckpointError(f"{folder}: {ADAPTER_WEIGHTS} holds half of a LoRA pair")
    return {m: (key, halves["lora_B"][m]) for m, key in halves["lora_A"].items()}, vocabulary, shapes


def _adding(a: torch.Tensor, b: torch.Tensor, scale: float) -> Any:
    def hook(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        x = inputs[0]
        return output + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) * scale

    return hook


def _size(layer: Any) -> tuple[int, int]:
    """(out, in) of a linear layer, however it is stored."""
    if hasattr(layer, "in_features"):
        return layer.out_features, layer.in_features
    return layer.weight.shape[1], layer.weight.shape[0]


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({str(error).partition(chr(10))[0]})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no mapping")
    return values
