"""What the documents show exists: recipes load, links lead somewhere, commands are commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from dist_cpt.cli import app
from dist_cpt.config.load import build, load_recipe
from dist_cpt.config.resolve import step_shape

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_load_and_divide_over_their_gpus(path):
    config = load_recipe(path)
    gpus = re.search(r"--procs-per-node (\d+)", path.read_text())
    assert gpus is not None, "the header names its command"
    assert step_shape(config, int(gpus[1])).accumulation >= 1


def test_the_readmes_recipe_is_a_recipe():
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert step_shape(build(yaml.safe_load(block), "README.md"), 8).num_steps > 0


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_commands_exist(path):
    text = path.read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (path.parent / target).exists(), target
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    commands |= {group.name or "" for group in app.registered_groups}
    for used in re.findall(r"^\s*(?:srun .*)?dist-cpt ([a-z]+)", text, re.MULTILINE):
        assert used in commands, used
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for used in re.findall(r"^    make ([a-z-]+)", text, re.MULTILINE):
        assert used in targets, used
