"""What the pages show is true: recipes load, links lead somewhere, commands and their options exist, blocks run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
import yaml

from dist_cpt.cli import app
from dist_cpt.config.load import build, load_recipe
from dist_cpt.config.resolve import step_shape
from dist_cpt.errors import EXIT_WORDS
from tests.docs.pages import PAGES, ROOT, blocks, shell_blocks, uses_of_dist_cpt

README = ROOT / "README.md"
MAX_README_LINES = 120
# The option parsers of commands that leave parsing to another program.
PARSES_ALONE = {"preflight"}


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_load_and_divide_over_their_gpus(path):
    config = load_recipe(path)
    gpus = re.search(r"--procs-per-node (\d+)", path.read_text())
    assert gpus is not None, "the header names its command"
    assert step_shape(config, int(gpus[1])).accumulation >= 1


def test_the_readmes_recipe_is_a_recipe():
    (block,) = [block for block in blocks(README) if block.language == "yaml"]
    assert step_shape(build(yaml.safe_load(block.text), "README.md"), 8).num_steps > 0


def test_the_readme_is_short_and_lists_every_page():
    text = README.read_text()
    assert len(text.splitlines()) <= MAX_README_LINES
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"(docs/{page.name})" not in text] == []


def test_the_readme_lists_every_exit_code():
    listed = README.read_text().partition("Exit codes:")[2].partition("`exit.json`")[0]
    assert [int(code) for code in re.findall(r"\b\d+\b", listed)] == sorted(EXIT_WORDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#:]*)(#[^)]*)?\)", page.read_text()):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        if anchor and linked.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            assert anchor[1:] in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_their_options_exist(page):
    root = typer.main.get_command(app)
    for words in uses_of_dist_cpt(page):
        command = root
        for word in words:
            if word in getattr(command, "commands", {}):
                command = command.commands[word]
        assert command is not root or words[0].startswith("-"), f"dist-cpt {words[0]}"
        options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        used = {word.strip("[]").partition("=")[0] for word in words if re.match(r"\[?--?[a-z]", word)}
        if command.name not in PARSES_ALONE:
            assert used <= options | {"-h", "--help"}, f"dist-cpt {' '.join(words)}"
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shell = "".join(block.text for block in shell_blocks(page))
    assert set(re.findall(r"^(?:\w+=\S+ )?make ([a-z-]+)", shell, re.MULTILINE)) <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_are_marked(page):
    """A shell block runs, or is marked `no-run`; a Python block is Python."""
    for block in blocks(page):
        assert block.language not in ("bash", "shell", "console"), f"{page.name}:{block.line}: call it sh"
        if block.language == "sh":
            assert block.info in ("", "no-run"), f"{page.name}:{block.line}: {block.info}"
        if block.language == "python":
            compile(block.text, f"{page.name}:{block.line}", "exec")


def _pages_that_run() -> list[object]:
    """The quickstart takes 50 s on a free core, as the runs in it are real."""
    pages = [page for page in PAGES if any(not block.info for block in shell_blocks(page))]
    return [pytest.param(page, id=page.name) for page in pages]


def test_the_quickstart_runs():
    assert ROOT / "docs" / "quickstart.md" in [page.values[0] for page in _pages_that_run()]


@pytest.mark.matrix  # a minute on a free core; .ci/run runs it too
@pytest.mark.parametrize("page", _pages_that_run())
def test_shell_blocks_run_in_order(page, tmp_path):
    """In an empty folder; a block of YAML with a file's name in its fence is that file."""
    program = ["set -euxo pipefail", "set -m"]  # job control: %1 is the first command in the background
    for block in blocks(page):
        if block.language == "yaml" and block.info:
            (tmp_path / block.info).write_text(block.text)
        if block.language == "sh" and not block.info:
            program.append(block.text)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", "\n".join(program)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def test_python_blocks_marked_run_do_run():
    """Each page's blocks marked `run`, in order, in one namespace."""
    for page in PAGES:
        namespace: dict[str, object] = {"__name__": page.stem}
        for block in blocks(page):
            if (block.language, block.info) == ("python", "run"):
                # Padded, so that a traceback names the line of the page.
                exec(compile("\n" * block.line + block.text, str(page), "exec"), namespace)
