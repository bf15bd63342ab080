"""A checkpoint merged into a plain Hugging Face folder, checked against the logits of base and adapter.

Over a quantised base these are the logits of the unquantised base under the adapter, and `quantisation_gap` measures
the distance to the trainer's; weights that are stored quantised are dequantised. A prior adapter is merged first.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from dist_cpt.adapters.peft_folder import manifest_content
from dist_cpt.adapters.quantised_experts import dequantise_experts
from dist_cpt.adapters.quantize import QUANTISED, load_quantised
from dist_cpt.errors import ConfigError
from dist_cpt.export.checkpoint_model import (
    base_model,
    find_base,
    fit_vocabulary,
    load_fp32,
    plain_model,
    prior_adapter,
    probe_logits,
    require_same_logits,
    under_adapter,
    verified_base,
    with_class_head,
)
from dist_cpt.export.model_folder import require_dtype, round_to, write_model
from dist_cpt.model.architectures import parts_of
from dist_cpt.model.classify import HEAD
from dist_cpt.model.rope import rope_of, scaled_config
from dist_cpt.run_folder.staging import new_output, require_new


def merge(
    checkpoint: str | Path,
    out: str | Path,
    dtype: str = "bf16",
    *,
    base: str | None = None,
    base_only: bool = False,
    scale: float = 1.0,
    layers: range | None = None,
    others: Sequence[Path] = (),
) -> float:
    """Write base and adapter as one Hugging Face folder; a full-parameter checkpoint is cast.

    `checkpoint` is a checkpoint or a PEFT folder. Merging is done in fp32, and the weights are stored in `dtype` (fp32
    | bf16 | fp16). `base` overrides the recorded path of the base. With `base_only` the run's own adapter is left out:
    the base under it is written, a prior adapter merged in. `scale` applies to everything that was trained: W = base +
    scale x (trained - base); with `layers`, to these decoder layers alone. With `others`, checkpoints of the same run,
    the mean of all updates is merged. The merged model is checked against base and adapter, and the folder against the
    merged model. Returns the largest absolute difference of fp32 logits between the folder and the checkpoint at
    `scale`, over probe tokens.

    Raises:
        CheckpointError: not a checkpoint, another base than the run had, or logits that differ.
        ConfigError: unknown dtype, `out` is in use, nothing to scale, or weights beyond fp16.
        WriteError: `out` cannot be written.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    require_dtype(dtype)
    require_new(out)
    base_folder = find_base(checkpoint, base)
    if base_only and base_folder is None:
        raise ConfigError(f"{checkpoint} has no adapter", remedy="leave --base-only out")
    if base_only and scale != 1.0:
        raise ConfigError("--base-only leaves out what --scale would scale", remedy="give one of them")
    if base_only and base_folder is not None:
        model = base_model(checkpoint, base_folder)
        expected = probe_logits(model)
    else:
        model, expected = averaged_model([checkpoint, *others], base_folder)
    if scale != 1.0:
        Blend(model, untrained_model(checkpoint, base_folder, base), layers).set(scale)
        expected = probe_logits(model)
    round_to(model, dtype, base_folder)
    with new_output(out) as folder:
        write_model(model, folder, [checkpoint, *([base_folder] if base_folder else [])])
        logits = probe_logits(plain_model(folder))
        require_same_logits("the written folder", logits, probe_logits(model.float()))
    return float((logits - expected).abs().max())


def merged_model(checkpoint: Path, base_folder: Path | None) -> tuple[Any, torch.Tensor]:
    """(the plain fp32 model of a checkpoint with its adapter merged in, the logits of base and adapter before).

    Raises:
        CheckpointError: the merged model's logits differ.
    """
    model = load_fp32(checkpoint, base_folder)
    expected = probe_logits(model)
    if base_folder is not None:
        model = model.merge_and_unload()
        require_same_logits("the merged model", probe_logits(model), expected)
    return model, expected


def averaged_model(checkpoints: Sequence[Path], base_folder: Path | None) -> tuple[Any, torch.Tensor]:
    """As `merged_model`, of base + the mean of the checkpoints' updates: of products B A, not of A and B apart.

    Besides the result one more model is in memory; weights that are equal in all checkpoints stay so bit for bit.
    """
    model, logits = merged_model(checkpoints[0], base_folder)
    for number, checkpoint in enumerate(checkpoints[1:], 2):
        other = dict(merged_model(checkpoint, base_folder)[0].named_parameters())
        for name, parameter in model.named_parameters():
            parameter.data.add_(other[name].data.sub_(parameter.data), alpha=1 / number)
    return model, probe_logits(model) if len(checkpoints) > 1 else logits


