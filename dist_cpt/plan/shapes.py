"""What a model is made of, from its config.json alone: each weight with its place, shape and role.

The one table that memory, FLOPs, MFU and model checks read. It loads neither torch nor transformers.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dist_cpt.errors import ConfigError, printable
from dist_cpt.plan.families import ATTENTION_LAYERS, FAMILIES, RECURRENT_LAYERS, Family, Part, Role
from dist_cpt.run_folder.names import MODEL_CONFIG
from dist_cpt.storage import read_bytes

_ALIASES = {  # names of older configurations -> transformers' own
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "layers_block_type": "layer_types",
    "block_ff_dim": "intermediate_size",
    "num_dense_layers": "first_k_dense_replace",
    "full_attn_idxs": "attn_layer_indices",
    "mamba_num_heads": "mamba_n_heads",
    "mamba_head_dim": "mamba_d_head",
    "ssm_state_size": "mamba_d_state",
    "conv_kernel": "mamba_d_conv",
    "n_groups": "mamba_n_groups",
    "use_conv_bias": "mamba_conv_bias",
}
ATTENTION_MODULES = ("self_attn", "attention", "attn")  # names of attention in a layer
_OLDER_LAYER_TYPES = {"mamba": "linear_attention", "attention": "full_attention"}
_PATTERN = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}  # of hybrid_override_pattern
_NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_SHARED_FFN = (
    "shared_expert_intermediate_size",
    "shared_intermediate_size",
    "moe_shared_expert_intermediate_size",
)


@dataclass(frozen=True)
class Weight:
    """One parameter, by transformers' name; `inputs` and `outputs` are the features of a linear map or expert."""

    name: str
    shape: tuple[int, ...]  # as stored
    role: Role
    layer: int | None = None
    module: str = ""  # within the layer: self_attn, mlp ...
    symbol: str = ""  # of a map's inputs, as in the table of families
    inputs: int = 0
    outputs: int = 0
    in_mixer: bool = False  # of tokens: attention or a recurrence
    adaptable: bool = True  # by LoRA, of a linear map or expert

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def reads(self) -> str:
        """Maps of a layer with the same value read the same activation."""
        return f"{self.module}:{self.symbol}"


@dataclass(frozen=True)
class ModelShapes:
    """A causal language model, as transformers builds it from a config.json."""

    model_type: str
    weights: tuple[Weight, ...]
    hidden_size: int
    vocab_size: int
    num_layers: int
    num_heads: int
    query_features: int  # heads x head_dim
    key_features: int  # of all key heads
    value_features: int
    output_features: int  # heads x value's head_dim: what the output projection reads
    layer_types: tuple[str, ...]  # as in config.json, of each layer
    windows: tuple[int | None, ...]  # tokens that each layer's attention looks back, None: all
    state_elements: int  # that a recurrent layer carries from token to token, beside its convolution
    experts_per_token: int
    num_experts: int
    tied: bool
    fused: bool  # its layers run as fused kernels on a GPU
    is_quantised: bool  # its folder has codes of bitsandbytes, and experts in 16 bits

    @cached_property
    def num_parameters(self) -> int:
        """Elements of all weights; a tied pair counts once."""
        return sum(weight.elements for weight in self.weights)

    @property
    def head_elements(self) -> int:
        return self.hidden_size * self.vocab_size

    @cached_property
    def has_mlp_everywhere(self) -> bool:
        """Whether each layer has one MLP or block of experts, which selective recomputation asks for."""
        found: list[set[str]] = [set() for _ in self.layer_types]
        for weight in self.of("linear", "experts"):
            if weight.layer is not None and not weight.in_mixer:
                found[weight.layer].add(weight.module.partition(".")[0])
        return all(len(modules) == 1 for modules in found)

    def of(self, *roles: Role) -> Iterator[Weight]:
        """The weights of these roles, in the model's order."""
        return (weight for weight in self.weights if weight.role in roles)

    def adaptable(self, *roles: Role) -> Iterator[Weight]:
        """Those of these roles that carry LoRA where `all-linear` is adapted."""
        return (weight for weight in self.of(*roles) if weight.adaptable)

    def active_share(self, weight: Weight) -> float:
        """The fraction of a weight's elements that one token passes through."""
        return self.experts_per_token / self.num_experts if weight.role == "experts" else 1.0


