"""The group `dist-cpt data`: token stores."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from dist_cpt.commands.arguments import Json, show
from dist_cpt.errors import DataError

app = typer.Typer(help="Look at, check, merge and decode token stores.", no_args_is_help=True)


Store = Annotated[Path, typer.Argument(metavar="STORE", help="A token store, or the .idx of a Megatron-LM pair.")]
OfStore = Annotated[
    str | None, typer.Option("--tokenizer", help="Folder or hub id, where the store has no tokenizer.json.")
]


@app.command("inspect")
def data_inspect(
    store: Store,
    tokenizer: OfStore = None,
    page: Annotated[Path | None, typer.Option("--report", metavar="FILE", help="Also write an HTML page.")] = None,
    json_: Json = False,
) -> None:
    """Show what is inside: counts, lengths, tokenizer, origin, hashes, and documents with visible borders."""
    from dist_cpt.data.documents import open_documents
    from dist_cpt.data.store_facts import facts_text, store_facts

    facts = store_facts(open_documents(store), tokenizer)
    show(facts, [facts_text(facts)], json_)
    if page is not None:
        from dist_cpt.report.report import write_page
        from dist_cpt.report.store_page import store_page

        write_page(store_page(facts), page)


@app.command("verify")
def data_verify(store: Store, json_: Json = False) -> None:
    """Compare every chunk of a store and of its block plans with its hash; exit code 65 if one differs."""
    from dataclasses import asdict

    from dist_cpt.data.store_check import check_store
    from dist_cpt.errors import printable

    check = check_store(store)
    if json_:
        print(json.dumps({"store": str(store), **asdict(check)}, indent=1))
    if check.problems:
        if not json_:
            print(*map(printable, check.problems), sep="\n")
        more = f" (and {len(check.problems) - 1} more)" if len(check.problems) > 1 else ""
        remedy = "copy it again, or dist-cpt prepare makes it again from the text"
        raise DataError(f"{printable(check.problems[0])}{more}", remedy=remedy)
    if not json_:
        found = (
            f"{check.num_chunks:,} chunks, {check.num_bytes:,} bytes" if check.hashed else "no hashes to compare with"
        )
        print(f"{store}: valid ({found})")


@app.command("merge")
def data_merge(
    stores: Annotated[list[Path], typer.Argument(metavar="STORE STORE...", help="Two or more token stores.")],
    out: Annotated[Path, typer.Option("--out", help="New folder for the merged store.")],
    json_: Json = False,
) -> None:
    """Write the documents of several stores into one, with where each part came from."""
    from dist_cpt.data.merge_stores import merge_stores

    merged = merge_stores(stores, out)
    counts = {"documents": merged.num_documents, "tokens": merged.num_tokens}
    shown = {"store": str(out), **counts, "content_hash": merged.manifest.content_hash}
    show(shown, [f"{out}: {merged.num_documents:,} documents, {merged.num_tokens:,} tokens"], json_)


@app.command("decode")
def data_decode(
    store: Store,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE.jsonl", help="New file; default: stdout.")] = None,
    documents: Annotated[str, typer.Option(metavar="A:B", help="Documents A to B - 1, as a slice in Python.")] = ":",
    tokenizer: OfStore = None,
) -> None:
    """Turn the tokens back into text: one JSON object with `text` per line."""
    from dist_cpt.data.documents import decode_rows, open_documents, write_rows

    rows = decode_rows(open_documents(store), documents, tokenizer)
    if out is not None:
        print(f"{out}: {write_rows(rows, out):,} documents")
        return
    for row in rows:
        sys.stdout.write(row)
