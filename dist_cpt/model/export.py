"""A checkpoint as a plain Hugging Face folder, proven to give the logits that training had.

Over an NF4 base they are those of the unquantised base under the trained adapter, and `nf4_gap` says how far
they are from the trainer's.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from dist_cpt.adapters.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, import_peft, without_peft_deprecations
from dist_cpt.adapters.quantize import load_nf4
from dist_cpt.errors import CheckpointError, ConfigError, WriteError
from dist_cpt.model.load import WEIGHTS_DTYPE, locate_base, weights_sha256

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
MAX_RELATIVE_DIFFERENCE = 1e-5  # of the largest logit, fp32
_PROBE_TOKENS = 32


def merge(checkpoint: str | Path, out: str | Path, dtype: str = "bf16", *, base: str | None = None) -> float:
    """Write base and adapter of a checkpoint as one Hugging Face folder; a full-parameter one is cast.

    Merging happens in fp32, then the weights are stored in `dtype` (fp32 | bf16). `base` overrides the path
    in the manifest, for a base that moved. Returns the largest absolute difference between the logits of the
    written folder and those of the checkpoint, both computed in fp32, over probe tokens.

    Raises:
        CheckpointError: no checkpoint, another base than the run had, or fp32 logits that differ.
        ConfigError: unknown dtype, or `out` is in use.
        WriteError: `out` cannot be written.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    if dtype not in WEIGHTS_DTYPE:
        raise ConfigError(f"dtype must be fp32 or bf16, not {dtype!r}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists", remedy="give the name of a new folder")
    base_folder = verified_base(checkpoint, base)
    model = load_fp32(checkpoint, base_folder)
    probe = _probe(model.config.vocab_size)
    expected = _logits(model, probe)
    if base_folder is not None:
        model = model.merge_and_unload()
    staging = _write(model.to(WEIGHTS_DTYPE[dtype]), out, [checkpoint, *([base_folder] if base_folder else [])])
    try:
        del model
        difference = float((_logits(_plain_model(staging), probe) - expected).abs().max())
        allowed = MAX_RELATIVE_DIFFERENCE * max(1.0, float(expected.abs().max()))
        if not difference <= allowed and dtype == "fp32":
            raise CheckpointError(
                f"the merged model's logits differ from the checkpoint's by {difference:.2e}, allowed {allowed:.2e}"
            )
        _publish(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return difference


def nf4_gap(checkpoint: str | Path, *, base: str | None = None) -> float | None:
    """How far the trainer's NF4 base is from the one that `merge` and `generate` use, under the trained adapter.

    The largest absolute difference of their logits, both computed in fp32, over probe tokens; None if the run's
    base was not quantised. `base` as for `merge`.

    Raises:
        CheckpointError: no checkpoint, or another base than the run had.
        MissingExtraError: bitsandbytes is not installed.
    """
    checkpoint = Path(checkpoint)
    if _manifest(checkpoint)["base"].get("weights") != "nf4":
        return None
    base_folder = verified_base(checkpoint, base)
    assert base_folder is not None  # only adapters train over NF4
    plain = load_fp32(checkpoint, base_folder)
    probe = _probe(plain.config.vocab_size)
    expected = _logits(plain, probe)
    del plain
    quantised = load_nf4(base_folder, None, torch.device("cpu"))
    for parameter in quantised.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    return float((_logits(_under_adapter(quantised, checkpoint), probe) - expected).abs().max())


def verified_base(checkpoint: Path, override: str | None = None) -> Path | None:
    """The base folder of an adapter checkpoint, its weights hashed against the manifest; None without adapter.

    Raises:
        CheckpointError: no manifest, or the base's weights are not those of the run.
    """
    manifest = _manifest(checkpoint)
    if not manifest["adapter"]:
        return None
    identity = manifest["base"]
    folder = locate_base(override or identity["path"], None if override else identity["revision"])
    found = weights_sha256(folder)
    if found != identity["sha256"]:
        raise CheckpointError(
            f"the base at {folder} has sha256 {found[:12]}, the run had {identity['sha256'][:12]}",
            remedy="give the base that the run was started from",
        )
    return folder


def load_fp32(checkpoint: Path, base_folder: Path | None) -> Any:
    """The model of a checkpoint in fp32: under vanilla PEFT on its base, or plain.

    Raises:
        CheckpointError: the adapter's files are missing or pickled.
    """
    if base_folder is None:
        return _plain_model(checkpoint)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (checkpoint / name).is_file():
            raise CheckpointError(f"{checkpoint} has no {name}", remedy="adapters are read from safetensors only")
    return _under_adapter(_plain_model(base_folder), checkpoint)


def _under_adapter(model: Any, checkpoint: Path) -> Any:
    peft = import_peft()
    with without_peft_deprecations():
        return peft.PeftModel.from_pretrained(model, str(checkpoint)).eval()


def _plain_model(folder: Path) -> Any:
    import_peft()  # before transformers brings in what peft would, less quietly
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    locate_base(str(folder), None)  # refuses pickled weights
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    )
    return model.eval()


def _manifest(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "manifest.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content = content.get("content", content)
        return {"adapter": bool(content["adapter"]), "base": dict(content["base"])}
    except FileNotFoundError:
        raise CheckpointError(f"{checkpoint} is no checkpoint: it has no manifest.json") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}", remedy="dist-cpt verify shows what holds") from error


def _probe(vocab_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (1, _PROBE_TOKENS), generator=generator)


def _logits(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=input_ids, use_cache=False).logits.float()


def _write(model: Any, out: Path, tokenizer_folders: list[Path]) -> Path:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        staging.chmod(0o755)  # mkdtemp's 0700 would follow the folder to its final name
        model.save_pretrained(staging)
        _copy_tokenizer(tokenizer_folders, staging)
    except OSError as error:
        raise WriteError(f"{out} cannot be written: {error}", remedy="check space and permissions") from error
    return staging


def _copy_tokenizer(folders: list[Path], out: Path) -> None:
    for folder in folders:
        found = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
        if found:
            for file in found:
                shutil.copyfile(file, out / file.name)
            return
    raise CheckpointError(
        f"no tokenizer in {' or '.join(map(str, folders))}",
        remedy="put the tokenizer's files into the checkpoint's base",
    )


def _publish(staging: Path, out: Path) -> None:
    try:
        os.replace(staging, out)  # an empty folder at `out` is replaced
    except OSError as error:
        raise WriteError(f"{out} cannot be written: {error}") from error
