"""Our token files in the hands of others: a reader written from the format's description, and Megatron-LM's own."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from dist_cpt.data.megatron import MegatronPair
from dist_cpt.data.store import StoreWriter

MEGATRON = "megatron-core==0.16.1"
DOCUMENTS = [[5, 6, 0], [0], list(range(1, 400)), [9, 65499, 0]]

# Reads the first pair, writes the second with a document of two sequences.
THEIRS = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

ours, theirs = sys.argv[1:]
dataset = IndexedDataset(ours)
print(json.dumps([dataset.document_indices.tolist(), [dataset[i].tolist() for i in range(len(dataset))]]))
builder = IndexedDatasetBuilder(theirs + ".bin", dtype=DType.optimal_dtype(100_000))
for document in ([[1, 2], [3]], [[70_000]]):
    for sequence in document:
        builder.add_item(torch.tensor(sequence))
    builder.end_document()
builder.finalize(theirs + ".idx")
"""


def write(folder: Path, vocab_size: int) -> Path:
    folder.mkdir()
    writer = StoreWriter(folder, vocab_size)
    for ids in DOCUMENTS:
        writer.append(np.array(ids), np.array([len(ids)]))
    writer.finish("hash", {"name": "s"}, {"records": 3}, [])
    return folder / "tokens"


def read_plainly(path: Path) -> list[list[int]]:
    """The documents of a pair, by the description in Megatron-LM's indexed_dataset.py."""
    index, tokens = path.with_suffix(".idx").read_bytes(), path.with_suffix(".bin").read_bytes()
    magic, version, code, sequences, borders = struct.unpack_from("<9sQBQQ", index)
    assert (magic, version) == (b"MMIDIDX\x00\x00", 1)
    at = struct.calcsize("<9sQBQQ")
    lengths = struct.unpack_from(f"<{sequences}i", index, at)
    pointers = struct.unpack_from(f"<{sequences}q", index, at + 4 * sequences)
    documents = struct.unpack_from(f"<{borders}q", index, at + 12 * sequences)
    assert len(index) == at + 12 * sequences + 8 * borders
    letter = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}[code]
    read = [struct.unpack_from(f"<{n}{letter}", tokens, start) for n, start in zip(lengths, pointers, strict=True)]
    return [[token for sequence in read[first:last] for token in sequence] for first, last in pairwise(documents)]


@pytest.mark.parametrize("vocab_size", [65_499 + 1, 128_000])
def test_a_plain_reader_reads_ours(tmp_path: Path, vocab_size: int) -> None:
    assert read_plainly(write(tmp_path / "s", vocab_size)) == DOCUMENTS


@pytest.mark.matrix
def test_megatron_core_reads_ours_and_we_read_theirs(tmp_path: Path) -> None:
    """It is installed into a folder of this test, without what it depends on."""
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path / "site"), MEGATRON]
    installed = subprocess.run(install, capture_output=True, text=True, timeout=400)
    if installed.returncode:
        pytest.skip(f"{MEGATRON} cannot be installed here: {installed.stderr.strip().splitlines()[-1:]}")
    ours, theirs = write(tmp_path / "ours", 65_499 + 1), tmp_path / "theirs"
    command = [sys.executable, "-c", THEIRS, str(ours), str(theirs)]
    done = subprocess.run(command, env={"PYTHONPATH": str(tmp_path / "site")}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    borders, documents = json.loads(done.stdout.splitlines()[-1])
    assert documents == DOCUMENTS
    assert borders == list(range(len(DOCUMENTS) + 1))
    pair = MegatronPair(theirs.with_suffix(".idx"))
    assert [pair.document(number).tolist() for number in range(pair.num_documents)] == [[1, 2, 3], [70_000]]
