"""Values of secrets, which must not reach logs, W&B, manifests, batch scripts or command lines. Torch-free."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping

from dist_cpt.errors import ConfigError

SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
MIN_LENGTH = 8  # a shorter value occurs in ordinary text


def secret_values(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment variables that look like secrets by their name."""
    return {name: value for name, value in environ.items() if SECRET_NAME.search(name) and len(value) >= MIN_LENGTH}


def require_no_secrets(texts: Iterable[str], what: str) -> None:
    """Check text that is about to be rendered against the secrets in the environment.

    Raises:
        ConfigError: a text contains the value of a secret, or a URL with a password. The message names the variable,
            never the value.
    """
    secrets = sorted(secret_values().items())
    for text in texts:
        for name, value in secrets:
            if value in text:
                raise ConfigError(
                    f"{what} contains the value of {name}",
                    remedy="remove it; the job reads the variable from its own environment",
                )
        if re.search(r"://[^/@\s:]+:[^/@\s]+@", text):
            raise ConfigError(f"{what} contains a URL with a password", remedy="remove the password")
