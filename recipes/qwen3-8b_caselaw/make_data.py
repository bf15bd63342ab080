"""Text for recipe.yaml, from two public data sets of the Hugging Face hub: `python make_data.py --out caselaw`.

Opinions of US courts (common-pile/caselaw_access_project, public domain) and web text (HuggingFaceFW/fineweb-edu,
ODC-By). Documents are streamed in the data set's own order and go to held-out or training text by a hash of their text,
so that the same document is always on the same side. It needs the network and some 12 GB.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

CHARACTERS_PER_TOKEN = 4.2  # of English legal text, roughly
PART_BYTES = 256 << 20  # of text in a file
HELD_OUT_SHARE = 1 / 500


def is_held_out(text: str) -> bool:
    """By the text alone: of the same words the same answer, in any order of the data."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64


def write_parts(texts: Iterable[str], folder: Path, stem: str, num_tokens: int) -> tuple[int, int]:
    """Write `<stem>train-NNNN.jsonl.gz` and `<stem>held-out.jsonl.gz`; characters of (training, held-out) text."""
    folder.mkdir(parents=True, exist_ok=True)
    written, held_out_characters, part, size = 0, 0, 0, PART_BYTES
    file = None
    with gzip.open(folder / f"{stem}held-out.jsonl.gz", "wt", encoding="utf-8") as held_out:
        for text in texts:
            line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
            if is_held_out(text):
                held_out.write(line)
                held_out_characters += len(text)
                continue
            if size >= PART_BYTES:
                if file is not None:
                    file.close()
                file = gzip.open(folder / f"{stem}train-{part:04d}.jsonl.gz", "wt", encoding="utf-8")  # noqa: SIM115
                part, size = part + 1, 0
            assert file is not None
            file.write(line)
            written, size = written + len(text), size + len(text)
            if written >= num_tokens * CHARACTERS_PER_TOKEN:
                break
    if file is not None:
        file.close()
    return written, held_out_characters


def streamed(path: str, subset: str | None) -> Iterator[str]:
    """The documents of a hub data set, without downloading all of it."""
    from datasets import load_dataset

    for row in load_dataset(path, subset, split="train", streaming=True):
        if isinstance(row, dict) and row.get("text"):
            yield row["text"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("caselaw"))
    parser.add_argument("--tokens", type=int, default=1_900_000_000, help="of case law; web text gets a ninth")
    arguments = parser.parse_args()
    sets = (("", "common-pile/caselaw_access_project", None), ("web-", "HuggingFaceFW/fineweb-edu", "sample-10BT"))
    for stem, path, subset in sets:
        tokens = arguments.tokens if not stem else arguments.tokens // 9
        train, held_out = write_parts(streamed(path, subset), arguments.out, stem, tokens)
        print(f"{path}: {train:,} characters to train on, {held_out:,} held out")


if __name__ == "__main__":
    main()
