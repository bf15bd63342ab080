"""A trained adapter in the formats of other programs: PEFT, vLLM, llama.cpp.

Each format is read back by PEFT, or by the program's own converter, and must give the checkpoint's logits.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from dist_cpt.adapters.lora import import_peft, without_peft_deprecations
from dist_cpt.adapters.peft_folder import (
    BASE_PREFIX,
    PRIOR_KEY,
    ROPE_KEY,
    canonical_key,
    read_adapter_config,
    write_adapter_config,
)
from dist_cpt.adapters.pissa import read_initial
from dist_cpt.errors import ConfigError
from dist_cpt.export.checkpoint_model import (
    base_model,
    find_base,
    load_fp32,
    plain_model,
    probe_logits,
    require_same_logits,
)
from dist_cpt.export.merge import merge
from dist_cpt.export.model_folder import copy_tokenizer, require_dtype, round_to, write_model
from dist_cpt.model.classify import LABELS, is_classifier, read_labels
from dist_cpt.run_folder.names import ADAPTER_WEIGHTS, INITIAL_ADAPTER
from dist_cpt.run_folder.staging import new_output, require_new

CONVERTER = "convert_hf_to_gguf.py"
_GGUF_TYPES = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the values of --max-lora-rank
_SERVE_MERGED = "serve the result of dist-cpt merge"


def export_peft(checkpoint: str | Path, out: str | Path, *, base: str | None = None) -> float:
    """Write a PEFT folder of plain LoRA on the run's own base, also for a run that started with PiSSA.

    A PiSSA adapter of rank r belongs to the base minus the initial B A; on the base itself it is (A, B) minus the
    initial (A, B), of rank 2 r. Returns the largest absolute difference of fp32 logits.

    Raises:
        ConfigError: no adapter, or one on top of another; `out` is in use.
        CheckpointError: as `merge`.
        WriteError: `out` cannot be written.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    require_new(out)
    base_folder, config = _adapter(checkpoint, base)
    if config.get(PRIOR_KEY) is not None:
        raise ConfigError(
            f"{checkpoint} was trained on top of another adapter: it is not an adapter of the base alone",
            remedy="use --format vllm, which writes the model under it, or dist-cpt merge",
        )
    if config.get(ROPE_KEY) is not None:
        raise ConfigError(
            f"{checkpoint} was trained with model.rope_scaling: it is not an adapter of the base as it is",
            remedy="use --format vllm, which writes the rescaled base, or dist-cpt merge",
        )
    expected = probe_logits(load_fp32(checkpoint, base_folder))
    with new_output(out) as folder:
        folder.mkdir()
        _write_plain_lora(checkpoint, folder, str(config.get("base_model_name_or_path")), vocabulary=True)
        copy_tokenizer([checkpoint, base_folder], folder)
        if read_labels(checkpoint) is not None:
            shutil.copyfile(checkpoint / LABELS, folder / LABELS)
        return require_same_logits("the adapter", probe_logits(load_fp32(folder, base_folder)), expected)


def export_vllm(checkpoint: str | Path, out: str | Path, dtype: str = "bf16", *, base: str | None = None) -> float:
    """Write `base/`, `adapter/` and a README.md with the command for vLLM, which reads LoRA pairs and nothing else.

    `base/` is the run's base in `dtype` with everything that is not a LoRA pair of this run: trained embeddings, head
    and routers, new rows, a prior adapter. `adapter/` is plain LoRA on it. Together they give the checkpoint's logits
    but for the rounding of `base/`; the largest absolute difference is returned.

    Raises:
        ConfigError: no adapter, DoRA, a classifier, or a rank that vLLM does not support; `out` is in use.
        CheckpointError: as `merge`, or the pieces give other logits.
        WriteError: `out` cannot be written.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    require_dtype(dtype)
    require_new(out)
    base_folder, config = _adapter(checkpoint, base)
    if config.get("use_dora"):
        raise ConfigError(f"{checkpoint} is DoRA, which vLLM does not read", remedy=_SERVE_MERGED)
    if read_labels(checkpoint) is not None:
        raise ConfigError(f"{checkpoint} is a classifier", remedy=_SERVE_MERGED)
    if config.get("target_parameters"):
        raise ConfigError(f"{checkpoint} adapts experts, which this export does not write", remedy=_SERVE_MERGED)
    rank = int(config["r"]) * (2 if (checkpoint / INITIAL_ADAPTER).is_file() else 1)
    if rank > _VLLM_RANKS[-1]:
        raise ConfigError(f"{checkpoint}: rank {rank}, vLLM supports up to {_VLLM_RANKS[-1]}", remedy=_SERVE_MERGED)
    expected = probe_logits(load_fp32(checkpoint, base_folder))
    with new_output(out) as folder:
        adapter = folder / "adapter"
        adapter.mkdir(parents=True)
        _write_plain_lora(checkpoint, adapter, str(out.resolve() / "base"), vocabulary=False)
        pieces = _under_plain_lora(base_model(checkpoint, base_folder, with_whole=True), adapter)
        require_same_logits("base/ and adapter/", probe_logits(pieces), expected)
        model = round_to(pieces.unload(), dtype, base_folder)
        write_model(model, folder / "base", [checkpoint, base_folder])
        (folder / "README.md").write_text(_readme(out.name, rank, dtype), encoding="utf-8")
        logits = probe_logits(_under_plain_lora(plain_model(folder / "base"), adapter))
        rounded = probe_logits(_under_plain_lora(model.float(), adapter))
        require_same_logits("the written base/ and adapter/", logits, rounded)
        return float((logits - expected).abs().max())


def export_gguf(
    checkpoint: str | Path,
    out: str | Path,
    llama_cpp: str | Path | None,
    dtype: str = "bf16",
    *,
    base: str | None = None,
) -> None:
    """Merge, then let the converter in `llama_cpp`, a checkout of llama.cpp, write the GGUF file `out`.

    Raises:
        ConfigError: no converter, or it failed, with its last line of output.
        CheckpointError: as `merge`.
        WriteError: `out` cannot be written.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    if out.exists():
        raise ConfigError(f"{out} exists", remedy="give the name of a new file")
    if dtype not in _GGUF_TYPES:
        raise ConfigError(f"dtype must be one of {', '.join(_GGUF_TYPES)}, not {dtype!r}")
    converter = require_converter(llama_cpp)
    with new_output(out) as file:
        model = file.with_name("model")
        merge(checkpoint, model, dtype, base=base)
        command = [sys.executable, str(converter), str(model), "--outfile", str(file), "--outtype", _GGUF_TYPES[dtype]]
        converted = subprocess.run(command, capture_output=True, text=True, check=False)
        if converted.returncode or not file.is_file():
            lines = [line.strip() for line in (converted.stdout + converted.stderr).splitlines() if line.strip()]
            raise ConfigError(
                f"{converter.name} ended with {converted.returncode}: {(lines or ['no output'])[-1][:300]}",
                remedy="llama.cpp must support this architecture, and its requirements must be installed",
            )


