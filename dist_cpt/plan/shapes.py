"""What a model is made of, from its config.json alone: each weight with its place, shape and role.

The one table that memory, FLOPs, MFU and model checks read. It loads neither torch nor transformers.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dist_cpt.errors import ConfigError, printable
from dist_cpt.plan.families import FAMILIES, Family, Part, Role
from dist_cpt.run_folder.names import MODEL_CONFIG
from dist_cpt.storage import read_bytes

_ALIASES = {  # names of older configurations -> transformers' own
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
}
_NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


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

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def in_attention(self) -> bool:
        return self.module in ("self_attn", "attention", "attn")

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
    windows: tuple[int | None, ...]  # tokens that each layer's attention looks back, None: all
    experts_per_token: int
    num_experts: int
    tied: bool
    fused: bool  # its layers run as fused kernels on a GPU

    @cached_property
    def num_parameters(self) -> int:
        """Elements of all weights; a tied pair counts once."""
        return sum(weight.elements for weight in self.weights)

    @property
    def head_elements(self) -> int:
        return self.hidden_size * self.vocab_size

    def of(self, *roles: Role) -> Iterator[Weight]:
        """The weights of these roles, in the model's order."""
        return (weight for weight in self.weights if weight.role in roles)

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
        layers = keys["num_hidden_layers"]
        weights = tuple(_weights(family, keys, dims, layers))
        windows = tuple(_windows(keys, layers))
    except (TypeError, KeyError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(printable(f"{MODEL_CONFIG}: the sizes make no {kind} model: {error!r}")) from error
    is_latent = bool(keys.get("kv_lora_rank"))
    return ModelShapes(
        model_type=str(kind),
        weights=weights,
        hidden_size=dims["D"],
        vocab_size=dims["V"],
        num_layers=layers,
        num_heads=dims["H"],
        query_features=dims["B"] if is_latent else dims["Q"],
        key_features=dims["B"] if is_latent else dims["K"],
        value_features=dims["O"] if is_latent else dims["K"],
        output_features=dims["O"] if is_latent else dims["Q"],
        windows=windows,
        experts_per_token=keys.get("num_experts_per_tok") or 1,
        num_experts=max(1, dims["E"]),
        tied=bool(keys.get("tie_word_embeddings")),
        fused=family.fused,
    )


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
    near = difflib.get_close_matches(kind, FAMILIES, n=1, cutoff=0.75)
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
    return given


def _dimensions(keys: Mapping[str, Any]) -> dict[str, int]:
    """The symbols of `families.py`."""
    hidden, heads = keys["hidden_size"], keys["num_attention_heads"]
    head_dim = keys.get("head_dim") or hidden // heads
    key_heads = keys.get("num_key_value_heads") or heads
    experts = next((keys[key] for key in _NUM_EXPERTS if keys.get(key)), 0)
    expert_ffn = keys.get("moe_intermediate_size") or 0
    shared = keys.get("shared_expert_intermediate_size") or expert_ffn * (keys.get("n_shared_experts") or 0)
    rotary, plain, value = (keys.get(key) or 0 for key in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"))
    dims = {
        "1": 1,
        "D": hidden,
        "F": keys.get("intermediate_size") or 4 * hidden,
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
    }
    if any(not isinstance(size, int) or size < 0 for size in dims.values()):
        raise ValueError("a size is not a whole number")
    return dims


def _weights(family: Family, keys: Mapping[str, Any], dims: Mapping[str, int], layers: int) -> Iterator[Weight]:
    embedding = (dims["V"], dims["D"])
    yield Weight(f"{family.stem}{family.embeddings}.weight", embedding, "embedding")
    if family.positions:
        yield Weight(f"{family.stem}wpe.weight", (keys["max_position_embeddings"], dims["D"]), "positions")
    for layer in range(layers):
        mlp = family.sparse if _is_sparse(family, keys, layer) else family.mlp
        for part in (*family.layer, *mlp):
            yield from _part(part, keys, dims, f"{family.stem}{family.layers}.{layer}.", layer)
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
    yield Weight(prefix + part.name, shape, part.role, layer, module, symbol, inputs, outputs)
    if part.bias is True or (part.bias and keys.get(part.bias)):
        length = shape[-1] if part.transposed else shape[0]
        yield Weight(f"{prefix}{part.name.removesuffix('.weight')}.bias", (length,), "bias", layer, module)


def _is_sparse(family: Family, keys: Mapping[str, Any], layer: int) -> bool:
    if not family.sparse:
        return False
    if family.sparse_from == "first_k_dense_replace":
        return layer >= keys["first_k_dense_replace"]
    if family.sparse_from == "decoder_sparse_step":
        return layer not in keys["mlp_only_layers"] and (layer + 1) % keys["decoder_sparse_step"] == 0
    return True


def _windows(keys: Mapping[str, Any], layers: int) -> Iterator[int | None]:
    """Which layers slide: as `layer_types` says, else all, or all but every n-th."""
    types, window, every = keys.get("layer_types"), keys.get("sliding_window"), keys.get("sliding_every")
    for layer in range(layers):
        if types:
            slides = types[layer] == "sliding_attention"
        elif keys.get("use_sliding_window") is False:
            slides = False
        else:
            slides = every is None or (layer + 1) % every != 0
        yield window if slides and window else None
