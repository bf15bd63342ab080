"""The group `dist-cpt tokenizer`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dist_cpt.errors import ConfigError

app = typer.Typer(help="Train, extend and measure tokenizers.", no_args_is_help=True)


CORPUS_HELP = "Files, folders or patterns, of any format that data.sources reads."
Corpus = Annotated[list[str], typer.Argument(metavar="CORPUS...", help=CORPUS_HELP)]
TextField = Annotated[str, typer.Option("--text", help="The jsonl field that holds the document.")]
NewFolder = Annotated[Path, typer.Option("--out", help="New folder for the tokenizer.")]


@app.command("train")
def tokenizer_train(
    corpus: Corpus,
    out: NewFolder,
    vocab_size: Annotated[int, typer.Option("--vocab-size", min=1)],
    kind: Annotated[str, typer.Option("--kind", help="bpe or unigram")] = "bpe",
    text: TextField = "text",
) -> None:
    """Train a byte-level tokenizer on a corpus, and print how it encodes that corpus."""
    if kind not in ("bpe", "unigram"):
        raise ConfigError(f"--kind {kind}: use bpe or unigram")
    from dist_cpt.data.tokenizer_train import corpus_texts, fertility, train_tokenizer

    trained = train_tokenizer(corpus_texts(corpus, text), out, vocab_size, kind)
    measured = {"vocab_size": trained.get_vocab_size()} | fertility(trained, corpus_texts(corpus, text)).as_json()
    print(json.dumps(measured, indent=1))


@app.command("extend")
def tokenizer_extend(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Folder or hub id of the base's tokenizer.")],
    out: NewFolder,
    corpus: Annotated[list[str] | None, typer.Argument(metavar="[CORPUS...]", help=CORPUS_HELP)] = None,
    add: Annotated[
        int | None, typer.Option("--add", min=1, help="Learn at most this many tokens from the corpus.")
    ] = None,
    words: Annotated[
        Path | None, typer.Option("--words", help="File with one word per line; each becomes one token.")
    ] = None,
    min_frequency: Annotated[
        int, typer.Option("--min-frequency", min=1, help="Occurrences that a new token needs in the corpus.")
    ] = 2,
    focus: Annotated[bool, typer.Option("--focus", help="Also write what embeddings.init: focus reads.")] = False,
    text: TextField = "text",
) -> None:
    """Add tokens to a base's tokenizer, learned from a corpus or given as words; prints fertility before and after."""
    if (add is None) == (words is None) or (corpus is None and words is None):
        raise ConfigError("give --add N with a corpus to learn from, or --words FILE with or without one to measure")
    if focus and not corpus:
        raise ConfigError("--focus needs a corpus, from which it learns which tokens are used alike")
    from dist_cpt.data.tokenizer_extend import extend_tokenizer, read_words
    from dist_cpt.data.tokenizer_train import corpus_texts

    given = [] if words is None else read_words(words)
    done = extend_tokenizer(
        base,
        out,
        (lambda: corpus_texts(corpus, text)) if corpus else lambda: given,
        num_new=add,
        words=given,
        min_frequency=min_frequency,
        focus=focus,
    )
    print(json.dumps(done.as_json(), indent=1))


@app.command("report")
def tokenizer_report(
    tokenizer: Annotated[str, typer.Argument(metavar="TOKENIZER", help="Folder or hub id.")],
    corpus: Corpus,
    text: TextField = "text",
) -> None:
    """Measure a tokenizer on a corpus: tokens per word, bytes per token, texts that do not round-trip."""
    from dist_cpt.data.tokenizer import load_tokenizer
    from dist_cpt.data.tokenizer_train import corpus_texts, fertility

    measured = fertility(load_tokenizer(tokenizer).backend_tokenizer, corpus_texts(corpus, text))
    print(json.dumps(measured.as_json(), indent=1))
