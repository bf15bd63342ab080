"""A packed classifier gives transformers' logits, its folder opens in vanilla PEFT, and scores are by the book."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dist_cpt.config.load import build
from dist_cpt.errors import ConfigError
from dist_cpt.model.classify import ClassHead, is_classifier, read_labels
from dist_cpt.model.load import TrainableModel, load_model
from dist_cpt.optim.groups import param_groups
from dist_cpt.run_folder.names import ADAPTER_WEIGHTS
from dist_cpt.train.held_out import class_scores

CPU = torch.device("cpu")
V, PAD, C = 53, 1, 3
SIZES = (5, 9, 1, 7)
COMMON = {"vocab_size": V, "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 0}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
MODELS = {
    "llama": LLAMA | COMMON,
    "tied": LLAMA | COMMON | {"tie_word_embeddings": True},
    "qwen2": LLAMA | COMMON | {"model_type": "qwen2"},
    "gemma2": LLAMA
    | COMMON
    | {
        "model_type": "gemma2",
        "head_dim": 8,
        "sliding_window": 4,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 5.0,
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32} | COMMON,
}


def write_base(folder: Path, name: str) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(MODELS[name])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    model.save_pretrained(folder)
    return folder


def classifier(base: Path, **changes: Any) -> TrainableModel:
    values = {
        "name": "x",
        "task": "classify",
        "classify": {"labels": ["a", "b", "c"]},
        "model": {"path": str(base), "weights": "fp32"},
        "adapter": {"rank": 2, "alpha": 8},
        "data": {"seq_len": 22, "sources": [{"path": "x"}]},
        "batch": {"global_tokens": 22},
        "train": {"tokens": 22},
    }
    return load_model(build(values | changes, where="test"), device=CPU)


def texts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(2, V, (size,), generator=generator) for size in SIZES]


def padded() -> dict[str, torch.Tensor]:
    """The texts as transformers takes them: one per row."""
    ids = torch.full((len(SIZES), max(SIZES)), PAD)
    for row, text in enumerate(texts()):
        ids[row, : len(text)] = text
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def packed(labels: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, positions, borders and labels [1, T] of all texts in one row."""
    borders = torch.tensor([0, *np.cumsum(SIZES)], dtype=torch.int32)
    row = torch.full((1, sum(SIZES)), -100)
    row[0, borders[1:].long() - 1] = torch.tensor(labels)
    return torch.cat(texts())[None], torch.cat([torch.arange(n) for n in SIZES])[None], borders, row


