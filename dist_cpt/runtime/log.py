"""Plain log lines that say which rank speaks: to stderr, and to `logs/rank-N.log` in the run folder."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

LOGGER = logging.getLogger("dist_cpt")
_WARNINGS = logging.getLogger("py.warnings")


def open_log(run_folder: Path, rank: int) -> logging.Logger:
    """Send the package's messages and Python's warnings to stderr and to this rank's file (appended).

    Rank 0 shows everything on stderr; the others only what is a warning or worse, so that one message is
    not printed once per rank. Calling it again replaces the earlier destinations.
    """
    close_log()
    folder = run_folder / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    lines = logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(message)s")
    console = logging.StreamHandler(sys.stderr)
    console.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    file = logging.FileHandler(folder / f"rank-{rank}.log", encoding="utf-8")
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
