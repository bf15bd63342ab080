"""Values of secrets must not reach anything that is rendered: manifests, batch scripts, command lines."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping

from dist_cpt.errors import ConfigError

SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
MIN_LENGTH = 8  # a shorter value would be found in any text


def require_no_secrets(texts: Iterable[str], what: str, environ: Mapping[str, str] = os.environ) -> None:
    """Check what is about to be rendered against the secrets that this process knows.

    Raises:
        ConfigError: the value of an environment variable with a secret's name stands in a text, or a URL has a
            password in it. The message names the variable and not the value.
    """
    secrets = {name: value for name, value in environ.items() if SECRET_NAME.search(name) and len(value) >= MIN_LENGTH}
    for text in texts:
        for name, value in sorted(secrets.items()):
            if value in text:
                raise ConfigError(
                    f"{what} contains the value of {name}",
                    remedy="take it out; the job reads it from its own environment",
                )
        if re.search(r"://[^/@\s:]+:[^/@\s]+@", text):
            raise ConfigError(f"{what} contains a URL with a password", remedy="take the password out")
