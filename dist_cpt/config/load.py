"""From recipe YAML and `--set a.b=value` to a RunConfig; each mistake is one line that names the key."""

from __future__ import annotations

import copy
import difflib
import re
import types
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from dist_cpt.config.schema import RunConfig
from dist_cpt.errors import ConfigError
from dist_cpt.storage import read_bytes

MAX_NODES = 10_000  # of one YAML document; a recipe has a few hundred


class _UniqueKeyLoader(yaml.SafeLoader):
    """A SafeLoader that refuses duplicate keys, aliases and huge documents, and reads 1e-5 as a number."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._num_nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Aliases of aliases grow by a factor per level: a recipe of 1 KB would take minutes."""
        event = self.peek_event()
        self._num_nodes += 1
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"the YAML alias *{event.anchor} is not supported{event.start_mark}")
        if self._num_nodes > MAX_NODES:
            raise ConfigError(f"more than {MAX_NODES:,} YAML nodes{event.start_mark}")
        return super().compose_node(parent, index)


def _unique_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise ConfigError(f"a key must be a string, not {key!r}{key_node.start_mark}")
        if key in seen:
            raise ConfigError(f"key {key!r} is given twice{key_node.start_mark}")
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    # YAML 1.1 reads 1e-5 as a string, because it has no dot
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML; `where` is the origin that errors name.

    Raises:
        ConfigError: the text is not valid YAML, or a key is given twice.
    """
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "cannot be parsed"
        raise ConfigError(f"{where}{place}: not valid YAML: {problem}") from error


def load_recipe(path: str | Path, overrides: typing.Sequence[str] = ()) -> RunConfig:
    """Read a recipe file and apply `a.b=value` overrides.

    Raises:
        ConfigError: the file is missing or not a file, a key is unknown, or a value is invalid.
        StorageError: the file system does not answer.
    """
    path = Path(path)
    try:
        text = read_bytes(path).decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"recipe not found: {path}", remedy="give the path of a recipe file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path} cannot be read: {error}") from error
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of keys, not {type(values).__name__}")
    return build(apply_overrides(values, overrides), where=str(path))


def apply_overrides(values: dict[str, Any], overrides: typing.Sequence[str]) -> dict[str, Any]:
    """A copy of `values` with `a.b=value` overrides; values are YAML, and list items are named by position."""
    result = copy.deepcopy(values)
    for item in overrides:
        key, equals, text = item.partition("=")
        *sections, last = parts = key.strip().split(".")
        if not equals or not all(parts):
            raise ConfigError(f"--set {item!r}: expected a.b=value")
        node: Any = result
        for depth, part in enumerate(sections, 1):
            place = _place(node, part, key)
            child = node[place] if isinstance(node, list) else node.get(part)
            if isinstance(child, str) and part == "engine":
                child = {"kind": child}
            child = {} if child is None else child
            if not isinstance(child, dict | list):
                raise ConfigError(f"--set {key}: {'.'.join(parts[:depth])} is not a section")
            node[place] = child
            node = child
        node[_place(node, last, key)] = parse_yaml(text, f"--set {key}")
    return result


def _place(node: dict[str, Any] | list[Any], part: str, key: str) -> Any:
    if isinstance(node, dict):
        return part
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(f"--set {key}: {part!r} is not a position in this list of {len(node)}")
    return int(part)


def build(values: dict[str, Any], where: str) -> RunConfig:
    """Validate a mapping as a RunConfig; `where` is the origin that errors name.

    Raises:
        ConfigError: one line that names every invalid key, and for an unknown one the nearest known key.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        lines = [_explain(problem) for problem in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(dict.fromkeys(lines))) from error


def _explain(problem: Any) -> str:
    location = tuple(part for part in problem["loc"] if part != "function-after")
    key = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        name = str(location[-1])
        initials = "".join(word[:1] for word in name.split("_"))  # learning_rate: lr
        near = [initials] if initials in known else difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {'.'.join([*map(str, location[:-1]), near[0]])}?" if near else ""
        return f"unknown key {key}; " + (hint or f"keys here are {', '.join(known)}")
    if problem["type"] == "missing":
        return f"{key} is required"
    message = str(problem["msg"]).removeprefix("Value error, ")
    value = problem.get("input")
    shown = f" (got {value!r})" if isinstance(value, str | int | float | bool) else ""
    return f"{key}: {message}{shown}" if key else message


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    model: Any = RunConfig
    for part in location:
        if isinstance(part, int):
            continue
        fields = getattr(model, "model_fields", {})
        if part in fields:
            model = _section_of(fields[part].annotation) or model
    return list(getattr(model, "model_fields", {}))


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class in a field's type, as in `HangConfig | None` or `tuple[SourceConfig, ...]`."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    for argument in typing.get_args(annotation):
        if (section := _section_of(argument)) is not None:
            return section
    return None
