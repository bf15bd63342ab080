"""The cluster's settings file for `launch --on kubernetes`: image, volumes, resources, and Secrets by name."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import Field, PositiveInt, ValidationError, field_validator

from dist_cpt.config.load import parse_yaml
from dist_cpt.config.schema import Frozen
from dist_cpt.errors import ConfigError
from dist_cpt.runtime.secret_values import SECRET_NAME

_LABEL = r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"
_SUBDOMAIN = r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$"
_QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|[kMGTPE]i?)?$"


class SecretRef(Frozen):
    """A key of a Secret in the namespace; its value is never read here."""

    name: str = Field(pattern=_SUBDOMAIN)
    key: str = Field(pattern=r"^[-._a-zA-Z0-9]{1,253}$")
    optional: bool = False


class Volume(Frozen):
    """A persistent volume claim and its mount point."""

    claim: str = Field(pattern=_SUBDOMAIN)
    path: str = Field(pattern=r"^/[A-Za-z0-9._/-]*$")
    read_only: bool = False


class ClusterSettings(Frozen):
    """Everything about the cluster that is not in the recipe; no field takes the value of a secret."""

    image: str = Field(pattern=r"^[a-z0-9][A-Za-z0-9._/:@-]{0,511}$")
    volumes: tuple[Volume, ...] = Field(min_length=1)  # relative paths of the recipe start at the first one
    namespace: str = Field(default="default", pattern=_LABEL)
    accelerator: str | None = Field(default="nvidia.com/gpu", pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$")  # null: CPU
    cpu: str | None = Field(default=None, pattern=_QUANTITY)
    memory: str | None = Field(default=None, pattern=_QUANTITY)
    shared_memory: str = Field(default="16Gi", pattern=_QUANTITY)  # /dev/shm, for NCCL
    secrets: dict[str, SecretRef] = Field(default_factory=dict)  # by environment variable
    env: dict[str, str] = Field(default_factory=dict)
    node_selector: dict[str, str] = Field(default_factory=dict)
    service_account: str | None = Field(default=None, pattern=_SUBDOMAIN)
    image_pull_secret: str | None = Field(default=None, pattern=_SUBDOMAIN)
    max_restarts: int = Field(default=20, ge=0)
    grace_seconds: PositiveInt | None = None  # to stop and save; default: measured in the run folder, else 300
    preflight: bool = True  # check every node before the ranks start

    @field_validator("env", "secrets")
    @classmethod
    def _variable_names(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"{name!r} is not a valid name of an environment variable")
        return value

    @field_validator("env")
    @classmethod
    def _no_secrets(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if SECRET_NAME.search(name):
                raise ValueError(f"{name} looks like a secret; name its Secret under `secrets`")
            if name.startswith("PET_") or name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
                raise ValueError(f"{name} is set for each pod and cannot be overridden")
        return value

    @field_validator("volumes")
    @classmethod
    def _mount_points(cls, value: tuple[Volume, ...]) -> tuple[Volume, ...]:
        for volume in value:
            if ".." in PurePosixPath(volume.path).parts or volume.path == "/":
                raise ValueError(f"volumes: {volume.path} is not a valid mount point")
        if value[0].read_only:
            raise ValueError("volumes: the first one holds the run folder and must be writable")
        return value


def load_settings(path: Path) -> ClusterSettings:
    """The settings in a YAML file.

    Raises:
        ConfigError: the file is missing or not YAML, or a key or value is invalid; one line.
    """
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8'}") from error
    try:
        return ClusterSettings.model_validate(content)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc'])) or 'the file'}: {problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors()
        ]
        raise ConfigError(f"{path}: {'; '.join(problems)}", remedy="docs/kubernetes.md lists the keys") from error
