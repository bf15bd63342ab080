"""The arguments and options that several commands take, and what they become."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dist_cpt.errors import ConfigError
from dist_cpt.run_folder.names import RECIPE

if TYPE_CHECKING:
    from dist_cpt.config.schema import RunConfig

RUN, LOOK, AFTER, TOOLS = "Run", "Look at a run", "After training", "Tools"  # the groups of --help

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="a.b=value", help="Override a recipe key; the value is YAML."),
]
Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file (YAML).")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder: <output_dir>/<name>.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object.")]


def load(recipe: Path, overrides: list[str] | None) -> RunConfig:
    """The recipe with `--set` applied and every path absolute."""
    from dist_cpt.config.load import load_recipe
    from dist_cpt.config.resolve import resolve_paths

    return resolve_paths(load_recipe(recipe, overrides or []))


def overrides_of(set_: list[str] | None, accept: str | None, profile: str | None) -> list[str]:
    """`--set`, `--accept-changes` and `--profile` as overrides of the recipe."""
    given = list(set_ or ())
    if accept is not None:
        given.append(f"accept_changes={json.dumps(accept.split(','))}")
    if profile is not None:
        first, colon, last = profile.partition(":")
        if not (colon and first.isdecimal() and last.isdecimal()):
            raise ConfigError(f"--profile {profile}: give A:B, such as 10:12 for steps 10, 11 and 12")
        given.append(f"track.profile=[{int(first)}, {int(last)}]")
    return given


def show(value: object, lines: Iterable[str], as_json: bool) -> None:
    """Print a result: as one JSON object, or as lines for people."""
    print(json.dumps(value, indent=1) if as_json else "\n".join(lines))


def require_run_folder(path: Path) -> Path:
    """`path`, which must be a run folder."""
    if not (path / RECIPE).is_file():
        why = f"no {RECIPE} in it" if path.is_dir() else "there is no such folder"
        raise ConfigError(f"{path} is not a run folder: {why}", remedy="give <output_dir>/<name>")
    return path
