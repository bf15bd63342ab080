"""What the cases of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> tuple[Path, Path]:
    """A random base model with its tokenizer, and a corpus."""
    folder = tmp_path_factory.mktemp("made")
    corpus = tiny.write_corpus(folder / "corpus")
    tokenizer = tiny.write_tokenizer(folder / "tokenizer", corpus)
    return tiny.write_base(folder / "base", tokenizer), corpus


@pytest.fixture(scope="session")
def tokenizer(made) -> Path:
    """The tokenizer of that base."""
    return made[0].parent / "tokenizer"
