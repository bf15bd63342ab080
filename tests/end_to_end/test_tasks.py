"""Answers and classes trained by whole runs, and the recipes that lead there, at tiny scale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_cpt.errors import ConfigError
from tests import tiny
from tests.chat import assistant, user, write_jsonl
from tests.published_recipes import RECIPES, recipe_file
from tests.run_ranks import run_ranks
from tests.whole_run import StopAfter, rows, train

WORDS = ("good", "bad", "fine")
LABELS = ("praise", "blame", "neither")


@pytest.fixture(scope="module")
def conversations(tmp_path_factory) -> dict[str, Any]:
    """The data section of conversations in which the answer repeats a word of the question."""
    folder = tmp_path_factory.mktemp("conversations")
    talks = [
        {"messages": [user(f"Say {word} {n}"), assistant(word), user("Again"), assistant(f"{word} {word}")]}
        for n in range(20)
        for word in WORDS
    ]
    path = write_jsonl(folder / "train.jsonl", talks)
    held_out = write_jsonl(folder / "held-out.jsonl", talks[:6])
    return {"sources": [{"path": str(path)}], "validation": [{"name": "held-out", "path": str(held_out)}]}


@pytest.fixture(scope="module")
def opinions(tmp_path_factory) -> dict[str, Any]:
    """The data section of texts whose last word tells their class, in two fields."""
    folder = tmp_path_factory.mktemp("opinions")
    records = [
        {"prompt": f"Text {n}", "first_answer": "is", "second_answer": WORDS[n % 3], "winner": LABELS[n % 3]}
        for n in range(96)
    ]
    path = write_jsonl(folder / "train.jsonl", records[24:])
    held_out = write_jsonl(folder / "held-out.jsonl", records[:23])  # 8, 8 and 7 of the classes
    return {"sources": [{"path": str(path)}], "validation": [{"name": "held-out", "path": str(held_out)}]}


def classify_recipe(base: Path, opinions: dict[str, Any], folder: Path, steps: int = 16) -> dict[str, Any]:
    name = "gemma2-9b_classify-qlora_fsdp_2xH100"
    values = recipe_file(name, folder, steps, opinions, model={"path": str(base), "weights": "fp32"})
    values["classify"] |= {"labels": list(LABELS)}
    values["optim"] = {"lr": 1e-2, "head_lr": 3e-2}
    return values | {"name": "tiny", "adapter": {"rank": 4, "alpha": 4}, "checkpoint": {"every_steps": 8}}


def instruct_recipe(base: Path, conversations: dict[str, Any], folder: Path, steps: int = 8) -> dict[str, Any]:
    name = "llama3-8b_two-stage-2-instruct-new-adapter_zero3_8xH100"
    values = recipe_file(name, folder, steps, conversations, model={"path": str(base), "weights": "fp32"})
    return values | {"name": "tiny", "adapter": {"rank": 4, "alpha": 4}, "optim": {"lr": 1e-2}}


def same_end(folders: list[Path], step: str) -> None:
    from dist_cpt.run_folder.checkpoints import read_manifest

    first, second = (read_manifest(folder / "checkpoints" / step) for folder in folders)
    assert first.tensors == second.tensors
    assert first.state_sha256 == second.state_sha256


def test_a_classifier_learns_resumes_bit_for_bit_and_opens_in_vanilla_peft(made, opinions, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from dist_cpt.export.generate import generate
    from dist_cpt.export.merge import merge
    from dist_cpt.report.report import write_report

    base = made[0]
    values = classify_recipe(base, opinions, tmp_path / "broken")
    run = tmp_path / "broken/tiny"
    assert train(values, StopAfter(8)) == 75
    assert train(values) == 0
    assert train(classify_recipe(base, opinions, tmp_path / "unbroken")) == 0
    same_end([run, tmp_path / "unbroken/tiny"], "step-00000016")
    contract = json.loads((run / "contract.json").read_text())
    assert [(g["name"], g["peak_lr"]) for g in contract["groups"]] == [("adapter", 0.01), ("head", 0.03)]

    first, *_, last = rows(run / "evaluations.jsonl")
    assert first["num_tokens"] == last["num_tokens"] == 23
    assert last["accuracy"] > max(0.6, first["accuracy"])
    checkpoint = run / "checkpoints/step-00000016"
    vanilla = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    vanilla = PeftModel.from_pretrained(vanilla, str(checkpoint)).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    records = rows(Path(opinions["validation"][0]["path"]))
    separator = values["classify"]["separator"]
    texts = [separator.join(record[f] for f in values["classify"]["text_fields"]) for record in records]
    truth = torch.tensor([LABELS.index(record["winner"]) for record in records])
    with torch.no_grad():
        logits = torch.cat([vanilla(torch.tensor([tokenizer(text)["input_ids"]])).logits for text in texts])
    assert last["accuracy"] == pytest.approx(float((logits.argmax(-1) == truth).float().mean()))
    log_loss = float(torch.nn.functional.cross_entropy(logits, truth))
    assert last["loss"] == pytest.approx(log_loss, abs=1e-5)

    assert merge(checkpoint, tmp_path / "merged", "fp32") < 1e-5
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        found = merged(torch.tensor([tokenizer(texts[0])["input_ids"]])).logits
    torch.testing.assert_close(found, logits[:1], rtol=1e-5, atol=1e-5)
    assert merged.config.id2label == dict(enumerate(LABELS))
    report = write_report(run).read_text()
    assert "held-out accuracy of held-out" in report
    assert "macro-f1" in report
    for folder in (checkpoint, tmp_path / "merged"):
        with pytest.raises(ConfigError, match="is a classifier"):
            generate(folder, "x")


def test_answers_resume_bit_for_bit(made, conversations, tmp_path):
    def values(folder: Path) -> dict[str, Any]:
        recipe = instruct_recipe(made[0], conversations, folder) | {"checkpoint": {"every_steps": 4}}
        return recipe | {"adapter": {"rank": 4, "alpha": 4, "dropout": 0.2}}  # random numbers resume as well

    run = tmp_path / "broken/tiny"
    assert train(values(tmp_path / "broken"), StopAfter(4)) == 75
    assert train(values(tmp_path / "broken")) == 0
    assert train(values(tmp_path / "unbroken")) == 0
    same_end([run, tmp_path / "unbroken/tiny"], "step-00000008")


def test_cpt_then_instruct_on_the_same_adapter(made, conversations, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dist_cpt.export.generate import generate

    base, corpus = made
    data = {
        "sources": [{"path": str(corpus)}],
        "validation": [{"name": "held-out", "path": str(corpus.parent / "held-out.jsonl")}],
    }
    adapter = {"rank": 4, "alpha": 4}
    optim = {"lr": 1e-2, "embedding_lr": 1e-3}
    model = {"path": str(base)}
    name = "llama3-8b_two-stage-1-cpt_zero3_8xH100"
    assert train(recipe_file(name, tmp_path, 4, data, model=model, adapter=adapter, optim=optim)) == 0
    prior = tmp_path / "llama3-8b-stage-1/checkpoints/step-00000004"
    name = "llama3-8b_two-stage-2-instruct_zero3_8xH100"
    adapter |= {"continue_from": {"path": str(prior)}}
    values = recipe_file(name, tmp_path, 12, conversations, model=model, adapter=adapter, optim=optim)
    assert train(values) == 0
    run = tmp_path / "llama3-8b-stage-2"
    evidence = json.loads((run / "continued.json").read_text())
    assert evidence["loss_with"] != evidence["loss_without"]
    losses = [row["loss"] for row in rows(run / "metrics.jsonl")]
    assert losses[-1] < losses[0] - 0.5
    answers = rows(run / "evaluations.jsonl")[0]["num_tokens"]
    checkpoint = run / "checkpoints/step-00000012"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer.chat_template == values["data"]["chat_template"]
    talks = [record["messages"] for record in rows(Path(conversations["validation"][0]["path"]))]
    expected = sum(len(tokenizer(m["content"])["input_ids"]) + 1 for t in talks for m in t if m["role"] == "assistant")
    assert answers == expected  # the answers and the EOS after each, nothing else
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(checkpoint))
    assert generate(checkpoint, "Say good 3", 8, temperature=0.5, top_k=5, top_p=0.9, chat=True).strip()


COURSE = {"gpt2": "gpt2-124m_scratch_single_1xGPU", "llama": "llama-110m_scratch_fsdp_4xGPU"}


@pytest.mark.parametrize("kind", ["gpt2", pytest.param("llama", marks=pytest.mark.matrix)])
def test_the_whole_path_from_scratch(made, tmp_path, kind):
    """Tokenizer, prepare, train, evaluate, generate; then published weights are loaded and trained on."""
    from transformers import AutoModelForCausalLM

    from dist_cpt.export.generate import generate
    from dist_cpt.export.merge import merge

    corpus = made[1]
    tokenizer = tiny.write_tokenizer(tmp_path / "tokenizer", corpus)
    data = {
        "sources": [{"path": str(corpus)}],
        "validation": [{"name": "held-out", "path": str(corpus.parent / "held-out.jsonl")}],
    }
    windows = {"packing": "windows", "stride": 48}
    small = {
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": tiny.SEQ_LEN, "vocab_size": tiny.VOCAB_SIZE}
        | {"bos_token_id": 0, "eos_token_id": 0},
        "llama": tiny.llama(tie_word_embeddings=True),
    }[kind]
    values = recipe_file(COURSE[kind], tmp_path, 12, data | windows | {"tokenizer": str(tokenizer)})
    values["model"]["config"] |= small
    values["optim"] = {"lr": 1e-2}
    assert train(values) == 0
    run = tmp_path / values["name"]
    before, after = (rows(run / "evaluations.jsonl")[i] for i in (0, -1))
    assert after["perplexity"] < 0.7 * before["perplexity"]
    # Held-out windows overlap too, and yet every token but a document's first is judged once.
    texts = [row["text"] for row in rows(corpus.parent / "held-out.jsonl")]
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(tokenizer)
    assert after["num_tokens"] == sum(len(words(text)["input_ids"]) for text in texts)
    checkpoint = run / "checkpoints/step-00000012"
    draws = [generate(checkpoint, "The ", 12, temperature=1.2, top_k=50, seed=seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    if kind == "gpt2":
        with pytest.raises(ConfigError, match=f"exceed the model's {tiny.SEQ_LEN} positions"):
            generate(checkpoint, "The ", tiny.SEQ_LEN)

    merge(checkpoint, tmp_path / "published", "fp32")
    second = recipe_file("gpt2-124m_full_single_1xGPU", tmp_path, 4, data | windows)
    second["model"] = {"path": str(tmp_path / "published")}
    second["optim"] = {"lr": 3e-3}
    assert train(second) == 0
    again = rows(tmp_path / "gpt2-continued/evaluations.jsonl")
    assert again[0]["loss"] == pytest.approx(after["loss"], abs=5e-3)  # it starts where the published weights stand
    assert again[-1]["loss"] < again[0]["loss"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2-continued/checkpoints/step-00000004")
    assert model.config.model_type == kind


@pytest.mark.matrix
@pytest.mark.parametrize("engine", ["{kind: fsdp, shard: full}", "{kind: zero, stage: 3}"])
@pytest.mark.parametrize("task", ["instruct", "classify"])
def test_two_ranks_learn_what_one_learns(made, conversations, opinions, tmp_path, task, engine):
    def values(folder: Path) -> dict[str, Any]:
        if task == "instruct":
            return instruct_recipe(made[0], conversations, folder)
        return classify_recipe(made[0], opinions, folder)

    assert train(values(tmp_path / "single")) == 0
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", values(tmp_path / "ranks"))
    log = tmp_path / "log"
    codes = run_ranks(recipe, 2, f"engine={engine}", "batch.micro_batch=1", log=log)
    assert codes == [0, 0], log.read_text()[-3000:]
    for file, keys in (("metrics.jsonl", ("loss", "num_tokens")), ("evaluations.jsonl", ("loss", "num_tokens"))):
        one, two = rows(tmp_path / "single/tiny" / file), rows(tmp_path / "ranks/tiny" / file)
        assert len(one) == len(two)
        for left, right in zip(one, two, strict=True):
            assert right[keys[0]] == pytest.approx(left[keys[0]], rel=2e-4, abs=2e-4)
            assert right[keys[1]] == left[keys[1]]
    if task == "classify":
        scores = [[row[k] for k in ("accuracy", "macro_f1")] for row in (one[-1], two[-1])]
        assert scores[0] == pytest.approx(scores[1])


@pytest.mark.matrix
def test_a_new_adapter_on_the_merged_model_of_stage_one(made, conversations, tmp_path):
    from dist_cpt.export.merge import merge

    base, corpus = made
    name = "llama3-8b_lora_fsdp_8xH100"
    data = {
        "sources": [{"path": str(corpus)}],
        "validation": [{"name": "held-out", "path": str(corpus.parent / "held-out.jsonl")}],
    }
    small = {"model": {"path": str(base)}, "adapter": {"rank": 4, "alpha": 4}, "optim": {"lr": 1e-2}}
    assert train(recipe_file(name, tmp_path, 4, data, **small)) == 0
    merge(tmp_path / "llama3-8b-domain/checkpoints/step-00000004", tmp_path / "merged", "fp32")
    second = instruct_recipe(tmp_path / "merged", conversations, tmp_path / "two")
    assert train(second) == 0
    losses = [row["loss"] for row in rows(tmp_path / "two/tiny/metrics.jsonl")]
    assert losses[-1] < losses[0]


def test_a_classifier_over_a_quantised_base(made, opinions, tmp_path):
    from dist_cpt.export.merge import merge, quantisation_gap

    pytest.importorskip("bitsandbytes")
    values = classify_recipe(made[0], opinions, tmp_path)
    values["model"] |= {"weights": "nf4"}
    assert train(values) == 0
    first, *_, last = rows(tmp_path / "tiny/evaluations.jsonl")
    assert last["loss"] < first["loss"]
    checkpoint = tmp_path / "tiny/checkpoints/step-00000016"
    assert merge(checkpoint, tmp_path / "merged", "fp32") < 1e-5
    gap = quantisation_gap(checkpoint)
    assert gap is not None
    assert 0 < gap < 5


def test_a_classifier_goes_on_from_one_and_a_new_one_stands_on_text(made, opinions, tmp_path):
    """Its own adapter and head train on; an adapter of text can be folded or stacked under a new head."""
    from dist_cpt.export.merge import merge

    base, corpus = made
    assert train(classify_recipe(base, opinions, tmp_path / "first")) == 0
    text = tiny.recipe(base, corpus, tmp_path / "text", embeddings={}, train={"tokens": 4 * 8 * tiny.SEQ_LEN})
    assert train(text) == 0
    classifier, language = tmp_path / "first/tiny/checkpoints/step-00000016", tmp_path / "text/tiny/checkpoints"

    def continue_run(name: str, path: Path, mode: str, **changes: Any) -> tuple[int, Path]:
        values: dict[str, Any] = classify_recipe(base, opinions, tmp_path, steps=2) | changes | {"name": name}
        values["adapter"] |= {"continue_from": {"path": str(path), "mode": mode}}
        return train(values), tmp_path / name

    code, run = continue_run("second", classifier, "train")
    evidence = json.loads((run / "continued.json").read_text())
    assert code == 0
    assert evidence["loss_with"] < 0.5 * evidence["loss_without"]
    before = rows(tmp_path / "first/tiny/evaluations.jsonl")[-1]["loss"]
    assert rows(run / "evaluations.jsonl")[0]["loss"] == pytest.approx(before, rel=1e-5)
    for mode, weights in (("fold", "nf4"), ("stack", "bf16")):
        model = {"path": str(base), "weights": weights}
        code, run = continue_run(mode, language / "step-00000004", mode, model=model)
        assert code == 0
        evidence = json.loads((run / "continued.json").read_text())
        assert evidence["loss_of_the_engine"] == pytest.approx(evidence["class_loss"], rel=1e-6)
        assert merge(run / "checkpoints/step-00000002", tmp_path / f"{mode}-merged", "fp32") < 1e-5

    def refused(name: str, path: Path, mode: str, named: str, **changes: Any) -> None:
        code, run = continue_run(name, path, mode, **changes)
        assert code == 64
        assert named in json.loads((run / "exit.json").read_text())["reason"]

    turned = classify_recipe(base, opinions, tmp_path)["classify"] | {"labels": list(LABELS[::-1])}
    refused("turned", classifier, "train", "['praise', 'blame', 'neither']", classify=turned)
    refused("fold-head", classifier, "fold", "adapter.continue_from.mode: train")
    refused("no-head", language / "step-00000004", "train", "base_model.model.score.weight")


def test_every_recipe_file_is_valid():
    from dist_cpt.config.load import load_recipe

    for path in sorted(RECIPES.glob("*.yaml")):
        assert load_recipe(path).name
