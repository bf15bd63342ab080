"""Plain log lines that name their rank, to stderr and to the rank's own file."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

LOGGER = logging.getLogger("dist_cpt")
_WARNINGS = logging.getLogger("py.warnings")


def open_log(path: Path, rank: int) -> logging.Logger:
    """Send the package's messages and Python's warnings to stderr and to the file `path`, which is appended to.

    Rank 0 shows everything on stderr; the others only what is a warning or worse, so that one message is
    not printed once per rank. Calling it again replaces the earlier destinations.
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
    """Close the file and let warnings and messages go where they went before `open_log`."""
    logging.captureWarnings(False)
    for logger in (LOGGER, _WARNINGS):
        logger.propagate = True
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()
