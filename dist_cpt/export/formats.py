"""A trained adapter in the shape that other programs read: plain PEFT, vLLM, llama.cpp.

Each layout is read back by the libraries it is for, or by vanilla PEFT, and must give the checkpoint's logits.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dist_cpt.adapters.lora import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    canonical_key,
    import_peft,
    without_peft_deprecations,
)
from dist_cpt.adapters.pissa import INITIAL, modules_of, read_initial
from dist_cpt.adapters.prior_adapter import STANDS_ON
from dist_cpt.errors import CheckpointError, ConfigError, WriteError
from dist_cpt.export.merge import (
    copy_tokenizer,
    ground_of,
    load_fp32,
    logits_of,
    merge,
    plain_model,
    probe_ids,
    publish,
    require_new,
    require_same_logits,
    round_to,
    verified_base,
    write_model,
)
from dist_cpt.model.classify import LABELS, is_classifier, read_labels

CONVERTER = "convert_hf_to_gguf.py"
_GGUF_TYPES = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes


def export_peft(checkpoint: str | Path, out: str | Path, *, base: str | None = None) -> float:
    """Write a PEFT folder of plain LoRA for the run's own base, also where the run began with PiSSA.

    A PiSSA adapter of rank r belongs to what it left of the base; on the base itself it is
    (A, B) - (A at the start, B at the start), of rank 2 r. Returns the largest difference of fp32 logits.

    Raises:
        ConfigError: no adapter, or one that stands on another; `out` is in use.
        CheckpointError: as `merge`.
        WriteError: `out` cannot be written.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    require_new(out, "fp32")
    folder, _ = _adapter(checkpoint, base)
    config = _config(checkpoint)
    if config.get(STANDS_ON) is not None:
        raise ConfigError(
            f"{checkpoint} stands on another adapter: it is none of the base alone",
            remedy="use --format vllm, which writes what it stands on, or dist-cpt merge",
        )
    model = load_fp32(checkpoint, folder)
    probe = probe_ids(model.config.vocab_size)
    expected = logits_of(model, probe)
    del model

    def fill(staging: Path) -> float:
        _write_plain(checkpoint, staging, str(config.get("base_model_name_or_path")), vocabulary=True)
        copy_tokenizer([checkpoint, folder], staging)
        if read_labels(checkpoint) is not None:
            shutil.copyfile(checkpoint / LABELS, staging / LABELS)
        found = logits_of(load_fp32(staging, folder), probe)
        require_same_logits("the adapter", found, expected)
        return float((found - expected).abs().max())

    return _staged(out, fill)


def export_vllm(checkpoint: str | Path, out: str | Path, dtype: str = "bf16", *, base: str | None = None) -> float:
    """Write `base/`, `adapter/` and a README.md with the command for vLLM, which reads LoRA pairs and nothing else.

    `base/` is the run's base with all in it that is no LoRA pair of this run: trained embeddings and head, new rows,
    an earlier adapter; in `dtype`. `adapter/` is plain LoRA for it. Together they give the checkpoint's logits, with
    the weights of `base/` rounded; the largest difference that this makes is returned.

    Raises:
        ConfigError: no adapter, DoRA, a classifier, or a rank beyond what vLLM takes; `out` is in use.
        CheckpointError: as `merge`, or the pieces give other logits.
        WriteError: `out` cannot be written.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    require_new(out, dtype)
    folder, config = _adapter(checkpoint, base)
    if config.get("use_dora"):
        raise ConfigError(
            f"{checkpoint} is DoRA, which vLLM does not read", remedy="serve the result of dist-cpt merge"
        )
    if read_labels(checkpoint) is not None:
        raise ConfigError(f"{checkpoint} is a classifier", remedy="serve the result of dist-cpt merge")
    rank = int(config["r"]) * (2 if (checkpoint / INITIAL).is_file() else 1)
    if rank > _VLLM_RANKS[-1]:
        raise ConfigError(
            f"{checkpoint}: rank {rank}, vLLM takes up to {_VLLM_RANKS[-1]}",
            remedy="serve the result of dist-cpt merge",
        )
    trained = load_fp32(checkpoint, folder)
    probe = probe_ids(trained.config.vocab_size)
    expected = logits_of(trained, probe)
    del trained

    def fill(staging: Path) -> float:
        model = ground_of(checkpoint, folder, with_vocabulary=True)
        write_model(round_to(model, dtype), staging / "base", [checkpoint, folder])
        (staging / "adapter").mkdir()
        _write_plain(checkpoint, staging / "adapter", str(out.resolve() / "base"), vocabulary=False)
        (staging / "README.md").write_text(_readme(out.name, rank, dtype), encoding="utf-8")
        found = logits_of(under_plain(plain_model(staging / "base"), staging / "adapter"), probe)
        require_same_logits(
            "base/ and adapter/", found, logits_of(under_plain(model.float(), staging / "adapter"), probe)
        )
        if dtype == "fp32":
            require_same_logits("base/ and adapter/", found, expected)
        return float((found - expected).abs().max())

    return _staged(out, fill)


def export_gguf(
    checkpoint: str | Path,
    out: str | Path,
    llama_cpp: str | Path | None,
    dtype: str = "bf16",
    *,
    base: str | None = None,
) -> None:
    """Merge, then let llama.cpp's own converter write the GGUF file `out`.

    `llama_cpp` is a checkout of llama.cpp; it is not installed from here.

    Raises:
        ConfigError: no converter, or it failed, with what it said.
        CheckpointError: as `merge`.
        WriteError: `out` cannot be written.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    if out.exists():
        raise ConfigError(f"{out} exists", remedy="give the name of a new file")
    if dtype not in _GGUF_TYPES:
        raise ConfigError(f"dtype must be one of {', '.join(_GGUF_TYPES)}, not {dtype!r}")
    converter = require_converter(llama_cpp)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as work:
            merge(checkpoint, Path(work) / "model", dtype, base=base)
            staging = Path(work) / "model.gguf"
            command = [sys.executable, str(converter), str(Path(work) / "model")]
            command += ["--outfile", str(staging), "--outtype", _GGUF_TYPES[dtype]]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()] or ["nothing"]
            if done.returncode or not staging.is_file():
                raise ConfigError(
                    f"{converter.name} ended with {done.returncode}: {said[-1].strip()[:300]}",
                    remedy="llama.cpp must know this architecture, and its requirements be installed",
                )
            os.replace(staging, out)
    except OSError as error:
        raise WriteError(f"{out} cannot be written: {error}", remedy="check space and permissions") from error


