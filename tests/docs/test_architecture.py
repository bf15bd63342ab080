"""The diagram of docs/architecture.md shows the layers that lint-imports checks, and every package there is."""

from __future__ import annotations

import re
import tomllib

from tests.docs.pages import ROOT, blocks

PAGE = ROOT / "docs" / "architecture.md"


def diagram() -> list[list[str]]:
    """The packages of each layer, from the top."""
    (block,) = [block for block in blocks(PAGE) if block.language == "layers"]
    return [re.split(r" \| ", re.split(r"\s{2,}", line)[0]) for line in block.text.splitlines()]


def test_the_layers_are_those_of_the_import_contract():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    assert [sorted(layer) for layer in diagram()] == [sorted(re.split(r"\s*\|\s*", layer)) for layer in layers]


def test_every_package_is_in_the_diagram():
    packages = {f"dist_cpt.{path.parent.name}" for path in ROOT.glob("dist_cpt/*/__init__.py")}
    modules = {f"dist_cpt.{path.stem}" for path in ROOT.glob("dist_cpt/*.py") if path.stem != "__init__"}
    assert {name for layer in diagram() for name in layer} == packages | modules | {"dist_cpt_launch"}


def test_the_files_it_names_exist():
    for name in re.findall(r"`([\w/]+\.py)`", PAGE.read_text()):
        assert (ROOT / "dist_cpt" / name).is_file(), name
