"""Dataclasses as options of a command, and one line for every user error of those started with `python -m`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import wraps
from typing import Any, TypeVar, get_type_hints

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


def with_options(options: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a command whose parameter `options` is that dataclass: typer sees its fields as further options."""
    hints = get_type_hints(options, include_extras=True)
    extra = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(options)
    ]
    names = {field.name for field in fields(options)}

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        own = get_type_hints(command, include_extras=True)
        kept = [
            parameter.replace(annotation=own[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in inspect.signature(command).parameters.values()
            if parameter.name != "options"
        ]

        @wraps(command)
        def run(**given: Any) -> Any:
            taken = {name: given.pop(name) for name in names}
            return command(**given, options=options(**taken))

        parameters = [*kept, *extra]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        del run.__wrapped__  # typer would look through it
        return run

    return decorate
