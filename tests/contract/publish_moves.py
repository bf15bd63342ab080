"""Run every ordered move of every variant and write docs/moves.md: `python -m tests.contract.publish_moves`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from tests.contract.moves import CELLS, VARIANTS, move_all, name_of
from tests.ranks import RankPool

TITLES = {"lora-only": "LoRA", "lora": "LoRA, embeddings and head", "nf4": "LoRA, embeddings and head on an NF4 base",
          "full": "every parameter"}  # fmt: skip
HEAD = """# Moves

A training state is saved after 3 steps on the engine and number of ranks of a row and resumed on those of a column.
After 5 more steps it is compared with the run that stayed on the engine and ranks of the row. Written by
`python -m tests.contract.publish_moves` (CPU, gloo, a two-layer model whose sizes have no common divisors); the same
moves are tests: `pytest -m matrix tests/contract/test_moves.py`.

A number means that every master and both moments of every tensor were **bit-identical** after the move (**NO** if one
was not); it is the largest relative difference of the five losses, and 0 if they are bit-identical. In fp32 only the
order of sums differs (unit roundoff 6e-8); with an NF4 base products are in bf16.
"""


def main() -> None:
    pools: dict[int, RankPool] = {}

    def pool(ranks: int) -> RankPool:
        return pools.setdefault(ranks, RankPool(ranks, timeout_seconds=1800))

    text = [HEAD]
    with tempfile.TemporaryDirectory() as folder:
        for variant, title in TITLES.items():
            assert variant in VARIANTS
            base = Path(folder) / f"base-{variant}"
            pool(1).run("tests.contract.model:save_base", folder=str(base), sizes=sizes_of(variant))
            moved = move_all(pool, str(base), variant, CELLS, Path(folder) / variant)
            text.append(table(title, moved))
            print(text[-1], flush=True)
    for started in pools.values():
        started.close()
    (Path(__file__).parents[2] / "docs" / "moves.md").write_text("\n".join(text), encoding="utf-8")


def sizes_of(variant: str) -> dict[str, Any]:
    return {"tie_word_embeddings": False}


def table(title: str, moved: dict[Any, Any]) -> str:
    """One variant as markdown."""
    same = sum(not failed for failed, *_ in moved.values())
    lines = [f"## {title}", "", f"{len(moved)} moves, {same} bit-identical.", ""]
    lines.append("| from \\ to | " + " | ".join(name_of(cell) for cell in CELLS) + " |")
    lines.append("|---|" + "---|" * len(CELLS))
    for origin in CELLS:
        shown = [cell_text(*moved[origin, target][:2]) for target in CELLS]
        lines.append(f"| {name_of(origin)} | " + " | ".join(shown) + " |")
    return "\n".join([*lines, ""])


def cell_text(failed: list[str], loss: float) -> str:
    return "**NO**" if failed else "0" if loss == 0.0 else f"{loss:.0e}".replace("e-0", "e-")


if __name__ == "__main__":
    main()
