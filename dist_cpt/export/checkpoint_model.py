"""The model of a checkpoint or PEFT folder in fp32: its base located and verified, prior and own adapter applied."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from dist_cpt.adapters.lora import import_peft, without_peft_deprecations
from dist_cpt.adapters.peft_folder import (
    PRIOR_KEY,
    ROPE_KEY,
    copy_whole_tensors,
    manifest_content,
    read_adapter_config,
    tensor_shapes,
    whole_matrices,
    whole_tensors,
)
from dist_cpt.adapters.pissa import subtract_initial
from dist_cpt.adapters.prior_adapter import PriorAdapter, open_prior_adapter
from dist_cpt.adapters.quantize import dequantise, load_plain, load_quantised, require_complete, stored_weights
from dist_cpt.adapters.vocabulary import untie
from dist_cpt.config.schema import ClassifyConfig, ModelConfig, RopeScalingConfig
from dist_cpt.errors import CheckpointError, ConfigError
from dist_cpt.model.architectures import parts_of
from dist_cpt.model.base_model import locate_base, weights_sha256
from dist_cpt.model.classify import as_classifier, is_classifier, read_labels
from dist_cpt.model.rope import rope_of, scaled_config
from dist_cpt.model.safety_checks import require_trusted_code
from dist_cpt.run_folder.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, INITIAL_ADAPTER, MANIFEST, MODEL_CONFIG

MAX_RELATIVE_DIFFERENCE = 1e-5  # of the largest logit, fp32
_PROBE_TOKENS = 32


def find_base(checkpoint: Path, override: str | None = None) -> Path | None:
    """The base folder of an adapter; None for a full model.

    For a checkpoint, the base's weights are hashed and compared with the manifest. A PEFT folder without manifest
    names its base; that is not verified.

    Raises:
        CheckpointError: no manifest and no adapter, or the base's weights are not those of the run.
        ConfigError: no base is named, or it does not exist.
    """
    manifest = manifest_content(checkpoint)
    if manifest is None and not (checkpoint / ADAPTER_CONFIG).is_file():
        raise CheckpointError(f"{checkpoint} is not a checkpoint: it has no {MANIFEST}")
    if manifest is not None:
        return verified_base(manifest["base"], override) if manifest["adapter"] else None
    config = read_adapter_config(checkpoint)
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if (prior := config.get(PRIOR_KEY)) is not None:
        name = prior["base"]
    elif (rope := config.get(ROPE_KEY)) is not None:
        name = rope["base"]
    if override:
        return locate_base(override, None)
    if not name:
        raise ConfigError(f"{checkpoint / ADAPTER_CONFIG} names no base model", remedy="name it with --base")
    return locate_base(name, revision)


def base_of_language_model(model: Path, override: str | None = None) -> Path | None:
    """`find_base` for a checkpoint or a PEFT folder, None for a plain model folder.

    Raises:
        CheckpointError: as `find_base`.
        ConfigError: as `find_base`; not a model, or a classifier.
    """
    is_ours = (model / MANIFEST).is_file() or (model / ADAPTER_CONFIG).is_file()
    if not is_ours and not (model / MODEL_CONFIG).is_file():
        raise ConfigError(
            f"{model} is not a model: it has no {MODEL_CONFIG}", remedy="give a run, a checkpoint or a model folder"
        )
    folder = find_base(model, override) if is_ours else None
    if read_labels(model) is not None or (folder is None and is_classifier(model)):
        raise ConfigError(f"{model} is a classifier: it gives classes, not text", remedy="give a language model")
    return folder


def verified_base(identity: dict[str, Any], override: str | None) -> Path:
    """The folder of the base with a recorded identity, or the folder `override` with the same weights.

    Raises:
        CheckpointError: the weights differ.
        ConfigError: no such base.
    """
    folder = locate_base(override or identity["path"], None if override else identity["revision"])
    sha256 = weights_sha256(folder)
    if sha256 != identity["sha256"]:
        raise CheckpointError(
            f"the base at {folder} has sha256 {sha256[:12]}, the run had {identity['sha256'][:12]}",
            remedy="give the base that the run was started from",
        )
    return folder


def load_fp32(checkpoint: Path, base_folder: Path | None) -> Any:
    """The model of a checkpoint in fp32: under PEFT on its base, or plain.

    Raises:
        CheckpointError: the adapter's files are missing or pickled.
    """
    if base_folder is None:
        return plain_model(checkpoint)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (checkpoint / name).is_file():
            raise CheckpointError(f"{checkpoint} has no {name}", remedy="adapters are read from safetensors only")
    return under_adapter(base_model(checkpoint, base_folder), checkpoint)


def base_model(checkpoint: Path, base_folder: Path, *, with_whole: bool = False) -> Any:
    """The model under an adapter, in fp32: its base with the prior adapter merged in.

    `with_whole` also sets what the run trained in full: embedding, head, routers.
    """
    model = plain_model(base_folder, rope_of(checkpoint))
    if (recorded := prior_adapter(checkpoint)) is not None:
        prior, _ = recorded
        fit_vocabulary(model, prior.folder)
        prior.require_fit(model)
        prior.copy_vocabulary(model)
        prior.fold(model)
    if with_whole:
        fit_vocabulary(model, checkpoint)
        copy_whole_tensors(checkpoint, model, whole_tensors(tensor_shapes(checkpoint)))
    return with_class_head(model, checkpoint)


def prior_adapter(checkpoint: Path) -> tuple[PriorAdapter, str] | None:
    """The prior adapter recorded in adapter_config.json and its mode, fold or stack.

    Raises:
        CheckpointError: its file has changed since.
    """
    record = read_adapter_config(checkpoint).get(PRIOR_KEY)
    if record is None:
        return None
    prior = open_prior_adapter(Path(record["adapter"]))
    if prior.sha256 != record["adapter_sha256"]:
        raise CheckpointError(
            f"{prior.folder} has sha256 {prior.sha256[:12]}, {checkpoint} was trained on top of an adapter with "
            f"{record['adapter_sha256'][:12]}",
            remedy="restore that adapter",
        )
    return prior, record["mode"]


def with_class_head(model: Any, checkpoint: Path) -> Any:
    """`model`, as a classifier if the adapter is one's; the values of its head come with the adapter."""
    labels = read_labels(checkpoint)
    return model if labels is None else as_classifier(model, parts_of(model), ClassifyConfig(labels=labels), seed=0)[0]