def read_config(path: str | Path) -> dict[str, Any]:
    """The config.json of a model folder.

    Raises:
        ConfigError: no folder, no config.json in it, or no JSON object.
        StorageError: the file system does not answer.
    """
    file = Path(path).expanduser() / MODEL_CONFIG
    try:
        values = json.loads(read_bytes(file))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{path} has no {MODEL_CONFIG}", remedy="give a Hugging Face model folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(printable(f"{file} is not readable as JSON: {error}")) from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file} is not a JSON object", remedy="give a Hugging Face model folder")
    return values


def find_config(path: str, revision: str | None = None) -> dict[str, Any]:
    """The config.json of a model folder, or of a hub id in the Hugging Face cache; nothing is downloaded.

    Raises:
        ConfigError: it is in neither.
    """
    if Path(path).expanduser().is_dir() or path.startswith((".", "/", "~")):
        return read_config(path)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(path, MODEL_CONFIG, revision=revision)
    except HFValidationError:
        found = None
    if not isinstance(found, str):
        raise ConfigError(
            printable(f"{path} is neither a model folder nor in the Hugging Face cache"),
            remedy=f"hf download {path} {MODEL_CONFIG}, or give a folder with its {MODEL_CONFIG}",
        )
    return read_config(Path(found).parent)


