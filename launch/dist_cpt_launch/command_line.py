"""Commands started with `python -m`: a dataclass of typer options, and one line for every user error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import typer

from dist_cpt.errors import EXIT_CONFIG, EXIT_DONE, DistCptError

Options = TypeVar("Options")


def run_command(options: type[Options], run: Callable[[Options], int], argv: Sequence[str], name: str) -> int:
    """Parse `argv` into `options`, a dataclass whose fields are annotated for typer, and run; returns an exit code."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(options)
    try:
        parsed = app(args=list(argv), prog_name=name, standalone_mode=False)
        return run(parsed) if isinstance(parsed, options) else EXIT_DONE  # else --help
    except DistCptError as error:
        print(f"dist-cpt: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except Exception as error:
        usage_message = getattr(error, "format_message", None)  # of click's usage errors
        if usage_message is None:
            raise
        print(f"{name}: {usage_message()}", file=sys.stderr, flush=True)
        return EXIT_CONFIG