def require_converter(llama_cpp: str | Path | None) -> Path:
    """The converter in a checkout of llama.cpp.

    Raises:
        ConfigError: it, or the package gguf that it needs, is not there.
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


def under_plain(model: Any, adapter: Path) -> Any:
    """A plain model under a PEFT folder of plain LoRA, in fp32."""
    with without_peft_deprecations(), warnings.catch_warnings():
        return import_peft().PeftModel.from_pretrained(model, str(adapter)).eval()


def _adapter(checkpoint: Path, base: str | None) -> tuple[Path, dict[str, Any]]:
    folder = verified_base(checkpoint, base)
    if folder is None:
        what = "a classifier" if is_classifier(checkpoint) else "a whole model"
        raise ConfigError(f"{checkpoint} is {what}, no adapter", remedy="use dist-cpt merge: every program reads that")
    return folder, _config(checkpoint)


def _config(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / ADAPTER_CONFIG} cannot be read: {error}") from None


def _write_plain(checkpoint: Path, out: Path, base_name: str, *, vocabulary: bool) -> None:
    """The LoRA pairs of a checkpoint as plain LoRA on the unchanged base; its whole matrices beside them if wanted."""
    from safetensors.torch import load_file, save_file

    config = _config(checkpoint)
    tensors: dict[str, torch.Tensor] = {}
    for key, values in load_file(checkpoint / ADAPTER_WEIGHTS).items():
        name = canonical_key(key)
        if name is not None and (vocabulary or ".lora_" in name):
            tensors[name] = values
    if (checkpoint / INITIAL).is_file():
        began, scale = read_initial(checkpoint / INITIAL)
        for module in modules_of(began):
            a, b = (f"base_model.model.{module}.{half}.weight" for half in ("lora_A", "lora_B"))
            tensors[a] = torch.cat([tensors[a], began[f"{module}.lora_A.weight"]])
            tensors[b] = torch.cat([tensors[b], -began[f"{module}.lora_B.weight"]], 1)
        rank = 2 * int(config["r"])
        config |= {"r": rank, "lora_alpha": scale * rank, "use_rslora": False, "init_lora_weights": True}
    config |= {"base_model_name_or_path": base_name}
    config.pop(STANDS_ON, None)
    if not vocabulary:
        config |= {"modules_to_save": None, "ensure_weight_tying": False, "revision": None}
    save_file({name: values.contiguous() for name, values in tensors.items()}, out / ADAPTER_WEIGHTS, {"format": "pt"})
    (out / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _readme(name: str, rank: int, dtype: str) -> str:
    limit = next(allowed for allowed in _VLLM_RANKS if allowed >= rank)
    return f"""# {name}

`base/` is a whole model in {dtype}: the base of the run with everything that was trained in full, that is
embeddings, head and new rows, and with any earlier adapter that the run stood on. `adapter/` holds the run's LoRA
pairs (rank {rank}) and nothing else; it belongs to this `base/`, not to the model that the run started from.

    vllm serve base --enable-lora --max-lora-rank {limit} --lora-modules {name}=adapter

Ask for the model `{name}`; the name of the base answers without the adapter.
"""


def _staged(out: Path, fill: Callable[[Path], float]) -> float:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        staging.chmod(0o755)  # mkdtemp's 0700 would follow the folder to its final name
    except OSError as error:
        raise WriteError(f"{out} cannot be written: {error}", remedy="check space and permissions") from error
    try:
        found = fill(staging)
        publish(staging, out)
        return found
    except OSError as error:
        raise WriteError(f"{out} cannot be written: {error}", remedy="check space and permissions") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
