"""docs/recipe.md from the schema: `python -m dist_cpt.config.reference > docs/recipe.md`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dist_cpt.config.exclusions import EXCLUSIONS, shown
from dist_cpt.config.resume_changes import RESUME_CHANGES
from dist_cpt.config.schema import RunConfig

_HEADER = """# The recipe, key by key

Generated from the schema by `python -m dist_cpt.config.reference > docs/recipe.md`: edit the docstrings in
`dist_cpt/config/schema.py`, not this page. [Recipes](recipes.md) shows whole recipes and what they are for.

A key without a default is required, and an unknown key is an error. On the command line `--set a.b=value` overrides a
key, and `--set data.sources.0.weight=2` that of an item of a list. The last column numbers the
[settings that exclude each other](#settings-that-exclude-each-other), and the page ends with the
[settings that a resume may change](#settings-that-a-resume-may-change).
"""
_EXCLUSIONS = """## Settings that exclude each other

A recipe that matches a row is refused with exit code 64 before anything is loaded, naming the keys and their
values. A key alone stands for any value but its default, and "no" before a key for its default.

| | refused | because | instead |
|---|---|---|---|"""
_CHANGES = """
## Settings that a resume may change

A resume compares its recipe with those of `recipe.yaml` and of the checkpoint. Rows may change as said, any other
setting is refused by name with exit code 64: it would be another run.

| settings | may change | because |
|---|---|---|"""
_HOW = {
    "freely": "freely",
    "same content": "to a place with the same content",
    "accepted": "if accepted by name, or in a branch",
}
_HOW |= {"branched": "in a branch"}
_BOUNDS = {"exclusiveMinimum": "> {}", "minimum": "≥ {}", "exclusiveMaximum": "< {}", "maximum": "≤ {}"}
_WORDS = {"boolean": "true or false", "object": "mapping"}


def reference() -> str:
    """The page: a table of keys for each section, then the tables of exclusions and of changes in a resume."""
    page = [_HEADER]
    for path, section in sections():
        title = f"`{path.removesuffix('.')}`" if path else "Top level"
        page.append(f"## {title}\n\n{_line(section)}{_numbers(path.removesuffix('.'), ' (Exclusions {}.)')}\n")
        if fields := {key: field for key, field in section["properties"].items() if not _subsection(field)}:
            required = section.get("required", ())
            page.append("| key | type | default | meaning | excludes |\n|---|---|---|---|---|")
            page += [_row(path, key, field, key in required) for key, field in fields.items()]
            page.append("")
    page.append(_EXCLUSIONS)
    for number, exclusion in enumerate(EXCLUSIONS, 1):
        refused = " **with** ".join(condition.text for condition in exclusion.conditions)
        page.append(f"| {number} | {refused} | {exclusion.why} | {exclusion.remedy} |")
    page.append(_CHANGES)
    for row in RESUME_CHANGES:
        page.append(f"| {', '.join(f'`{key}`' for key in row.keys)} | {_HOW[row.how]} | {row.why} |")
    return "\n".join(page) + "\n"


def sections() -> Iterator[tuple[str, dict[str, Any]]]:
    """(prefix of its keys, JSON schema) of every section of a recipe; `a[].` is the prefix of a list's items."""
    root = RunConfig.model_json_schema()

    def walk(path: str, section: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        yield path, section
        for key, field in section["properties"].items():
            if name := _subsection(field):
                yield from walk(f"{path}{key}{'[]' if 'items' in field else ''}.", root["$defs"][name])

    return walk("", root)


def _subsection(field: dict[str, Any]) -> str | None:
    options = [field, field.get("items", {}), *field.get("anyOf", ())]
    return next((option["$ref"].rpartition("/")[2] for option in options if "$ref" in option), None)


def _row(path: str, key: str, field: dict[str, Any], required: bool) -> str:
    default = "" if required else f"`{shown(field['default'])}`"
    return f"| `{key}` | {_type(field)} | {default} | {_line(field)} | {_numbers(path + key)} |"


def _type(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(map(_type, field["anyOf"]))
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if field["type"] == "array":
        items = [field["items"]] if "items" in field else field["prefixItems"]
        return f"list of {', '.join(map(_type, items))}"
    bounds = [text.format(str(field[name]).removesuffix(".0")) for name, text in _BOUNDS.items() if name in field]
    pattern = [f"matching `{field['pattern']}`"] if "pattern" in field else []
    word = str(field["type"])
    return " ".join([_WORDS.get(word, word), *bounds, *pattern])


def _line(described: dict[str, Any]) -> str:
    return " ".join(described["description"].split())


def _numbers(key: str, text: str = "{}") -> str:
    rows = [
        str(number)
        for number, exclusion in enumerate(EXCLUSIONS, 1)
        if any(key in condition.keys for condition in exclusion.conditions)
    ]
    return text.format(", ".join(rows)) if rows else ""


if __name__ == "__main__":
    print(reference(), end="")