class Blend:
    """Sets a trained model to W = base + scale x (trained - base), in fp32 and in place, any number of times.

    With `layers` only these decoder layers are scaled. New rows and a classifier's head, which the base does not have,
    stay as trained.
    """

    def __init__(self, trained: Any, base: Any, layers: range | None = None) -> None:
        before = base.state_dict()
        scaled = None if layers is None else _parameters_of(trained, layers)
        self._changes: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        for name, parameter in trained.named_parameters():
            if scaled is not None and parameter not in scaled:
                continue
            origin = before.get(name)
            # The base of a classifier has a head too, but an untrained one.
            if origin is None or origin.shape[1:] != parameter.shape[1:] or name == f"{HEAD}.weight":
                continue
            rows = parameter.data[: len(origin)]
            origin = origin[: len(rows)]
            if not torch.equal(rows, origin):
                self._changes.append((parameter, origin.clone(), rows - origin))

    @torch.no_grad()
    def set(self, scale: float) -> None:
        """Set the model to `scale`; it may have moved to a GPU meanwhile."""
        for parameter, origin, change in self._changes:
            parameter.data[: len(origin)].copy_(origin.add(change, alpha=scale))


def _parameters_of(model: Any, layers: range) -> set[torch.nn.Parameter]:
    """The parameters of some decoder layers.

    Raises:
        ConfigError: the model has no such layers.
    """
    decoder_layers = parts_of(model).layers
    if not layers or layers.stop > len(decoder_layers):
        raise ConfigError(
            f"--layers {layers.start}:{layers.stop}: the model has layers 0 to {len(decoder_layers) - 1}",
            remedy=f"give A:B with 0 <= A < B <= {len(decoder_layers)}",
        )
    return {parameter for number in layers for parameter in decoder_layers[number].parameters()}


def untrained_model(checkpoint: Path, base_folder: Path | None, base: str | None) -> Any:
    """The fp32 model that a scale is relative to: the base before the run trained it.

    Raises:
        ConfigError: the run started from scratch.
    """
    if base_folder is not None:
        return base_model(checkpoint, base_folder)
    manifest = manifest_content(checkpoint)
    assert manifest is not None  # `find_base` has read it
    if manifest["base"].get("path") is None:
        raise ConfigError(
            f"{checkpoint} was trained from scratch: there is no base to scale from", remedy="leave the scale at 1"
        )
    return plain_model(verified_base(manifest["base"], base))


def quantisation_gap(checkpoint: str | Path, *, base: str | None = None) -> float | None:
    """The largest absolute difference, under the trained adapter, between the logits over the trainer's quantised base
    and over the base that `merge` and `generate` use, in fp32 over probe tokens.

    None if the run's base was not quantised, or for a PEFT folder, which does not record it. `base` as for `merge`.

    Raises:
        CheckpointError: not a checkpoint, or another base than the run had.
        MissingExtraError: bitsandbytes is not installed.
    """
    checkpoint = Path(checkpoint)
    manifest = manifest_content(checkpoint)
    weights = None if manifest is None else manifest["base"].get("weights")
    if weights not in QUANTISED:
        return None
    base_folder = find_base(checkpoint, base)
    assert base_folder is not None  # only adapters train over quantised weights
    expected = probe_logits(load_fp32(checkpoint, base_folder))
    hf_config = scaled_config(base_folder, rope_of(checkpoint))
    quantised = load_quantised(base_folder, hf_config, torch.device("cpu"), weights)
    dequantise_experts(quantised)
    for parameter in quantised.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    with ExitStack() as stack:
        if (recorded := prior_adapter(checkpoint)) is not None:
            prior, mode = recorded
            fit_vocabulary(quantised, prior.folder)
            prior.copy_vocabulary(quantised)
            prior.fold(quantised) if mode == "fold" else stack.enter_context(prior.beside(quantised))
        trained = under_adapter(with_class_head(quantised, checkpoint), checkpoint)
        return float((probe_logits(trained) - expected).abs().max())
