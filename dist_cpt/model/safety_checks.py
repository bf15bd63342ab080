"""What a run does only where the recipe says so: run a model's own code, or pretrain an instruct checkpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from dist_cpt.config.schema import ModelConfig
from dist_cpt.errors import ConfigError
from dist_cpt.runtime.log import LOGGER

_INSTRUCT = re.compile(r"(^|[-_.])(it|instruct|chat|sft|dpo|rlhf|assistant)([-_.]|$)", re.IGNORECASE)


def require_code_consent(folder: Path, chosen: ModelConfig) -> bool:
    """Whether the model's own Python code has to run and may; False where transformers has the architecture itself.

    Raises:
        ConfigError: it would have to run, and the recipe does not allow it, or the code lies elsewhere.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    code = sorted({str(name) for name in (values.get("auto_map") or {}).values()})
    if not code or values.get("model_type") in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return False
    if not chosen.trust_remote_code:
        raise ConfigError(
            f"model.path: {chosen.path} needs code of its own to run ({', '.join(code)})",
            remedy="read that code, then set model.trust_remote_code: true and model.revision to a commit hash",
        )
    if elsewhere := [name for name in code if "--" in name]:
        raise ConfigError(
            f"model.path: {chosen.path} takes its code from another repository, which no revision pins: {elsewhere[0]}",
            remedy="put that code into the model's folder",
        )
    return True


def code_sha256s(folder: Path) -> dict[str, str]:
    """sha256 of every Python file of a model folder, by name."""
    import hashlib

    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.py"))}


def require_base_checkpoint(chosen: ModelConfig, tokenizer: Any) -> None:
    """Refuse continued pretraining of what looks like an instruct checkpoint, unless the recipe allows it; warn then.

    It looks like one if its name says so and its tokenizer brings a chat template. One sign alone is a warning.

    Raises:
        ConfigError: both signs, and no model.allow_instruct.
    """
    name = None if chosen.path is None else chosen.path.rstrip("/").rpartition("/")[2]
    named = name is not None and _INSTRUCT.search(name) is not None
    templated = bool(getattr(tokenizer, "chat_template", None))
    if named and templated and not chosen.allow_instruct:
        raise ConfigError(
            f"model.path: {chosen.path} looks like an instruct checkpoint (its name, and a chat template): continued "
            "pretraining on plain text undoes what it was tuned for",
            remedy="start from the base model, or set model.allow_instruct: true",
        )
    if named or templated:
        sign = "and ".join(["its name "] * named + ["a chat template "] * templated).strip()
        LOGGER.warning("%s looks like an instruct checkpoint (%s); pretraining on plain text undoes that", name, sign)
