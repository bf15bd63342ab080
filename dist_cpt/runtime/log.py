"""Log lines with their rank, to stderr and to the rank's own file."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

LOGGER = logging.getLogger("dist_cpt")
_WARNINGS = logging.getLogger("py.warnings")


def open_log(path: Path, rank: int) -> logging.Logger:
    """Send the package's messages and Python's warnings to stderr and append them to the file `path`.

    Only rank 0 prints messages below a warning on stderr. A second call replaces the destinations.
    """
    close_log()
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(message)s")
    console = logging.StreamHandler(sys.stderr)
    console.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    file = logging.FileHandler(path, encoding="utf-8")
    for logger in (LOGGER, _WARNINGS):
        logger.setLevel(logging.INFO)
        logger.propagate = False
        for handler in (console, file):
            handler.setFormatter(lines)
            logger.addHandler(handler)
    logging.captureWarnings(True)
    return LOGGER


def close_log() -> None:
    """Undo `open_log`."""
    logging.captureWarnings(False)
    for logger in (LOGGER, _WARNINGS):
        logger.propagate = True
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()
