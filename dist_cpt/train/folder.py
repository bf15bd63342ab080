"""The run folder: who may train in it, and what it says when a run ends."""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from dist_cpt.config.load import build, parse_yaml
from dist_cpt.config.resolve import differences, fingerprint, to_yaml
from dist_cpt.config.schema import RunConfig
from dist_cpt.errors import ConfigError, WriteError


@dataclass(frozen=True)
class Claim:
    """Rank 0's hold on a run folder; released with `close` or by the end of the process."""

    attempt: int  # 0 for the first start
    wandb_run_id: str
    lock: TextIO

    def close(self) -> None:
        """Let another process train in the folder."""
        self.lock.close()


def claim(folder: Path, config: RunConfig, new_run_id: str) -> Claim:
    """Take the folder for this start: same recipe or none yet, nobody else in it; count the attempt.

    Raises:
        ConfigError: the folder holds another recipe, or another process trains in it.
        WriteError: the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a", encoding="utf-8")
    except OSError as error:
        raise WriteError(
            f"run folder {folder} cannot be written: {error.strerror}", remedy="choose another output_dir"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise ConfigError(
            f"another process trains in {folder}", remedy="wait for it, stop it, or give this run another name"
        ) from None
    try:
        _same_recipe(folder / "recipe.yaml", config)
        known = _read_json(folder / "run.json")
        started = {
            "wandb_run_id": known.get("wandb_run_id", new_run_id),
            "attempts": int(known.get("attempts", 0)) + 1,
            "fingerprint": fingerprint(config),
        }
        _write(folder / "recipe.yaml", to_yaml(config))
        _write(folder / "run.json", json.dumps(started, indent=1) + "\n")
        (folder / "exit.json").unlink(missing_ok=True)
    except OSError as error:
        lock.close()
        raise WriteError(f"run folder {folder} cannot be written: {error.strerror}") from error
    except Exception:
        lock.close()
        raise
    return Claim(started["attempts"] - 1, started["wandb_run_id"], lock)


def write_exit(folder: Path, code: int, reason: str, step: int) -> None:
    """exit.json: what torchrun's exit code cannot say.

    Raises:
        WriteError: the file cannot be written.
    """
    try:
        _write(folder / "exit.json", json.dumps({"code": code, "reason": reason, "step": step}, indent=1) + "\n")
    except OSError as error:
        raise WriteError(f"{folder / 'exit.json'} cannot be written: {error.strerror}") from error


def write_json(path: Path, value: Any) -> None:
    """A JSON file that is whole or not there.

    Raises:
        WriteError: the file cannot be written.
    """
    try:
        _write(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise WriteError(f"{path} cannot be written: {error.strerror}") from error


def _same_recipe(path: Path, config: RunConfig) -> None:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return
    held = build(parse_yaml(text, str(path)), where=str(path))
    if fingerprint(held) != fingerprint(config):
        changed = "; ".join(differences(held, config)[:5])
        raise ConfigError(
            f"{path.parent} holds a run of another recipe ({changed})",
            remedy="give this run another name, or undo the change",
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
