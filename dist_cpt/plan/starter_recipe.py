"""A commented recipe for a model, text and a machine: the fastest way that fits, by the model of a step."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_cpt.config.load import build, parse_yaml
from dist_cpt.config.schema import RunConfig
from dist_cpt.errors import ConfigError, WriteError
from dist_cpt.plan.devices import CPU, Machine
from dist_cpt.plan.plan import Plan, Way, make_plan, model_config, recipe_patch
from dist_cpt.plan.plan_text import launch_line

SEQ_LEN = 4096
STEP_TOKENS = 262_144
_STEPS_PER_EPOCH = 50  # at least, as far as sizes of files tell
_BYTES_PER_TOKEN, _COMPRESSION = 4, 4  # of English text
_COMPRESSED = (".gz", ".zst", ".xz", ".bz2", ".parquet")


def starter_recipe(model: str, data: Sequence[str], machine: Machine, out: Path) -> str:
    """The text of a recipe that trains LoRA on `data` from `model`, a folder or a hub id in the cache, on `machine`.

    Raises:
        ConfigError: the model is not on this machine, nothing matches `data`, or nothing fits the machine.
    """
    weights = "fp32" if machine.device.name == CPU else "bf16"
    draft: dict[str, Any] = {
        "name": _name(model),
        "model": {"path": model, "weights": weights},
        "adapter": {"rank": 64, "alpha": 64},
        "data": {"seq_len": 1, "sources": [{"path": path} for path in data]},
        "batch": {"global_tokens": 1},
        "train": {"epochs": 1},
    }
    values = model_config(build(draft, "init"))
    seq_len = min(SEQ_LEN, values.get("max_position_embeddings") or values.get("n_positions") or SEQ_LEN)
    draft["data"]["seq_len"] = seq_len
    draft["batch"]["global_tokens"] = _step_tokens(data, seq_len * machine.ranks)
    config = build(draft, "init")
    plan = make_plan(config, values, machine)
    if not plan.ways:
        smallest = plan.too_large[0].peak_bytes / 1e9
        raise ConfigError(
            f"{model} does not fit on {machine.ranks} x {machine.device.name}: at least {smallest:.1f} GB each",
            remedy="use more GPUs, or larger ones",
        )
    text = _render(config, plan, str(out))
    build(parse_yaml(text, "the new recipe"), "the new recipe")
    return text


def write_new(path: Path, text: str) -> None:
    """Write a file that does not exist yet.

    Raises:
        ConfigError: it exists.
        WriteError: it cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{path} exists already", remedy="give another file with --out") from None
    except OSError as error:
        raise WriteError(f"{path} cannot be written: {error.strerror or error}") from error


def _name(model: str) -> str:
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name).strip("-._").lower()
    return f"{stem[:100] or 'model'}-cpt"


def _step_tokens(data: Sequence[str], multiple: int) -> int:
    """About STEP_TOKENS, fewer for little text, as a multiple of one sequence per rank."""
    sizes = [_size(path) for path in data]
    known = sum(size for size in sizes if size is not None)
    most = STEP_TOKENS if None in sizes else min(STEP_TOKENS, known // _BYTES_PER_TOKEN // _STEPS_PER_EPOCH)
    return max(1, round(most / multiple)) * multiple


def _size(path: str) -> int | None:
    """Bytes of text behind a file, a folder or a pattern; None: on the hub.

    Raises:
        ConfigError: nothing is there.
    """
    if "://" in path:
        return None
    place = os.path.expanduser(path)
    found = glob.glob(place, recursive=True) if glob.has_magic(place) else [place]
    files = [file for start in found for file in _files(Path(start))]
    if not files:
        raise ConfigError(f"--data {path}: no such file, folder or pattern", remedy="give text; docs/data.md")
    return sum(file.stat().st_size * (_COMPRESSION if file.suffix in _COMPRESSED else 1) for file in files)


def _files(start: Path) -> list[Path]:
    return (
        [path for path in start.rglob("*") if path.is_file()] if start.is_dir() else [start] if start.exists() else []
    )


def _render(config: RunConfig, plan: Plan, out: str) -> str:
    way, machine, named = plan.ways[0], plan.machine, json.dumps
    command = launch_line(config, way, machine, out).partition(" --set ")[0]
    sources = "\n".join(f"    - {{path: {named(source.place)}}}" for source in config.data.sources)
    hosts = f"{machine.nodes} x " if machine.nodes > 1 else ""
    return f"""\
# Continued pretraining with LoRA, written by dist-cpt init. Every key: docs/recipe.md.
# Planned for {hosts}{machine.node_devices} x {machine.device.name}: {way.tokens_per_second:,.0f} tokens/s, \
{way.peak_bytes / 1e9:.1f} GB each, by a model and not measured.
# {command}
name: {named(config.name)}
output_dir: runs
model:
  path: {named(config.model.path)}
  weights: {way.weights}  # storage of the frozen base: fp32 | bf16 | fp8 | nf4 | int8; what trains has fp32 masters
adapter: {{kind: lora, rank: 64, alpha: 64}}  # kind: none trains every parameter
# For a new language or many new terms, train the vocabulary as well:
# embeddings: {{train: [embed_tokens, lm_head]}}
data:
  seq_len: {config.data.seq_len}
  sources:
{sources}
    # Some general text keeps what the base knows; weights are shares of the sequences:
    # - {{path: general.jsonl, weight: 0.1, role: replay}}
  # Held-out text: what is learned, and what is forgotten.
  # validation:
  #   - {{name: domain, path: domain-val.jsonl}}
  #   - {{name: general, path: general-val.jsonl, role: retention}}
batch:
  global_tokens: {config.batch.global_tokens}  # of one optimizer step, over all GPUs
  micro_batch: {way.micro_batch}  # sequences per GPU and forward pass
train: {{epochs: 1}}  # or tokens: 1_000_000_000
optim: {{lr: 1.0e-4}}
schedule: {{kind: cosine, warmup_fraction: 0.02}}
engine: {_engine(config, way)}
checkpoint: {{every_minutes: 30, keep: 3}}
"""


def _engine(config: RunConfig, way: Way) -> str:
    """The section as a flow mapping."""
    patch = recipe_patch(config, way)
    keys = {key.removeprefix("engine."): value for key, value in patch.items() if key.startswith("engine.")}
    return "{" + ", ".join(f"{key}: {value}" for key, value in keys.items()) + "}"