def under_adapter(model: Any, checkpoint: Path) -> Any:
    """`model` under PEFT with the adapter of `checkpoint`, in eval mode."""
    peft = import_peft()
    fit_vocabulary(model, checkpoint)
    with without_peft_deprecations(), warnings.catch_warnings():
        known = rf"'({PRIOR_KEY}|{ROPE_KEY})'"  # see `base_model`
        warnings.filterwarnings("ignore", rf"Unexpected keyword arguments \[{known}(, {known})?\]")
        config = peft.PeftConfig.from_pretrained(str(checkpoint))
        if (checkpoint / INITIAL_ADAPTER).is_file():
            subtract_initial(model, checkpoint / INITIAL_ADAPTER)
            config.init_lora_weights = True  # else PEFT would decompose the weights and subtract once more
        return peft.PeftModel.from_pretrained(model, str(checkpoint), config=config).eval()


def fit_vocabulary(model: Any, adapter: Path) -> None:
    """Resize and untie as the adapter was trained; its matrices bring the values of all rows."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    modules, shapes = dict(model.named_modules()), tensor_shapes(adapter)
    trained = [
        shapes[key]
        for name, key in whole_matrices(shapes).items()
        if name in modules and (modules[name] is embeddings or modules[name] is head)
    ]
    rows = {shape[0] for shape in trained}
    if len(rows) == 1 and rows != {embeddings.num_embeddings}:
        model.resize_token_embeddings(rows.pop(), mean_resizing=False)
    tied = head is not None and head.weight is embeddings.weight
    if trained and tied and not read_adapter_config(adapter).get("ensure_weight_tying"):
        untie(model)  # as PEFT does, with a warning


def plain_model(folder: Path, rope: RopeScalingConfig | None = None) -> Any:
    """A whole model folder in fp32 and eval mode, quantised weights dequantised; `rope` replaces its rotation."""
    import_peft()  # before transformers: it silences what both import
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    locate_base(str(folder), None)  # refuses pickled weights
    require_trusted_code(folder, ModelConfig(path=str(folder)))  # an export never runs a model's own code
    hf_config = scaled_config(folder, rope)
    if (stored := stored_weights(folder)) is not None:
        return dequantise(load_quantised(folder, hf_config, torch.device("cpu"), stored)).eval()
    if not is_classifier(folder):
        return load_plain(folder, hf_config, torch.float32).eval()
    loaded: Any = AutoModelForSequenceClassification.from_pretrained(
        folder,
        config=hf_config,
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    return require_complete(folder, *loaded).eval()


def probe_logits(model: Any) -> torch.Tensor:
    """fp32 logits [1, L, V], or [1, C] of a classifier, of tokens that are the same for every model of a vocabulary."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, model.config.get_text_config().vocab_size, (1, _PROBE_TOKENS), generator=generator)
    with torch.no_grad():
        return model(input_ids=input_ids, use_cache=False).logits.float()


def require_same_logits(what: str, logits: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest absolute difference of two models' fp32 logits.

    Raises:
        CheckpointError: it is more than the order of summation explains.
    """
    difference = float((logits - expected).abs().max())
    allowed = MAX_RELATIVE_DIFFERENCE * max(1.0, float(expected.abs().max()))
    if not difference <= allowed:
        raise CheckpointError(
            f"{what}'s logits differ from the checkpoint's by {difference:.2e}, allowed {allowed:.2e}"
        )
    return difference
