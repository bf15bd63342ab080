"""What a recipe must allow explicitly: running a model's own code, and pretraining an instruct checkpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from dist_cpt.adapters.peft_folder import file_sha256
from dist_cpt.config.schema import ModelConfig
from dist_cpt.errors import ConfigError
from dist_cpt.run_folder.names import MODEL_CONFIG
from dist_cpt.runtime.log import LOGGER
from dist_cpt.storage import read_bytes

_INSTRUCT = re.compile(r"(^|[-_.])(it|instruct|chat|sft|dpo|rlhf|assistant)([-_.]|$)", re.IGNORECASE)


def require_trusted_code(folder: Path, settings: ModelConfig) -> bool:
    """Whether the model needs its own Python code; False where transformers implements the architecture.

    Raises:
        ConfigError: the recipe does not trust that code, or it is in another repository.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    values = json.loads(read_bytes(folder / MODEL_CONFIG))
    code = sorted({str(name) for name in (values.get("auto_map") or {}).values()})
    known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    if not code or values.get("model_type") in known:
        return False
    if not settings.trust_remote_code:
        raise ConfigError(
            f"model.path: {settings.path} needs its own code to run ({', '.join(code)})",
            remedy="read that code, then set model.trust_remote_code: true and model.revision to a commit hash",
        )
    if elsewhere := [name for name in code if "--" in name]:
        raise ConfigError(
            f"model.path: {settings.path} loads code from another repository, which no revision pins: {elsewhere[0]}",
            remedy="copy that code into the model's folder",
        )
    return True


def code_sha256s(folder: Path) -> dict[str, str]:
    """sha256 of every Python file of a model folder, by name."""
    return {path.name: file_sha256(path) for path in sorted(folder.glob("*.py"))}


def require_base_checkpoint(settings: ModelConfig, tokenizer: Any) -> None:
    """Refuse continued pretraining of an instruct checkpoint unless the recipe allows it.

    An instruct checkpoint is recognised by its name and the tokenizer's chat template; only one of them is a warning.

    Raises:
        ConfigError: both, without `model.allow_instruct`.
    """
    name = None if settings.path is None else settings.path.rstrip("/").rpartition("/")[2]
    named = name is not None and _INSTRUCT.search(name) is not None
    templated = bool(getattr(tokenizer, "chat_template", None))
    if named and templated and not settings.allow_instruct:
        raise ConfigError(
            f"model.path: {settings.path} looks like an instruct checkpoint (its name, and a chat template); continued "
            "pretraining on plain text undoes its tuning",
            remedy="start from the base model, or set model.allow_instruct: true",
        )
    if named or templated:
        signs = "and ".join(["its name "] * named + ["a chat template "] * templated).strip()
        LOGGER.warning(
            "%s looks like an instruct checkpoint (%s); continued pretraining undoes its tuning", name, signs
        )
