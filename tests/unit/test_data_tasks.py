"""Which token of a conversation is an answer, which token carries a class: exact, through store and loader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_cpt.config.load import build
from dist_cpt.config.resolve import resolve_paths
from dist_cpt.config.schema import RunConfig
from dist_cpt.data.batch import IGNORE_INDEX
from dist_cpt.data.data_report import data_report
from dist_cpt.data.loader import BlockLoader
from dist_cpt.data.packing import pack
from dist_cpt.data.prepare import prepare
from dist_cpt.data.prepared import open_prepared
from dist_cpt.data.store import TokenStore
from dist_cpt.data.tokenizer import load_tokenizer
from dist_cpt.errors import ConfigError, DataError
from tests.chat import FORGETFUL, MARKED, assistant, user, write_chat_tokenizer, write_jsonl

L = 96
TALKS = [
    [user("How many legs has a spider?"), assistant("Eight legs.")],
    [
        {"role": "system", "content": "Be brief."},
        user("Is 7 prime?"),
        assistant("Yes."),
        user("And 9? naïve 文字"),
        assistant("No: 3 x 3."),
    ],
    [assistant("Hello."), user("Good bye"), assistant("Bye.")],
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [message["content"] for talk in TALKS for message in talk] + ["abab ab ab ab", "abab"]
    return write_chat_tokenizer(tmp_path_factory.mktemp("tokenizer"), texts * 4)


def recipe(folder: Path, tokenizer: Path, records: list[Any], **changes: Any) -> RunConfig:
    """A recipe of task instruct, with `changes`."""
    path = write_jsonl(folder / "records.jsonl", records)
    source = {"path": str(path)} | changes.pop("source", {})
    data = {"seq_len": L, "tokenizer": str(tokenizer), "sources": [source]} | changes.pop("data", {})
    values = {
        "name": "test",
        "output_dir": str(folder / "runs"),
        "task": "instruct",
        "model": {"config": {"model_type": "llama"}},
        "adapter": {"kind": "none"},
        "data": data,
        "batch": {"global_tokens": L},
        "train": {"tokens": L},
    }
    return resolve_paths(build(values | changes, where="test"))


def store_of(config: RunConfig) -> TokenStore:
    return prepare(config).sources[0].store


def documents(store: TokenStore) -> list[tuple[list[int], list[int]]]:
    """(ids, answers) of every document."""
    answers = store.answers
    assert answers is not None
    ends = np.cumsum(store.lengths).tolist()
    spans = zip([0, *ends], ends, strict=False)
    return [(store.tokens[a:b].tolist(), answers[a:b].tolist()) for a, b in spans]


def by_hand(tokenizer: Path, talk: list[dict[str, str]], end_trains: bool) -> tuple[list[int], list[int]]:
    """The same, put together message by message: border tokens keep their neighbours apart."""
    loaded = load_tokenizer(str(tokenizer))
    ids, mask = loaded.encode("<s>", add_special_tokens=False), [0]
    for message in talk:
        role = loaded.encode(f"<|{message['role']}|>", add_special_tokens=False)
        content = loaded.encode(message["content"], add_special_tokens=False)
        end = loaded.encode("<|end|>", add_special_tokens=False)
        is_answer = int(message["role"] == "assistant")
        ids += role + content + end
        mask += [0] * len(role) + [is_answer] * len(content) + [is_answer * end_trains] * len(end)
    return ids, mask


def test_answers_are_exactly_the_answers_tokens(tmp_path, tokenizer) -> None:
    plain = recipe(tmp_path / "a", tokenizer, [{"messages": talk} for talk in TALKS])
    store = store_of(plain)
    assert documents(store) == [by_hand(tokenizer, talk, end_trains=True) for talk in TALKS]
    marked = recipe(tmp_path / "b", tokenizer, [{"messages": talk} for talk in TALKS], data={"chat_template": MARKED})
    assert documents(store_of(marked)) == [by_hand(tokenizer, talk, end_trains=False) for talk in TALKS]
    file = tmp_path / "template.jinja"
    file.write_text(MARKED)
    named = recipe(tmp_path / "b", tokenizer, [], data={"chat_template": str(file)})
    assert file.as_posix() == named.data.chat_template
    columns = [{"q": talk[0]["content"], "a": talk[1]["content"]} for talk in TALKS[:1]]
    pairs = recipe(tmp_path / "c", tokenizer, columns, source={"prompt": "q", "response": "a"})
    assert documents(store_of(pairs)) == [by_hand(tokenizer, TALKS[0], end_trains=True)]
    answered = sum(sum(answers) for _, answers in documents(store))
    assert data_report(prepare(plain))["sources"][0]["answer_tokens"] == answered


def test_targets_of_a_packed_block_are_answers_and_never_cross_a_border(tmp_path, tokenizer) -> None:
    config = recipe(tmp_path, tokenizer, [{"messages": talk} for talk in TALKS])
    prepared = prepare(config)
    loader = BlockLoader(prepared, L, 0, 1)
    targets: list[int] = []
    num_targets = 0
    for position in range(pack(prepared.sources[0].store.lengths, L).num_blocks):
        batch = loader.batch([position])
        labels = batch.labels[0]
        num_targets += batch.num_targets
        assert batch.num_targets == int((labels != IGNORE_INDEX).sum())
        for first, last in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
            assert labels[last - 1] == IGNORE_INDEX
            for at in range(first, last - 1):
                if labels[at] != IGNORE_INDEX:
                    assert labels[at] == batch.input_ids[0, at + 1]
                    targets.append(int(labels[at]))
    expected = [
        token for talk in TALKS for token, mask in zip(*by_hand(tokenizer, talk, end_trains=True), strict=True) if mask
    ]
    assert sorted(targets) == sorted(expected)
    assert num_targets == len(expected)


def test_labels_count_in_the_identity_and_damage_is_found(tmp_path, tokenizer) -> None:
    records = [{"messages": talk} for talk in TALKS]
    one = recipe(tmp_path, tokenizer, records)
    # The same text with other marks: the tokens are equal, the answers are not.
    two = recipe(tmp_path, tokenizer, records, data={"chat_template": MARKED})
    first, second = prepare(one), prepare(two)
    files = [prepared.sources[0].store.manifest.files for prepared in (first, second)]
    assert files[0]["tokens.bin"] == files[1]["tokens.bin"]
    assert first.identity != second.identity
    path = first.sources[0].store.folder / "answers.bin"
    content = path.read_bytes()
    path.write_bytes(bytes([1 - content[0]]) + content[1:])
    with pytest.raises(DataError, match=r"answers\.bin"):
        TokenStore.open(path.parent, verify=True)
    path.write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"answers\.bin"):
        open_prepared(one)


@pytest.mark.parametrize(
    ("record", "data", "reason"),
    [
        ({"messages": [user("Who?")]}, {}, "no_answer"),
        ({"messages": [user("Who?"), {"role": "assistant"}]}, {}, "no_conversation"),
        ({"messages": "Who?"}, {}, "no_conversation"),
        ({"text": "Who?"}, {}, "missing_field"),
        ({"messages": [user("Who?"), assistant("I " * 99)]}, {}, "too_long"),
        ({"messages": [user("W"), assistant("I"), user("W"), assistant("you.")]}, {}, ""),
        ({"messages": TALKS[1]}, {"chat_template": FORGETFUL}, "template_not_prefix"),
        (
            {"messages": [user("a"), assistant("b")]},
            {"chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}"},
            "token_across_border",
        ),
        (
            {"messages": [user("a"), assistant("b")]},
            {"chat_template": "{{ raise_exception('roles must alternate') }}"},
            "template_error",
        ),
    ],
)
def test_a_bad_conversation_is_counted_with_its_reason(tmp_path, tokenizer, record, data, reason) -> None:
    good = {"messages": [user("a"), assistant(" b")]}
    if data.get("chat_template", "").startswith("{{ raise"):
        data = {"chat_template": "{% if messages[0].content == 'a' %}" + data["chat_template"] + "{% endif %}"
                "{% for m in messages %}{{ '<|end|>' + m.content }}{% endfor %}"
                "{% if add_generation_prompt %}{{ '<|end|>' }}{% endif %}"}  # fmt: skip
        good = {"messages": [user("x"), assistant("y")]}
    settings = {"on_bad_record": "quarantine", "bad_record_budget_fraction": 1.0}
    config = recipe(tmp_path, tokenizer, [good, record, good], data=data | settings)
    store = store_of(config)
    assert store.manifest.counts["bad"] == ({reason: 1} if reason else {})
    assert store.num_documents == (2 if reason else 3)
    if reason:
        (line,) = (store.folder / "quarantine.jsonl").read_text().splitlines()
        kept = json.loads(line)
        assert kept["where"].endswith("records.jsonl:2")
        assert json.loads(kept["record"]) == record
        strict = recipe(tmp_path / "strict", tokenizer, [good, record], data=data)
        with pytest.raises(DataError, match=r"records\.jsonl:2: "):
            prepare(strict)


def test_templates_that_cannot_be_used_are_one_line(tmp_path, tokenizer) -> None:
    without = write_chat_tokenizer(tmp_path / "bare", ["some text"], template=None)
    records = [{"messages": TALKS[0]}]
    for template, problem in (
        (None, "data.chat_template"),
        ("{% for m in messages %}", r"data.chat_template, line 1"),
        (str(tmp_path / "none.jinja"), r"none\.jinja"),
    ):
        with pytest.raises(DataError, match=problem) as caught:
            prepare(recipe(tmp_path, without, records, data={} if template is None else {"chat_template": template}))
        assert "\n" not in str(caught.value)


def classify(folder: Path, tokenizer: Path, records: list[Any], **changes: Any) -> RunConfig:
    section = {"labels": ["no", "yes", "maybe"]} | changes.pop("classify", {})
    return recipe(folder, tokenizer, records, task="classify", classify=section, **changes)


def test_the_last_token_of_each_text_carries_its_class(tmp_path, tokenizer) -> None:
    records = [{"text": f"Is {n} prime? " * (n % 3 + 1), "label": ["no", "yes", "maybe"][n % 3]} for n in range(9)]
    config = classify(tmp_path, tokenizer, records)
    prepared = prepare(config)
    store = prepared.sources[0].store
    loaded = load_tokenizer(str(tokenizer))
    assert [store.document(i).tolist() for i in range(9)] == [loaded(r["text"])["input_ids"] for r in records]
    assert store.classes is not None
    assert store.classes.tolist() == [n % 3 for n in range(9)]
    assert data_report(prepared)["sources"][0]["documents_by_class"] == [3, 3, 3]
    loader = BlockLoader(prepared, L, 0, 1)
    seen: list[tuple[tuple[int, ...], int]] = []
    for position in range(pack(prepared.sources[0].store.lengths, L).num_blocks):
        batch = loader.batch([position])
        labelled = np.flatnonzero(batch.labels[0] != IGNORE_INDEX)
        assert batch.num_targets == len(labelled)
        for at in labelled.tolist():
            first = at - int(batch.position_ids[0, at])
            assert at + 1 in batch.cu_seqlens.tolist()
            seen.append((tuple(batch.input_ids[0, first : at + 1].tolist()), int(batch.labels[0, at])))
    expected = [(tuple(store.document(i).tolist()), i % 3) for i in range(9)]
    assert sorted(seen) == sorted(expected)


def test_fields_numbers_truncation_and_bad_classes(tmp_path, tokenizer) -> None:
    records = [{"q": "a b", "r": "c d", "winner": 1}, {"q": "a " * L, "r": "c", "winner": 0}]
    section = {"labels": [], "num_labels": 2, "label": "winner", "text_fields": ["q", "r"], "separator": "\n\n"}
    config = classify(tmp_path, tokenizer, records, classify=section | {"truncate": True})
    store = store_of(config)
    loaded = load_tokenizer(str(tokenizer))
    assert store.document(0).tolist() == loaded("a b\n\nc d")["input_ids"]
    assert store.document(1).tolist() == loaded("a " * L + "\n\nc")["input_ids"][:L]
    settings = {"on_bad_record": "skip", "bad_record_budget_fraction": 1.0}
    bad = [*records, {"q": "a", "r": "b", "winner": 2}, {"q": "a", "r": "b", "winner": True}, {"q": "a", "winner": 1}]
    counts = store_of(classify(tmp_path / "bad", tokenizer, bad, classify=section, data=settings)).manifest.counts
    assert counts["bad"] == {"too_long": 1, "unknown_class": 2, "missing_field": 1}
    assert counts["texts"] == 1
    named = store_of(
        classify(tmp_path / "n", tokenizer, [{"text": "a", "label": "no"}, {"text": "a", "label": "NO"}], data=settings)
    )
    assert named.manifest.counts["bad"] == {"unknown_class": 1}


def test_a_text_that_its_tokenizer_ends_with_padding_ends_before_it(tmp_path, tokenizer) -> None:
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    content["post_processor"]["single"].append({"SpecialToken": {"id": "<eos>", "type_id": 0}})
    content["post_processor"]["special_tokens"]["<eos>"] = {"id": "<eos>", "ids": [0], "tokens": ["<eos>"]}
    ending = tmp_path / "ending"
    ending.mkdir()
    (ending / "tokenizer.json").write_text(json.dumps(content))
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text()) | {"pad_token": "<eos>"}
    (ending / "tokenizer_config.json").write_text(json.dumps(settings))
    store = store_of(classify(tmp_path, ending, [{"text": "a b", "label": "no"}]))
    assert [*store.document(0).tolist(), 0] == load_tokenizer(str(ending))("a b")["input_ids"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"task": "cpt", "data": {"chat_template": "{{ x }}"}}, r"data\.chat_template"),
        ({"task": "cpt", "source": {"prompt": "q"}}, "prompt"),
        ({"source": {"prompt": "q"}}, "prompt.*response"),
        ({"data": {"packing": "windows"}}, r"data\.packing"),
        ({"task": "classify"}, "classify"),
        ({"classify": {"num_labels": 2}}, "classify"),
        ({"optim": {"head_lr": 1.0}}, r"optim\.head_lr"),
        ({"task": "classify", "classify": {"labels": ["a"]}}, "labels"),
        ({"task": "classify", "classify": {"labels": ["a", "b"], "num_labels": 2}}, "labels"),
        ({"task": "cpt", "data": {"stride": 3}}, "data.packing: best_fit, data.stride: 3"),
        ({"task": "cpt", "data": {"packing": "windows", "stride": 97}}, "stride"),
    ],
)
def test_settings_of_another_task_are_refused(tmp_path, tokenizer, changes, problem) -> None:
    with pytest.raises(ConfigError, match=problem):
        recipe(tmp_path, tokenizer, [], **changes)
