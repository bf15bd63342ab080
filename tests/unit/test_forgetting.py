"""The bytes behind tokens, and what rows of evaluations say about forgetting."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dist_cpt.config.schema import BestConfig, EvaluateConfig, ForgettingConfig
from dist_cpt.data.batch import IGNORE_INDEX, Batch
from dist_cpt.data.text_bytes import TextBytes
from dist_cpt.run_folder.evaluations import best_step, over_limit, previous_step, reason_to_end, rises

TEXTS = ["Straße №5: naïve 日本語, emoji 🙂 and  two spaces\n\tindented", "a plain line", "x = {'ключ': 1}"]
LEARNED = ["Stra and plain line indented two spaces", "a plain line of plain spaces"] * 20


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner = trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([*TEXTS, *LEARNED], learner)
    return tokenizer


def like_llama() -> Tokenizer:
    """SentencePiece's spelling: U+2581 before every text, bytes for what it has not learned, BOS in front."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = [decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), *strip])
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(LEARNED, trainers.BpeTrainer(vocab_size=80, special_tokens=special))
    tokenizer.add_tokens([])
    content = tokenizer.to_str().replace('"vocab":{', '"vocab":{' + _bytes_after(tokenizer.get_vocab_size()), 1)
    tokenizer = Tokenizer.from_str(content)
    bos = [("<s>", tokenizer.token_to_id("<s>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=bos)
    return tokenizer


def _bytes_after(size: int) -> str:
    return "".join(f'"<0x{byte:02X}>":{size + byte},' for byte in range(256))


def batch_of(ids: list[int]) -> Batch:
    """One document, all of whose next tokens are targets."""
    labels = torch.tensor([[*ids[1:], IGNORE_INDEX]])
    positions = torch.arange(len(ids))[None]
    counts = np.zeros((1, 3), np.int64)
    return Batch(torch.tensor([ids]), labels, positions, torch.tensor([0, len(ids)]), len(ids), 0, counts, (0,))


@pytest.mark.parametrize("make", [byte_level, like_llama])
@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_behind_targets_are_those_of_the_text(make, text):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make(), eos_token="</s>")
    counted = TextBytes.of(tokenizer)
    assert counted is not None
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    begins_with_bos = tokenizer.convert_ids_to_tokens(ids[0]) == "<s>"
    first = b"" if begins_with_bos else tokenizer.decode(ids[:1]).encode()  # has no target
    ids = [*ids, tokenizer.eos_token_id]
    assert counted.of_targets(batch_of(ids)) == len(text.encode()) - len(first)


def test_a_tokenizer_whose_tokens_have_no_size_of_their_own_has_no_bits_per_byte():
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    assert TextBytes.of(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[UNK]")) is None


def row(step: int, name: str, loss: float | None, base: float | None, role: str = "retention") -> dict:
    return {"step": step, "name": name, "loss": loss, "base_loss": base, "role": role}


def within(loss_rise: float, **best: Any) -> EvaluateConfig:
    limit = ForgettingConfig(policy="keep_best", loss_rise=loss_rise)
    return EvaluateConfig(forgetting=limit, best=BestConfig(**best) if best else None)


def test_the_best_step_learns_most_of_those_within_the_limit():
    rows = [
        *(row(step, "law", loss, 3.0, "domain") for step, loss in ((0, 3.0), (10, 2.5), (20, 2.0), (30, 1.5))),
        *(row(step, "news", loss, 2.0) for step, loss in ((0, 2.0), (10, 2.02), (20, 2.04), (30, 2.2))),
        *(row(step, "code", loss, 1.0) for step, loss in ((0, 1.0), (10, 1.0), (20, 1.1), (30, 0.9))),
    ]
    assert rises(rows, 20) == pytest.approx({"news": 0.04, "code": 0.1})
    assert over_limit(rows, 20, 0.05) == pytest.approx({"code": 0.1})
    assert [best_step(rows, within(limit)) for limit in (0.3, 0.11, 0.05, 0.01)] == [30, 20, 10, 10]
    assert best_step(rows[:1], within(0.05)) is None
    assert best_step([*rows, row(40, "law", None, 3.0, "domain")], within(0.3)) == 30  # a loss that is not finite
    assert (previous_step(rows, 20), previous_step(rows, 0)) == (10, None)
    assert rises([row(10, "news", 2.0, None)], 10) == {}


def test_an_evaluation_under_way_is_not_the_best_yet():
    """A save beside it would prune the checkpoint that is best."""
    rows = [row(step, "new", loss, 3.0, "domain") for step, loss in ((2, 2.0), (4, 1.0))]
    rows.insert(1, row(2, "old", 3.0, 3.0))
    assert best_step(rows, within(0.5)) == 2
    assert best_step([*rows, row(4, "old", 3.1, 3.0)], within(0.5)) == 4
    assert best_step([*rows, row(4, "old", 4.0, 3.0)], within(0.5)) == 2


def test_the_best_step_by_a_number_of_one_set_is_the_first_with_it():
    values = [(0, 9.0), (10, 3.0), (20, 5.0), (30, 5.0), (40, 4.0), (50, None)]
    rows = [row(step, "answers", 2.0, None, "domain") | {"accuracy": value} for step, value in values]
    accuracy = {"of": "answers/accuracy"}
    config = EvaluateConfig(best=BestConfig(**accuracy, patience=2))
    assert best_step(rows, config) == 20
    assert best_step(rows, EvaluateConfig(best=BestConfig(**accuracy, better="lower"))) == 10
    assert best_step(rows, EvaluateConfig(best=BestConfig(of="answers"))) == 10  # the loss, the same everywhere
    assert best_step(rows, EvaluateConfig()) == 10  # the mean loss of the domain sets
    assert [reason_to_end(rows[: n + 1], 10 * n, config) for n in range(4)] == [None] * 4
    ended = reason_to_end(rows[:5], 40, config)
    assert ended == "answers/accuracy is best after step 20, and no better in the 2 evaluations since"
    assert reason_to_end(rows, 50, EvaluateConfig(best=BestConfig(**accuracy))) is None
    rising = [row(step, "news", 2.0 + step / 100, 2.0) for step, _ in values]
    assert best_step([*rows, *rising], within(0.15, **accuracy)) == 10
