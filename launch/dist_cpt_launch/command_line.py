"""Commands that are started with `python -m`: options by typer, every user error one line and its exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import typer

from dist_cpt.errors import EXIT_CONFIG, EXIT_DONE, DistCptError


def run_command(function: Callable[..., int], argv: Sequence[str], name: str) -> int:
    """Call `function` with the options in `argv`, which is also its context's `obj`; returns its exit code."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(function)
    try:
        return app(args=list(argv), prog_name=name, obj=tuple(argv), standalone_mode=False) or EXIT_DONE
    except DistCptError as error:
        print(f"dist-cpt: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except Exception as error:
        usage_message = getattr(error, "format_message", None)  # of click's usage errors
        if usage_message is None:
            raise
        print(f"{name}: {usage_message()}", file=sys.stderr, flush=True)
        return EXIT_CONFIG