@torch.no_grad()
def randomise(model: TrainableModel) -> None:
    """Values far from the start, so that an adapter that is left out would show."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.trainable.values():
        parameter.normal_(0, 0.3, generator=generator)


@pytest.mark.parametrize("name", MODELS)
def test_packed_logits_and_the_saved_folder_are_those_of_transformers(tmp_path, name) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    base = write_base(tmp_path / "base", name)
    train = {"train": ["embed_tokens"]} if name == "tied" else {}
    model = classifier(base, embeddings=train)
    randomise(model)
    names = [name for name in model.trainable if "lora" not in name]
    assert sorted(name.rsplit(".", 2)[-2] for name in names) == (["embed_tokens"] if train else []) + ["score"]
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file({key: p.detach().clone() for key, p in model.trainable.items()}, folder / ADAPTER_WEIGHTS)
    model.write_config(folder)
    assert read_labels(folder) == ("a", "b", "c")

    # transformers' fused attention leaves Gemma's cap on the scores out.
    vanilla = AutoModelForSequenceClassification.from_pretrained(base, num_labels=C, attn_implementation="eager")
    vanilla = PeftModel.from_pretrained(vanilla, str(folder)).eval()
    truth = [0, 2, 1, 2]
    with torch.no_grad():
        expected = vanilla(**padded()).logits
        module = model.module.eval()
        ids, positions, borders, labels = packed(truth)
        hidden = module.hidden(ids, positions, borders, max(SIZES))
        head = model.class_head
        assert isinstance(head, ClassHead)
        found = head(hidden)[0, borders[1:].long() - 1]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert float(expected.std()) > 0.1
        last = module(texts()[1][None], torch.arange(9)[None], torch.tensor([0, 9], dtype=torch.int32), 9)
        torch.testing.assert_close(last, expected[1:2], rtol=1e-5, atol=1e-5)
        head.take_confusion()
        _, loss_sum = module(ids, positions, borders, max(SIZES), labels)
        torch.testing.assert_close(loss_sum, F.cross_entropy(expected, torch.tensor(truth), reduction="sum"))
        counts = np.zeros((C, C), dtype=int)
        np.add.at(counts, (truth, expected.argmax(-1).numpy()), 1)
        assert head.take_confusion() == counts.flatten().tolist()
        assert head.take_confusion() == [0] * C * C
    module.train()
    module(ids, positions, borders, max(SIZES), labels)
    assert head.take_confusion() == [0] * C * C  # training counts nothing


def test_a_full_model_is_saved_as_a_classifier_and_has_its_groups(tmp_path) -> None:
    from transformers import AutoModelForSequenceClassification

    base = write_base(tmp_path / "base", "llama")
    model = classifier(base, adapter={"kind": "none"}, optim={"lr": 1e-3, "head_lr": 1e-2})
    randomise(model)
    folder = tmp_path / "full"
    folder.mkdir()
    model.write_config(folder)
    save_file({key: p.detach().clone() for key, p in model.trainable.items()}, folder / "model.safetensors")
    assert is_classifier(folder)
    assert not is_classifier(base)
    vanilla = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert vanilla.config.id2label == {0: "a", 1: "b", 2: "c"}
    ids, positions, borders, _ = packed([0, 0, 0, 0])
    with torch.no_grad():
        hidden = model.module.eval().hidden(ids, positions, borders, max(SIZES))
        found = model.class_head(hidden)[0, borders[1:].long() - 1]  # type: ignore[misc]
        torch.testing.assert_close(found, vanilla(**padded()).logits, rtol=1e-5, atol=1e-5)
    config = build({"name": "x", "task": "classify", "classify": {"num_labels": 2}, "model": {"path": "m"},
                    "optim": {"lr": 1e-3, "head_lr": 1e-2}, "data": {"seq_len": 8, "sources": [{"path": "x"}]},
                    "batch": {"global_tokens": 8}, "train": {"tokens": 8}}, where="test")  # fmt: skip
    groups = {group.name: group for group in param_groups(model.trainable, config.optim, adapter=False)}
    assert groups["head"].names == ("score.weight",)
    assert (groups["head"].peak_lr, groups["weights"].peak_lr) == (1e-2, 1e-3)


def test_the_head_is_drawn_from_the_seed_alone(tmp_path) -> None:
    base = write_base(tmp_path / "base", "llama")
    torch.manual_seed(5)
    one = classifier(base)
    torch.manual_seed(6)
    two, other = classifier(base), classifier(base, seed=1)
    name = next(name for name in one.trainable if name.endswith("score.weight"))
    assert torch.equal(one.trainable[name], two.trainable[name])
    assert not torch.equal(one.trainable[name], other.trainable[name])


def test_lm_head_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"task: classify, embeddings\.train: \[lm_head\]"):
        classifier(tmp_path, embeddings={"train": ["lm_head"]})


def test_scores_by_hand() -> None:
    # Truth a: 3 right, 1 called b. Truth b: 1 right, 2 called a. c never occurs.
    scores = class_scores([3, 1, 0, 2, 1, 0, 0, 0, 0])
    assert scores["accuracy"] == pytest.approx(4 / 7)
    # F1 of a: 2*3 / (2*3 + 2 + 1) = 6/9; of b: 2*1 / (2*1 + 1 + 2) = 2/5.
    assert scores["macro_f1"] == pytest.approx((6 / 9 + 2 / 5) / 2)
    # b is never true but predicted once: it counts, with F1 0.
    assert class_scores([1, 1, 0, 0])["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)
    assert np.isnan(class_scores([0, 0, 0, 0])["accuracy"])


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_scores_are_precision_and_recall(pairs: list[tuple[int, int]]) -> None:
    counts = np.zeros((4, 4), dtype=int)
    for truth, guess in pairs:
        counts[truth, guess] += 1
    f1 = []
    for c in sorted({c for pair in pairs for c in pair}):
        said = [truth == c for truth, guess in pairs if guess == c]
        held = [guess == c for truth, guess in pairs if truth == c]
        precision = sum(said) / len(said) if said else 0.0
        recall = sum(held) / len(held) if held else 0.0
        f1.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    scores = class_scores(counts.flatten().tolist())
    assert scores["macro_f1"] == pytest.approx(sum(f1) / len(f1))
    assert scores["accuracy"] == pytest.approx(sum(t == g for t, g in pairs) / len(pairs))
