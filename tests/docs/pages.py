"""The fenced blocks of a Markdown page, and the commands in it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


@dataclass(frozen=True)
class Block:
    """A fenced block: `language` and `info` are the first word after the fence and the rest of that line."""

    language: str
    info: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order.

    Raises:
        AssertionError: a fence is not closed.
    """
    found: list[Block] = []
    opened: tuple[int, str] | None = None
    content: list[str] = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.startswith("```"):
            content.append(line)
        elif opened is None:
            opened, content = (number, line[3:].strip()), []
        else:
            language, _, info = opened[1].partition(" ")
            found.append(Block(language, info, "\n".join(content) + "\n", opened[0]))
            opened = None
    assert opened is None, f"{page.name}:{opened and opened[0]}: the fence is not closed"
    return found


def shell_blocks(page: Path) -> list[Block]:
    """Blocks of shell commands; those that cannot run here, for want of a cluster or a model, are `no-run`."""
    return [block for block in blocks(page) if block.language == "sh"]


def uses_of_dist_cpt(page: Path) -> Iterator[list[str]]:
    """The words after `dist-cpt` of each command line in the page's code, comments left out."""
    for block in blocks(page):
        for line in block.text.replace("\\\n", " ").splitlines():
            match = re.match(r"\s*(?:srun .*?)?dist-cpt (.*)", line)
            if match and block.language not in ("yaml", "python"):
                yield shlex.split(match[1].rstrip("&"), comments=True)
