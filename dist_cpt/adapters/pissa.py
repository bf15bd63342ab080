"""PiSSA: A and B begin as the strongest part of each weight, and the base keeps the rest.

The rest is a function of that beginning, so the beginning is kept: in the run folder, where every rank and every
resume reads it, and in each checkpoint, where a merge does. A decomposition on another machine may differ.
Source: Meng et al. 2024, PiSSA: Principal Singular Values and Singular Vectors Adaptation (arXiv 2404.02948).
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_cpt.adapters.quantize import read_weight, write_weight
from dist_cpt.errors import CheckpointError, ConfigError
from dist_cpt.runtime.collectives import on_every_rank, on_rank_zero

PISSA = "pissa_sha256"  # of the beginning, in the base's identity
INITIAL = "initial_adapter.safetensors"  # keys `<module>.lora_A.weight`, `.lora_B.weight`; metadata: scale
_PREFIX = "base_model.model."


def begin_with_pissa(module: nn.Module, run: Path) -> str:
    """Give a model under a new LoRA its beginning and its base the rest, before an engine cuts it; the file's sha256.

    Rank 0 decomposes the weights once per run; all others, and all resumes, read its file. Collective.

    Raises:
        ConfigError: the rank exceeds what a weight has.
        CheckpointError: the file is damaged.
    """
    sha256 = on_rank_zero("adapter.init", lambda: _find_or_make(module, run))
    on_every_rank("adapter.init", lambda: _begin(module, run / INITIAL, sha256))
    return sha256


def copy_initial(run: Path, checkpoint: str | Path) -> None:
    """Put the beginning of `run` into one of its checkpoints."""
    shutil.copyfile(run / INITIAL, Path(checkpoint) / INITIAL)


@torch.no_grad()
def take_out(model: Any, file: Path) -> None:
    """Leave in the plain base `model` what a run with the beginning in `file` left there; in fp32 or as stored."""
    tensors, scale = read_initial(file)
    for name in modules_of(tensors):
        _subtract(model.get_submodule(name), tensors, name, scale)


def read_initial(file: Path) -> tuple[dict[str, torch.Tensor], float]:
    """fp32 tensors by `<module>.lora_A.weight` [r, in] and `<module>.lora_B.weight` [out, r], and what scales B A.

    Raises:
        CheckpointError: no whole safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}, float(opened.metadata()["scale"])  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        said = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{file} cannot be read ({said})", remedy="copy it from a checkpoint of the run"
        ) from None


def modules_of(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of the modules that a beginning belongs to."""
    return sorted(key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight"))


def principal_part(weight_OI: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A [rank, I] and B [O, rank], fp32, with scale x B A the best approximation of rank `rank`.

    Through the eigenvectors of the smaller Gram matrix, in fp64: exact, and far quicker than a full decomposition.
    """
    weight = weight_OI.double()
    wide = weight.shape[1] >= weight.shape[0]
    gram = weight @ weight.T if wide else weight.T @ weight
    squares, vectors = torch.linalg.eigh(gram)
    top = vectors[:, -rank:].flip(1)
    roots = squares[-rank:].flip(0).clamp_min(0.0).pow(0.25)  # the square roots of the singular values
    half = top * roots
    rest = (weight.T @ top if wide else weight @ top) / roots.clamp_min(torch.finfo(torch.float64).tiny)
    a, b = (rest.T, half) if wide else (half.T, rest)
    return (a / scale**0.5).float().contiguous(), (b / scale**0.5).float().contiguous()


def _layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name in the base, PEFT's layer) of every target."""
    for name, layer in module.named_modules():
        if "default" in getattr(layer, "lora_A", ()):
            yield name.partition(_PREFIX)[2], layer


@torch.no_grad()
def _find_or_make(module: nn.Module, run: Path) -> str:
    from safetensors.torch import save_file

    target = run / INITIAL
    if not target.is_file():
        temporary = run / f"{INITIAL}.tmp"
        kept = sorted(run.glob(f"checkpoints/step-*/{INITIAL}"))
        if kept:
            shutil.copyfile(kept[-1], temporary)
        else:
            tensors, scale = {}, 1.0
            for name, layer in _layers(module):
                rank, scale = layer.r["default"], layer.scaling["default"]
                weight = read_weight(layer.get_base_layer())
                if rank > min(weight.shape):
                    raise ConfigError(
                        f"adapter.init pissa: {name} of shape {list(weight.shape)} has no part of rank {rank}",
                        remedy=f"use adapter.rank {min(weight.shape)} or less",
                    )
                a, b = principal_part(weight, rank, scale)
                tensors |= {f"{name}.lora_A.weight": a.cpu(), f"{name}.lora_B.weight": b.cpu()}
            save_file(tensors, temporary, metadata={"format": "pt", "scale": repr(scale)})
        os.replace(temporary, target)
    return _sha256(target)


@torch.no_grad()
def _begin(module: nn.Module, file: Path, sha256: str) -> None:
    if _sha256(file) != sha256:
        raise CheckpointError(f"{file} is another file on this host than on rank 0's", remedy="use a shared folder")
    tensors, scale = read_initial(file)
    layers = dict(_layers(module))
    if modules_of(tensors) != sorted(layers):
        raise CheckpointError(f"{file} belongs to other adapter.targets", remedy="use another name for another run")
    for name, layer in layers.items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        a.copy_(tensors[f"{name}.lora_A.weight"])
        b.copy_(tensors[f"{name}.lora_B.weight"])
        _subtract(layer.get_base_layer(), tensors, name, scale)


def _subtract(layer: Any, tensors: Mapping[str, torch.Tensor], name: str, scale: float) -> None:
    weight = read_weight(layer).clone()
    a, b = (tensors[f"{name}.{half}.weight"].to(weight.device) for half in ("lora_A", "lora_B"))
    write_weight(layer, weight.addmm_(b, a, alpha=-scale))


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
