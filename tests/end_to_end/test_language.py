"""A model learns a second script: more vocabulary, pretraining with replay, then answers, on one adapter.

The language is made on the spot: Python's documentation, letter by letter in Cyrillic. A base that has seen only
Latin text cuts each of its letters into two byte tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from dist_cpt.data.tokenizer_extend import extend_tokenizer
from dist_cpt.data.tokenizer_train import corpus_texts
from dist_cpt.export.generate import generate
from dist_cpt.export.merge import merge
from tests import tiny
from tests.chat import assistant, user, write_jsonl
from tests.published_recipes import recipe_file
from tests.whole_run import rows, train

LATIN = "abcdefghijklmnopqrstuvwxyz"
CYRILLIC = "абцдефгхийклмнопқрстувшщыз"
SCRIPT = str.maketrans(LATIN + LATIN.upper(), CYRILLIC + CYRILLIC.upper())
STEPS = {"base": 40, "cpt": 48, "instruct": 60}
OPTIM = {"optim": {"lr": 1e-2, "embedding_lr": 1e-2}}
GENTLE = {"optim": {"lr": 2e-3, "embedding_lr": 1e-3}}  # a stage without replay forgets what its steps are large for


@pytest.fixture(scope="module")
def language(made, tmp_path_factory) -> dict[str, Path]:
    """The corpus in the other script, its held-out part, and conversations in it."""
    folder = tmp_path_factory.mktemp("language")
    files = {"corpus": made[1], "held-out": made[1].parent / "held-out.jsonl"}
    found = {
        name: write_jsonl(folder / f"{name}.jsonl", [{"text": row["text"].translate(SCRIPT)} for row in rows(path)])
        for name, path in files.items()
    }
    talks = [
        {"messages": [user(f"say {word} {n}".translate(SCRIPT)), assistant(word.translate(SCRIPT))]}
        for n in range(30)
        for word in ("module", "function", "class")
    ]
    found["talks"] = write_jsonl(folder / "talks.jsonl", talks[9:])
    found["held-out talks"] = write_jsonl(folder / "held-out-talks.jsonl", talks[:9])
    return found


@pytest.fixture(scope="module")
def latin_base(made, tmp_path_factory) -> Path:
    """The base after some training on the Latin text, as a folder."""
    out = tmp_path_factory.mktemp("latin")
    values = tiny.recipe(made[0], made[1], out, adapter={"kind": "none"}, embeddings={}, optim={"lr": 5e-3})
    values |= {"model": {"path": str(made[0]), "weights": "fp32"}}
    values["train"] = {"tokens": STEPS["base"] * 8 * tiny.SEQ_LEN}
    assert train(values) == 0
    merge(sorted((out / "tiny/checkpoints").glob("step-*"))[-1], out / "base", "fp32")
    return out / "base"


def of_set(run: Path, name: str) -> list[dict[str, Any]]:
    return [row for row in rows(run / "evaluations.jsonl") if row["name"] == name]


def per_character(row: dict[str, Any], path: Path) -> float:
    """Nats per character: what runs with different tokenizers can be compared by."""
    return row["loss"] * row["num_tokens"] / sum(len(record["text"]) for record in rows(path))


def validation(language: dict[str, Path], made: Any) -> list[dict[str, str]]:
    latin = made[1].parent / "held-out.jsonl"
    return [
        {"name": "language", "path": str(language["held-out"])},
        {"name": "general", "path": str(latin), "role": "retention"},
    ]


def test_vocabulary_pretraining_and_answers(made, latin_base, language, tmp_path):
    model, adapter = {"path": str(latin_base), "weights": "fp32"}, {"rank": 8, "alpha": 8}
    learnt = extend_tokenizer(
        str(latin_base), tmp_path / "extended", lambda: corpus_texts([str(language["corpus"])]), num_new=200
    )
    before, after = (one.tokens / one.words for one in (learnt.before, learnt.after))
    assert after < 0.6 * before

    data = {
        "sources": [
            {"path": str(language["corpus"]), "name": "language", "weight": 0.8},
            {"path": str(made[1]), "weight": 0.2, "role": "replay"},
        ],
        "validation": validation(language, made),
    }
    new = {"train": ["embed_tokens", "lm_head"], "new_tokens": str(tmp_path / "extended")}
    stage = "llama3-8b_language-1-cpt_zero3_8xH100"
    small = {"model": model, "embeddings": new | {"freeze_rest_steps": 4}, **OPTIM}
    assert train(recipe_file(stage, tmp_path, STEPS["cpt"], data, adapter=adapter, **small)) == 0
    first = tmp_path / "llama3-8b-language-1"
    prior = first / f"checkpoints/step-{STEPS['cpt']:08d}"

    # The same base and the same first step without the new vocabulary: the measure of what the stages gained.
    plain = tiny.recipe(latin_base, language["corpus"], tmp_path / "plain", model=model)
    plain["data"]["validation"] = data["validation"]
    plain["train"] = {"tokens": 2 * 8 * tiny.SEQ_LEN}
    assert train(plain) == 0
    path = language["held-out"]
    untouched = per_character(of_set(tmp_path / "plain/tiny", "language")[0], path)
    started, ended = (per_character(of_set(first, "language")[place], path) for place in (0, -1))
    assert ended < 0.75 * min(untouched, started)

    talks = {
        "sources": [{"path": str(language["talks"])}],
        "validation": [{"name": "talks", "path": str(language["held-out talks"])}],
    }
    stage = "llama3-8b_language-2-instruct_zero3_8xH100"
    small = {"model": model, "embeddings": new, "adapter": adapter | {"continue_from": str(prior)}, **GENTLE}
    assert train(recipe_file(stage, tmp_path, STEPS["instruct"], talks, **small)) == 0
    second = tmp_path / "llama3-8b-language-2"
    answers = [row["loss"] for row in of_set(second, "talks")]
    assert answers[-1] < 0.6 * answers[0]
    last = second / f"checkpoints/step-{STEPS['instruct']:08d}"

    # What the language's text costs after the answers were learnt: a run that only begins.
    small = {"model": model, "embeddings": new, "adapter": adapter | {"continue_from": str(last)}, **OPTIM}
    look = recipe_file("llama3-8b_language-1-cpt_zero3_8xH100", tmp_path / "look", 2, data, **small)
    assert train(look) == 0
    kept = per_character(of_set(tmp_path / "look/llama3-8b-language-1", "language")[0], path)
    print(f"tokens per word {before:.2f} -> {after:.2f}")
    print(f"nats per character: base {untouched:.3f}, {started:.3f} -> {ended:.3f}, after the answers {kept:.3f}")
    assert kept < min(untouched, started)

    merge(last, tmp_path / "merged", "fp32")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert len(tokenizer) <= AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.vocab_size
    said = generate(last, "say module 3".translate(SCRIPT), 8, temperature=0.0, chat=True)
    assert any("а" <= letter <= "я" for letter in said.lower())