def require_converter(llama_cpp: str | Path | None) -> Path:
    """The converter in a checkout of llama.cpp.

    Raises:
        ConfigError: it, or the package gguf that it needs, is missing.
    """
    remedy = "clone ggml-org/llama.cpp, pip install gguf, and give the clone as --llama-cpp"
    if llama_cpp is None:
        raise ConfigError("--format gguf needs llama.cpp's converter", remedy=remedy)
    converter = Path(llama_cpp) / CONVERTER
    if not converter.is_file():
        raise ConfigError(f"--llama-cpp {llama_cpp} has no {CONVERTER}", remedy=remedy)
    if importlib.util.find_spec("gguf") is None and not (Path(llama_cpp) / "gguf-py").is_dir():
        raise ConfigError("--format gguf needs the package gguf, which is not installed", remedy="pip install gguf")
    return converter


def _adapter(checkpoint: Path, base: str | None) -> tuple[Path, dict[str, Any]]:
    """The base folder and the adapter_config.json of an adapter."""
    base_folder = find_base(checkpoint, base)
    if base_folder is None:
        kind = "a classifier" if is_classifier(checkpoint) else "a whole model"
        raise ConfigError(
            f"{checkpoint} is {kind}, not an adapter", remedy="use dist-cpt merge, whose result every program reads"
        )
    return base_folder, read_adapter_config(checkpoint)


def _under_plain_lora(model: Any, adapter: Path) -> Any:
    with without_peft_deprecations(), warnings.catch_warnings():
        return import_peft().PeftModel.from_pretrained(model, str(adapter)).eval()


def _write_plain_lora(checkpoint: Path, out: Path, base_name: str, *, vocabulary: bool) -> None:
    """The checkpoint's LoRA pairs as plain LoRA on the unchanged base; with `vocabulary` also its whole matrices."""
    from safetensors.torch import load_file, save_file

    config = read_adapter_config(checkpoint)
    tensors: dict[str, torch.Tensor] = {}
    for key, values in load_file(checkpoint / ADAPTER_WEIGHTS).items():
        name = canonical_key(key)
        if name is not None and (vocabulary or ".lora_" in name):
            tensors[name] = values
    if (checkpoint / INITIAL_ADAPTER).is_file():
        initial = read_initial(checkpoint / INITIAL_ADAPTER)
        for module, (a, b) in initial.pairs.items():
            key_a, key_b = (f"{BASE_PREFIX}{module}.{half}.weight" for half in ("lora_A", "lora_B"))
            tensors[key_a] = torch.cat([tensors[key_a], a])
            tensors[key_b] = torch.cat([tensors[key_b], -b], 1)
        rank = 2 * int(config["r"])
        config |= {"r": rank, "lora_alpha": initial.scale * rank, "use_rslora": False, "init_lora_weights": True}
    config |= {"base_model_name_or_path": base_name}
    for key in (PRIOR_KEY, ROPE_KEY):
        config.pop(key, None)
    if not vocabulary:
        config |= {"modules_to_save": None, "ensure_weight_tying": False, "revision": None}
    save_file({name: values.contiguous() for name, values in tensors.items()}, out / ADAPTER_WEIGHTS, {"format": "pt"})
    write_adapter_config(out, config)


def _readme(name: str, rank: int, dtype: str) -> str:
    limit = next(allowed for allowed in _VLLM_RANKS if allowed >= rank)
    return f"""# {name}

`base/` is a whole model in {dtype}: the base of the run with everything that was trained in full (embeddings, head,
routers, new rows) and with a prior adapter, if the run started from one. `adapter/` holds the run's LoRA pairs (rank
{rank}) and nothing else; it belongs to this `base/`, not to the model that the run started from.

    vllm serve base --enable-lora --max-lora-rank {limit} --lora-modules {name}=adapter

Request the model `{name}`; the name of the base answers without the adapter.
"""
