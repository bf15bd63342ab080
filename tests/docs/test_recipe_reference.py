"""docs/recipe.md is what the schema generates, and describes every key."""

from __future__ import annotations

import re
from pathlib import Path

from dist_cpt.config.exclusions import EXCLUSIONS
from dist_cpt.config.reference import reference, sections

PAGE = Path(__file__).parents[2] / "docs" / "recipe.md"


def test_the_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == reference(), "python -m dist_cpt.config.reference > docs/recipe.md"


def test_every_key_is_described_by_a_sentence():
    prefixes = {path for path, _ in sections()}
    for path, section in sections():
        assert section["description"].endswith("."), path
        for key, field in section["properties"].items():
            if not {f"{path}{key}.", f"{path}{key}[]."} & prefixes:
                assert field.get("description", "").endswith("."), f"{path}{key}"
                assert re.search(rf"^\| `{key}` \| .+ \| .* \| .+ \| .* \|$", PAGE.read_text(), re.MULTILINE), key


def test_the_table_of_exclusions_names_keys_of_the_schema():
    known = {f"{path}{key}" for path, section in sections() for key in section["properties"]}
    for row in EXCLUSIONS:
        for condition in row.conditions:
            assert set(condition.keys) <= known, condition.text