def shapes_of(config: Mapping[str, Any]) -> ModelShapes:
    """The weights of the causal language model that `config`, the content of a config.json, describes.

    Raises:
        ConfigError: a model type that is not in the table, or sizes that make no model.
    """
    config = text_config(config)
    kind = config.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise _unknown(config)
    keys = _resolve(family, config)
    try:
        dims = _dimensions(keys)
        types = tuple(_layer_types(family, keys))
        weights = tuple(_weights(family, keys, dims, types))
        windows = tuple(_windows(keys, types))
    except (TypeError, KeyError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(printable(f"{MODEL_CONFIG}: the sizes make no {kind} model: {error!r}")) from error
    is_latent = bool(keys.get("kv_lora_rank"))
    return ModelShapes(
        model_type=str(kind),
        weights=weights,
        hidden_size=dims["D"],
        vocab_size=dims["V"],
        num_layers=len(types),
        num_heads=dims["H"],
        query_features=dims["B"] if is_latent else dims["Q"],
        key_features=dims["B"] if is_latent else dims["K"],
        value_features=dims["O"] if is_latent else dims["K"],
        output_features=dims["O"] if is_latent else dims["Q"],
        layer_types=types,
        windows=windows,
        state_elements=dims["v"] * dims["state_k"] + dims["i"] * dims["state_i"],
        experts_per_token=keys.get("num_experts_per_tok") or 1,
        num_experts=max(1, dims["E"]),
        tied=bool(keys.get("tie_word_embeddings")),
        fused=family.fused,
        is_quantised=any(key in (config.get("quantization_config") or {}) for key in ("load_in_4bit", "load_in_8bit")),
    )


def unpackable_layers(kind: str, layer_types: Iterable[str] | None) -> list[str]:
    """Layer types of a model of type `kind` that cannot keep packed documents apart."""
    known = FAMILIES[kind].mixers if kind in FAMILIES else ()
    named = {_OLDER_LAYER_TYPES.get(layer_type, layer_type) for layer_type in layer_types or ()}
    return sorted(named - {*ATTENTION_LAYERS, *known})


def is_known(config: Mapping[str, Any]) -> bool:
    """Whether the weights of this config.json's language model are in the table."""
    return str(text_config(config).get("model_type")) in FAMILIES


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of the language model inside a multimodal one, or `config` itself."""
    text = config.get("text_config")
    if str(config.get("model_type")) in FAMILIES or not isinstance(text, dict):
        return config
    tied = {key: config[key] for key in ("tie_word_embeddings",) if key in config}
    return tied | text


def _unknown(config: Mapping[str, Any]) -> ConfigError:
    kind = str(config.get("model_type"))
    near = difflib.get_close_matches(kind, FAMILIES, n=1, cutoff=0.85)
    return ConfigError(
        printable(f"model type {kind}: its weights are not in the table of shapes"),
        remedy=f"did you mean {near[0]}?" if near else f"model-check --build tries it; known: {', '.join(FAMILIES)}",
    )


def _resolve(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under transformers' names, absent ones at its defaults."""
    given = {_ALIASES.get(key, key): value for key, value in (*family.defaults.items(), *config.items())}
    for key in _NUM_EXPERTS:  # the file's own name wins over the default's
        if key in config:
            given = {k: v for k, v in given.items() if k not in _NUM_EXPERTS or k == key}
    return given if family.ties else given | {"tie_word_embeddings": False}


def _dimensions(keys: Mapping[str, Any]) -> dict[str, int]:
    """The symbols of `families.py`."""
    hidden, heads = keys["hidden_size"], keys["num_attention_heads"]
    head_dim = keys.get("head_dim") or hidden // heads
    key_heads = keys.get("num_key_value_heads") or heads
    experts = next((keys[key] for key in _NUM_EXPERTS if keys.get(key)), 0)
    expert_ffn = keys.get("moe_intermediate_size") or 0
    shared = next((keys[key] for key in _SHARED_FFN if keys.get(key)), 0)
    shared = shared or expert_ffn * (keys.get("n_shared_experts") or 0)
    rotary, plain, value = (keys.get(key) or 0 for key in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"))
    dims = {
        "1": 1,
        "D": hidden,
        "F": _ffn(keys),
        "V": keys["vocab_size"],
        "H": heads,
        "N": head_dim,
        "Q": heads * head_dim,
        "K": key_heads * head_dim,
        "E": experts,
        "M": expert_ffn,
        "S": shared,
        "A": keys.get("q_lora_rank") or 0,
        "C": keys.get("kv_lora_rank") or 0,
        "P": rotary,
        "B": heads * (plain + rotary),
        "U": heads * (plain + value),
        "O": heads * value,
        "l": keys.get("moe_latent_size") or hidden,
        **_recurrent_dimensions(keys),
    }
    if any(not isinstance(size, int) or size < 0 for size in dims.values()):
        raise ValueError("a size is not a whole number")
    return dims


def _ffn(keys: Mapping[str, Any]) -> int:
    """LFM2 makes two thirds of the width, times a factor, a multiple."""
    width = keys.get("intermediate_size") or 4 * keys["hidden_size"]
    if not keys.get("block_auto_adjust_ff_dim"):
        return width
    width, multiple, factor = int(2 * width / 3), keys["block_multiple_of"], keys["block_ffn_dim_multiplier"]
    return width if factor is None else multiple * -(-int(factor * width) // multiple)


def _recurrent_dimensions(keys: Mapping[str, Any]) -> dict[str, int]:
    """Of gated delta nets and Mamba-2; `state_k` and `state_i`: numbers of state for each of v and i features."""
    key, value, value_heads = (
        keys.get(name) or 0 for name in ("linear_key_head_dim", "linear_value_head_dim", "linear_num_value_heads")
    )
    heads, state = (keys.get(name) or 0 for name in ("mamba_n_heads", "mamba_d_state"))
    inner = keys.get("mamba_d_ssm") or int((keys.get("mamba_expand") or 0) * keys["hidden_size"])
    if isinstance(keys.get("mamba_d_head"), int):
        inner = heads * keys["mamba_d_head"]
    taps = (keys.get(name) or 0 for name in ("linear_conv_kernel_dim", "mamba_d_conv", "conv_L_cache"))
    return {
        "h": value_heads or heads,
        "k": key * (keys.get("linear_num_key_heads") or 0),
        "v": value * value_heads,
        "n": value,
        "i": inner,
        "g": state * (keys.get("mamba_n_groups") or 0),
        "t": max(taps),
        "state_k": key,
        "state_i": state,
    }


def _layer_types(family: Family, keys: Mapping[str, Any]) -> Iterator[str]:
    """As listed; else attention where config.json says so and the other type of the family everywhere else."""
    if pattern := keys.get("hybrid_override_pattern"):
        yield from (_PATTERN[letter] for letter in pattern)
        return
    if listed := keys.get("layer_types"):
        yield from (_OLDER_LAYER_TYPES.get(kind, kind) for kind in map(str, listed))
        return
    indices, every = keys.get("attn_layer_indices"), keys.get("full_attention_interval")
    other = next((kind for kind in family.mixers if kind != "full_attention"), "full_attention")
    for layer in range(keys["num_hidden_layers"]):
        if indices is not None:
            yield "full_attention" if layer in indices else other
        elif every is not None:
            yield "full_attention" if (layer + 1) % every == 0 else other
        else:
            yield next(iter(family.mixers), "full_attention")


def _weights(
    family: Family, keys: Mapping[str, Any], dims: Mapping[str, int], types: tuple[str, ...]
) -> Iterator[Weight]:
    embedding = (dims["V"], dims["D"])
    yield Weight(f"{family.stem}{family.embeddings}.weight", embedding, "embedding")
    if family.positions:
        yield Weight(f"{family.stem}wpe.weight", (keys["max_position_embeddings"], dims["D"]), "positions")
    for layer, kind in enumerate(types):
        mixer = family.mixers[kind] if family.mixers else ()
        mlp = family.sparse if _is_sparse(family, keys, layer) else family.mlp
        for part in (*family.layer, *mixer, *mlp):
            for weight in _part(part, keys, dims, f"{family.stem}{family.layers}.{layer}.", layer):
                mixes = (kind in RECURRENT_LAYERS or kind in ATTENTION_LAYERS) if part in mixer else None
                yield replace(weight, in_mixer=weight.module in ATTENTION_MODULES if mixes is None else mixes)
    for part in family.norm:
        yield from _part(part, keys, dims, family.stem, None)
    if not keys.get("tie_word_embeddings"):
        yield Weight("lm_head.weight", embedding, "head", inputs=dims["D"], outputs=dims["V"])


def _part(
    part: Part, keys: Mapping[str, Any], dims: Mapping[str, int], prefix: str, layer: int | None
) -> Iterator[Weight]:
    if part.when and bool(keys.get(part.when.removeprefix("!"))) == part.when.startswith("!"):
        return
    shape = tuple(sum(dims[symbol] for symbol in dim.split("+")) for dim in part.dims)
    module = part.name.removesuffix(".weight").rpartition(".")[0]
    symbol, inputs, outputs = "", 0, 0
    if part.role in ("linear", "experts", "router"):
        outputs, inputs = reversed(shape[-2:]) if part.transposed else shape[-2:]
        symbol = part.dims[-2 if part.transposed else -1]
    weight = Weight(prefix + part.name, shape, part.role, layer, module, symbol, inputs, outputs)
    yield weight if part.adaptable else replace(weight, adaptable=False)
    if part.bias is True or (part.bias and keys.get(part.bias)):
        length = shape[-1] if part.transposed else shape[0]
        yield Weight(f"{prefix}{part.name.removesuffix('.weight')}.bias", (length,), "bias", layer, module)


def _is_sparse(family: Family, keys: Mapping[str, Any], layer: int) -> bool:
    if not family.sparse:
        return False
    if family.sparse_from == "first_k_dense_replace":
        return layer >= keys["first_k_dense_replace"]
    if family.sparse_from == "none without":
        return any(keys.get(key) for key in _NUM_EXPERTS)
    if family.sparse_from == "decoder_sparse_step":
        return layer not in (keys["mlp_only_layers"] or ()) and (layer + 1) % keys["decoder_sparse_step"] == 0
    return True


def _windows(keys: Mapping[str, Any], types: tuple[str, ...]) -> Iterator[int | None]:
    """Which layers slide: as `layer_types` says, else all, or all but every n-th."""
    window, every = keys.get("sliding_window"), keys.get("sliding_every")
    for layer, kind in enumerate(types):
        if keys.get("layer_types"):
            slides = kind == "sliding_attention"
        elif keys.get("use_sliding_window") is False:
            slides = False
        else:
            slides = every is None or (layer + 1) % every != 0
        yield window if slides and window else None
