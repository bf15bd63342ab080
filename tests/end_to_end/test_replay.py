"""Replay that the base writes itself: the same bytes whatever the batch, the kill or the first goal, and usable."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_cpt.data.data_report import data_report
from dist_cpt.data.prepare import prepare
from dist_cpt.errors import ConfigError, DataError, WriteError
from dist_cpt.export.replay import DOCUMENTS, REPORT, UNFINISHED, ReplayOptions, replay, summary
from dist_cpt.export.sampled_text import Sampler
from tests import tiny
from tests.command import command
from tests.whole_run import built

TOKENS = 900
OPTIONS = ReplayOptions(max_document_tokens=40)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replay")
    corpus = tiny.write_corpus(folder / "corpus")
    base = tiny.write_base(folder / "base", tiny.write_tokenizer(folder / "tokenizer", corpus))
    return folder, tiny.recipe(base, corpus, folder / "runs")


def loaded(place) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(place[0] / "base", dtype=torch.float32).eval()
    return base, AutoTokenizer.from_pretrained(place[0] / "base")


def sample(place, out: Path, tokens: int = TOKENS, options: ReplayOptions = OPTIONS, batch: int = 8) -> bytes:
    replay(built(place[1]), tokens, out, options, batch, lambda documents, done: None)
    return (out / DOCUMENTS).read_bytes()


@pytest.fixture(scope="module")
def expected(place):
    return sample(place, place[0] / "expected")


def test_documents_do_not_depend_on_the_batch(place, expected, tmp_path):
    assert sample(place, tmp_path / "small", batch=3) == expected
    rows = [json.loads(line) for line in expected.splitlines()]
    assert sum(row["tokens"] for row in rows) >= TOKENS > sum(row["tokens"] for row in rows[:-1])
    assert len({row["text"] for row in rows}) == len(rows)


def test_a_smaller_goal_is_a_beginning_of_a_larger_one(place, expected, tmp_path):
    first = sample(place, tmp_path / "out", TOKENS // 3)
    assert expected.startswith(first)
    assert first != expected
    assert sample(place, tmp_path / "out") == expected
    with pytest.raises(ConfigError, match="already"):
        sample(place, tmp_path / "out", 10)
    assert (tmp_path / "out" / DOCUMENTS).read_bytes() == expected


@pytest.mark.parametrize("fraction", [0.0, 0.21, 0.5, 0.99])
def test_what_a_kill_left_is_continued(place, expected, tmp_path, fraction):
    sample(place, tmp_path / "out", 1)  # its settings
    (tmp_path / "out" / DOCUMENTS).unlink()
    (tmp_path / "out" / UNFINISHED).write_bytes(expected[: int(fraction * len(expected))])
    assert sample(place, tmp_path / "out") == expected
    assert not (tmp_path / "out" / UNFINISHED).exists()


def test_the_loss_is_the_models_own(place):
    """Of two documents in one batch, with beginnings of different lengths, by a forward pass over each alone."""
    base, tokenizer = loaded(place)
    outputs: list[Any] = []
    generate = base.generate
    base.generate = lambda **given: outputs.append(generate(**given)) or outputs[-1]
    beginnings = [[7, 8, 9, 10], [11]]
    sampled = Sampler(base, tokenizer, 0, 0.8, 0.9, 12)([5, 6], beginnings)
    for row, beginning, document in zip(outputs[0].tolist(), beginnings, sampled, strict=True):
        ids = row[4 - len(beginning) : 4 + document.tokens]
        assert ids[: len(beginning)] == beginning
        assert document.ended == (ids[-1] == tokenizer.eos_token_id)
        with torch.no_grad():
            logits = base(torch.tensor([ids])).logits[0].log_softmax(-1)
        of_tokens = logits[:-1].gather(1, torch.tensor(ids[1:])[:, None])[len(beginning) - 1 :]
        assert document.loss == pytest.approx(-float(of_tokens.mean()), abs=1e-5)


def test_the_report_adds_up(place, expected, tmp_path):
    report = json.loads((place[0] / "expected" / REPORT).read_text())
    rows = [json.loads(line) for line in expected.splitlines()]
    tokens = np.array([row["tokens"] for row in rows])
    assert (report["documents"], report["tokens"]) == (len(rows), tokens.sum())
    assert report["length_tokens"]["max"] == tokens.max()
    mean = sum(row["loss"] * row["tokens"] for row in rows) / tokens.sum()
    assert report["perplexity"] == pytest.approx(np.exp(mean))
    doubled = tmp_path / "doubled.jsonl"
    doubled.write_bytes(expected + expected.splitlines(keepends=True)[0])
    assert summary(doubled)["duplicates"] == report["duplicates"] + 1


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.5)])
def test_tokens_have_the_probabilities_of_the_model(place, temperature, top_p):
    """Frequencies of 4,000 documents of one token."""
    base, tokenizer = loaded(place)
    start = [tokenizer.eos_token_id]
    with torch.no_grad():
        base.lm_head.weight *= 30  # a few likely tokens
        plain = base(torch.tensor([start])).logits[0, -1]
    wanted = (plain / temperature).softmax(-1).sort(descending=True)
    kept = wanted.values.cumsum(-1) - wanted.values < top_p
    probabilities = torch.zeros_like(plain).scatter_(0, wanted.indices[kept], wanted.values[kept])
    probabilities /= probabilities.sum()
    sampler = Sampler(base, tokenizer, 1, temperature, top_p, 1)
    losses = [d.loss for first in range(0, 4000, 500) for d in sampler(range(first, first + 500), [start] * 500)]
    of_token = -plain.log_softmax(-1)
    mean = float((probabilities * of_token).sum())
    deviation = float((probabilities * (of_token - mean) ** 2).sum().sqrt())
    assert abs(np.mean(losses) - mean) < 4 * deviation / 4000**0.5
    assert max(losses) <= float(of_token[probabilities > 0].max()) + 1e-5


def test_documents_begin_with_the_seeds_in_turn(place, tmp_path):
    seeds = tmp_path / "seeds.jsonl"
    texts = [f"The {word} statement is " for word in ("import", "while", "return")]
    seeds.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = replace(OPTIONS, seeds=(str(seeds),), seed_tokens=3)
    rows = [json.loads(line) for line in sample(place, tmp_path / "out", 300, options, batch=4).splitlines()]
    assert len(rows) > 5
    for number, row in enumerate(rows):
        begun = texts[number % 3]
        assert row["text"][:4] == begun[:4]
        assert row["tokens"] <= 40
    whole = (tmp_path / "out" / DOCUMENTS).read_bytes()
    (tmp_path / "out" / UNFINISHED).write_bytes(whole[: len(whole) // 2])
    (tmp_path / "out" / DOCUMENTS).unlink()
    assert sample(place, tmp_path / "out", 300, options, batch=4) == whole
    seeds.write_text(json.dumps({"text": "other"}) + "\n")
    with pytest.raises(ConfigError, match="seeds"):
        sample(place, tmp_path / "out", 400, options)


def test_it_is_a_source(place, expected, tmp_path):
    recipe = place[1] | {"output_dir": str(tmp_path)}
    source = {"path": str(place[0] / "expected"), "role": "replay", "weight": 0.1}
    recipe["data"] = recipe["data"] | {"sources": [{**recipe["data"]["sources"][0], "weight": 0.9}, source]}
    report = data_report(prepare(built(recipe)))
    (found,) = [entry for entry in report["sources"] if entry["name"] == "expected"]
    assert found["documents"] == len(expected.splitlines())


def test_refusals(place, tmp_path):
    folder, recipe = place
    out = tmp_path / "out"
    sample(place, out, 1)
    with pytest.raises(ConfigError, match="temperature"):
        sample(place, out, 100, replace(OPTIONS, temperature=0.5))
    with pytest.raises(ConfigError, match="temperature"):
        ReplayOptions(temperature=0.0)
    with pytest.raises(ConfigError, match="at most --max-document-tokens 255"):
        sample(place, tmp_path / "long", options=ReplayOptions(max_document_tokens=256))
    with pytest.raises(WriteError, match="cannot be written"):
        sample(place, Path("/proc/replay"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    with pytest.raises(ConfigError, match="other files"):
        sample(place, tmp_path / "other")
    assert not (tmp_path / "other" / UNFINISHED).exists()
    scratch = recipe | {
        "model": {"config": tiny.llama()},
        "adapter": {"kind": "none"},
        "embeddings": {},
        "data": recipe["data"] | {"tokenizer": str(folder / "tokenizer")},
    }
    with pytest.raises(ConfigError, match="from scratch"):
        replay(built(scratch), 10, tmp_path / "scratch", OPTIONS, 2, lambda documents, done: None)
    (out / DOCUMENTS).write_text("torn\n")
    with pytest.raises(DataError, match="line 1"):
        sample(place, out, 100)


def test_the_command_says_how_to_use_it(place, tmp_path):
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", place[1])
    ended = command("replay", recipe, "--tokens", 100, "--out", tmp_path / "out", "--max-document-tokens", 20)
    assert ended.code == 0, ended.err
    assert f"{{path: {tmp_path / 'out'}, role: replay" in ended.out
    assert "100.0%" in ended.err
    again = command("replay", recipe, "--tokens", 100, "--out", tmp_path / "out", "--max-document-tokens", 20, "--json")
    assert json.loads(again.out)["tokens"] >= 100
    assert command("replay", recipe, "--tokens", 100, "--out", tmp_path / "out").code == 64


@pytest.mark.matrix
def test_kills_at_any_time_change_nothing(place, tmp_path):
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", place[1])
    arguments = ["replay", str(recipe), "--tokens", "24000", "--batch", "4"]
    started = [sys.executable, "-m", "dist_cpt.cli", *arguments, "--out"]
    subprocess.run([*started, str(tmp_path / "straight")], check=True)
    kills = 0
    unfinished = tmp_path / "out" / UNFINISHED
    while True:
        process = subprocess.Popen([*started, str(tmp_path / "out")])
        before = unfinished.stat().st_size if unfinished.exists() else 0
        while process.poll() is None and not (unfinished.exists() and unfinished.stat().st_size > before + 25_000):
            time.sleep(0.001)
        if process.poll() is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills >= 3
    assert process.returncode == 0
    assert (tmp_path / "out" / DOCUMENTS).read_bytes() == (tmp_path / "straight" / DOCUMENTS).read_bytes()
