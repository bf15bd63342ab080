"""Opening a store and its block plan, and reading blocks anywhere in it: time and memory of one rank, at 1e12 tokens.

The files are sparse: zeros that take no space on the disk, but for the index's head, the last document and the last
block. So their size is real and their content is not; reading is as fast as the page cache.

    python benchmarks/open_store.py [--tokens 1e12] [--documents 1e9] [--write]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

# kernels.py beside this file would shadow Hugging Face's package of that name.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]

import numpy as np  # noqa: E402

from dist_cpt.data.block_plan import PlanKey, block_plan  # noqa: E402
from dist_cpt.data.loader import BlockLoader  # noqa: E402
from dist_cpt.data.packing import PIECE  # noqa: E402
from dist_cpt.data.prepared import Prepared, PreparedSource  # noqa: E402
from dist_cpt.data.store import HEADER, MAGIC, TokenStore  # noqa: E402

SEQ_LEN, LAST_TOKENS, SEEKS = 4096, 7, 200
Content = dict[int, bytes]  # by offset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=float, default=1e12)
    parser.add_argument("--documents", type=float, default=1e9)
    parser.add_argument("--write", action="store_true", help="to benchmarks/results/")
    parser.add_argument("--opened", type=Path, help=argparse.SUPPRESS)  # in a process of its own
    arguments = parser.parse_args()
    if arguments.opened is not None:
        print(json.dumps(opened(arguments.opened)))
        return
    with tempfile.TemporaryDirectory(prefix="dist-cpt-bench-") as folder:
        make_sparse(Path(folder), int(arguments.tokens), int(arguments.documents))
        command = [sys.executable, __file__, "--opened", folder]
        result = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.write:
        target = Path(__file__).parent / "results" / f"{date.today().isoformat()}_cpu_open_store.json"
        target.write_text(text + "\n")


def opened(folder: Path) -> dict[str, Any]:
    """Open what `make_sparse` made, and read blocks all over it."""
    before, start = anonymous_kib(), time.perf_counter()
    store = TokenStore.open(folder)
    blocks = block_plan(store, PlanKey(SEQ_LEN), folder)
    source = PreparedSource("s", 1.0, "domain", store, blocks=blocks)
    loader = BlockLoader(Prepared([source], [], "t", 9, "i", SEQ_LEN), SEQ_LEN, 0, 1)
    open_seconds = time.perf_counter() - start
    seeks = []
    for position in range(SEEKS):  # the order of blocks is a permutation of all
        start = time.perf_counter()
        loader.batch([position])
        seeks.append(time.perf_counter() - start)
    plan = blocks.plan
    return {
        "tokens": store.num_tokens,
        "documents": store.num_documents,
        "blocks": plan.num_blocks,
        "open_seconds": round(open_seconds, 4),
        "seek_milliseconds": round(1e3 * statistics.median(seeks), 4),
        "anonymous_kib": anonymous_kib() - before,
        "last_block": plan.block(plan.num_blocks - 1),
    }


def anonymous_kib() -> int:
    """Memory of this process that no file backs. Source: proc(5), /proc/pid/status."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])


def make_sparse(folder: Path, num_tokens: int, num_documents: int) -> None:
    """A store and its plan, of which only the last document and the last block have content."""
    header = np.zeros((), HEADER)
    header["magic"], header["version"], header["dtype"] = MAGIC, 1, 8
    header["sequences"], header["documents"] = num_documents, num_documents + 1
    lengths, pointers = HEADER.itemsize, HEADER.itemsize + 4 * num_documents
    content = {
        0: header.tobytes(),
        lengths + 4 * (num_documents - 1): np.array(LAST_TOKENS, "<i4").tobytes(),
        pointers + 8 * (num_documents - 1): np.array(2 * (num_tokens - LAST_TOKENS), "<i8").tobytes(),
    }
    files = {
        "tokens.bin": sparse(folder / "tokens.bin", 2 * num_tokens, {}),
        "tokens.idx": sparse(folder / "tokens.idx", pointers + 8 * (2 * num_documents + 1), content),
    }
    manifest = {"format_version": 2, "vocab_size": 9, "tokenizer_hash": "t", "dtype": "uint16"}
    manifest |= {"num_documents": num_documents, "num_tokens": num_tokens, "max_token_id": 8}
    manifest |= {"files": files, "source": {}, "counts": {}, "inputs": []}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    store, key, num_blocks = TokenStore.open(folder), PlanKey(SEQ_LEN), -(-num_tokens // SEQ_LEN)
    plan = folder / key.folder_name(store)
    plan.mkdir()
    last_piece = (num_documents - 1, 0, LAST_TOKENS)
    arrays = {
        "offsets.npy": sparse_array(plan / "offsets.npy", num_blocks + 1, "<i8", [num_documents - 1, num_documents]),
        "pieces.npy": sparse_array(plan / "pieces.npy", num_documents, PIECE, [last_piece]),
    }
    (plan / "manifest.json").write_text(json.dumps({"key": key.of(store), "num_tokens": num_tokens, "files": arrays}))


def sparse(path: Path, num_bytes: int, content: Content) -> dict[str, Any]:
    """A file of zeros, but for `content`; its manifest entry, with a hash that nobody compares."""
    with path.open("wb") as file:
        for offset, data in content.items():
            file.seek(offset)
            file.write(data)
        file.truncate(num_bytes)
    return {"bytes": num_bytes, "sha256": "0" * 64}


def sparse_array(path: Path, length: int, dtype: Any, last: list[Any]) -> dict[str, Any]:
    """The same for an array that ends with `last`."""
    array = np.lib.format.open_memmap(path, "w+", np.dtype(dtype), (length,))
    array[length - len(last) :] = last
    array.flush()
    return {"bytes": path.stat().st_size, "sha256": "0" * 64}


if __name__ == "__main__":
    main()
