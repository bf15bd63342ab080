"""PiSSA: A and B start as the principal part of each weight, which is subtracted from the base.

The initial A and B are stored, since a decomposition on another machine may differ: in the run folder, for every rank
and every resume, and in each checkpoint, for a merge.
Source: Meng et al. 2024, PiSSA: Principal Singular Values and Singular Vectors Adaptation (arXiv 2404.02948).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_cpt.adapters.peft_folder import BASE_PREFIX, file_sha256
from dist_cpt.adapters.quantize import read_weight, write_weight
from dist_cpt.errors import CheckpointError, ConfigError
from dist_cpt.run_folder.checkpoints import published
from dist_cpt.run_folder.claim import Claim
from dist_cpt.run_folder.names import INITIAL_ADAPTER
from dist_cpt.runtime.collectives import on_every_rank, on_rank_zero

PISSA = "pissa_sha256"  # of the initial adapter's file, in the base's identity


@dataclass(frozen=True)
class InitialAdapter:
    """The initial A [r, in] and B [out, r] in fp32 by module of the base, and the factor of B A.

    In the file: `<module>.lora_A.weight`, `<module>.lora_B.weight`, and `scale` in the metadata.
    """

    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]
    scale: float

    def subtract_from(self, layer: Any, name: str) -> None:
        """Subtract scale x B A of module `name` from a layer's weight, in place, stored as before."""
        weight = read_weight(layer).clone()
        a, b = (half.to(weight.device) for half in self.pairs[name])
        write_weight(layer, weight.addmm_(b, a, alpha=-self.scale))


def init_pissa(module: nn.Module, claim: Claim) -> str:
    """Set a new LoRA to the principal part of each weight and subtract that from the base; the sha256 of the file.

    Before an engine shards the model. Rank 0 decomposes the weights once per run; all other ranks, and all resumes,
    read its file. Collective.

    Raises:
        Superseded: a later attempt has claimed the run.
        ConfigError: adapter.rank exceeds the rank of a weight.
        CheckpointError: the file is damaged.
    """
    sha256 = on_rank_zero("adapter.init", lambda: _find_or_make(module, claim))
    on_every_rank("adapter.init", lambda: _apply(module, claim.folder / INITIAL_ADAPTER, sha256))
    return sha256


def copy_initial(run: Path, checkpoint: str | Path) -> None:
    """Copy the initial adapter of `run` into one of its checkpoints."""
    shutil.copyfile(run / INITIAL_ADAPTER, Path(checkpoint) / INITIAL_ADAPTER)


@torch.no_grad()
def subtract_initial(model: Any, file: Path) -> None:
    """Turn the plain base `model` into the base under the adapter whose initial state is `file`, in place."""
    initial = read_initial(file)
    for name in initial.pairs:
        initial.subtract_from(model.get_submodule(name), name)


def read_initial(file: Path) -> InitialAdapter:
    """The initial adapter in a file.

    Raises:
        CheckpointError: not a valid safetensors file, or not an initial adapter.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            names = sorted(k.removesuffix(".lora_A.weight") for k in opened.keys() if k.endswith(".lora_A.weight"))  # noqa: SIM118
            pairs = {
                name: (opened.get_tensor(f"{name}.lora_A.weight"), opened.get_tensor(f"{name}.lora_B.weight"))
                for name in names
            }
            return InitialAdapter(pairs, float(opened.metadata()["scale"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        problem = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{file} cannot be read ({problem})", remedy="copy it from a checkpoint of the run"
        ) from None


def principal_part(weight_OI: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A [rank, I] and B [O, rank], fp32, with scale x B A the best approximation of rank `rank`.

    By the eigenvectors of the smaller Gram matrix in fp64: as exact as an SVD and far faster.
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
    """(name in the base, LoRA layer) of every target."""
    for name, layer in module.named_modules():
        if "default" in getattr(layer, "lora_A", ()):
            yield name.partition(BASE_PREFIX)[2], layer


@torch.no_grad()
def _find_or_make(module: nn.Module, claim: Claim) -> str:
    from safetensors.torch import save_file

    run = claim.folder
    target = run / INITIAL_ADAPTER
    if target.is_file():
        return file_sha256(target)
    temporary = run / f"{INITIAL_ADAPTER}.attempt-{claim.attempt}.tmp"
    copies = [file for folder in published(run) if (file := folder / INITIAL_ADAPTER).is_file()]
    if copies:
        shutil.copyfile(copies[0], temporary)
    else:
        tensors, scale = {}, 1.0
        for name, layer in _layers(module):
            rank, scale = layer.r["default"], layer.scaling["default"]
            weight = read_weight(layer.get_base_layer())
            if rank > min(weight.shape):
                raise ConfigError(
                    f"adapter.init pissa: adapter.rank {rank} is too large for {name} {list(weight.shape)}",
                    remedy=f"use adapter.rank {min(weight.shape)} or less",
                )
            a, b = principal_part(weight, rank, scale)
            tensors |= {f"{name}.lora_A.weight": a.cpu(), f"{name}.lora_B.weight": b.cpu()}
        save_file(tensors, temporary, metadata={"format": "pt", "scale": repr(scale)})
    claim.put(temporary, INITIAL_ADAPTER)
    return file_sha256(target)


@torch.no_grad()
def _apply(module: nn.Module, file: Path, sha256: str) -> None:
    if file_sha256(file) != sha256:
        raise CheckpointError(f"{file} on this host differs from rank 0's", remedy="use a shared folder")
    initial = read_initial(file)
    layers = dict(_layers(module))
    if initial.pairs.keys() != layers.keys():
        raise CheckpointError(f"{file} belongs to other adapter.targets", remedy="use another name for another run")
    for name, layer in layers.items():
        a, b = initial.pairs[name]
        layer.lora_A["default"].weight.copy_(a)
        layer.lora_B["default"].weight.copy_(b)
        initial.subtract_from(layer.get_base_layer(), name)
