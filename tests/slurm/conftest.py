"""One cluster for all cases, and one base model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tiny
from tests.slurm.cluster import Cluster, missing

pytest.register_assert_rewrite("tests.slurm.case")  # before a test imports it: failed asserts show their values


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """munge, slurmctld and four slurmd."""
    yield from _running(tmp_path_factory.mktemp("slurm"))


@pytest.fixture
def nameless(tmp_path_factory) -> Iterator[Cluster]:
    """A cluster whose node names resolve nowhere."""
    yield from _running(tmp_path_factory.mktemp("slurm"), prefix="nowhere-")


def _running(folder: Path, **how: str) -> Iterator[Cluster]:
    absent = missing()
    if absent:
        pytest.skip(f"SLURM TESTS DID NOT RUN: this host lacks {', '.join(absent)} (sudo tests/slurm/install.sh)")
    running = Cluster(folder, **how)
    try:
        running.start()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> tuple[Path, Path]:
    """A random base model with its tokenizer, and a corpus."""
    folder = tmp_path_factory.mktemp("made")
    corpus = tiny.write_corpus(folder / "corpus")
    tokenizer = tiny.write_tokenizer(folder / "tokenizer", corpus)
    return tiny.write_base(
        folder / "base", tokenizer, hidden_size=32, intermediate_size=48, num_hidden_layers=1
    ), corpus
