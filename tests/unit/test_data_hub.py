"""Data sets of the hub, against a hub of our own that answers `datasets` over HTTP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dist_cpt.config.load import load_recipe
from dist_cpt.config.resolve import resolve_paths
from dist_cpt.config.schema import RunConfig
from dist_cpt.data.hub import REVISIONS, commits
from dist_cpt.data.prepare import prepare
from dist_cpt.errors import EXIT_DATA, EXIT_STORAGE, ConfigError
from tests.fake_hub import COMMIT, Repository, serving
from tests.tiny import write_corpus, write_tokenizer

TEXTS = ["Die Berufung ist zulässig.", "日本語の文章です。", 'He said: "no, thanks"\r\ntwice\ttoday 🙂']
CARD = """---
configs:
- config_name: de
  data_files: [{split: train, path: de/train-*.jsonl}, {split: test, path: de/test.jsonl}]
- config_name: cut
  data_files: cut.jsonl
---
"""
PATH = "hf://datasets/org/name"

# What a hub's library knows of its endpoint it reads when it is imported: every question is asked in another process.
PREPARE = """
import json, sys
import datasets
from dist_cpt.config.schema import RunConfig
from dist_cpt.data.data_report import data_report
from dist_cpt.data.prepare import prepare
from dist_cpt.errors import DistCptError

datasets.config.STREAMING_READ_MAX_RETRIES = 1
datasets.config.STREAMING_READ_RETRY_INTERVAL = 0
for line in sys.stdin:
    try:
        print(json.dumps(data_report(prepare(RunConfig.model_validate_json(line)))))
    except DistCptError as error:
        print(json.dumps({"code": error.exit_code, "error": str(error)}))
"""


def repository() -> Repository:
    lines = [json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in TEXTS]
    return Repository(
        "org/name",
        {
            "README.md": CARD.encode(),
            "de/train-0.jsonl": lines[0] + lines[1],
            "de/train-1.jsonl": lines[2],
            "de/test.jsonl": lines[0],
            "cut.jsonl": lines[0] + b'{"text": "cut o',
        },
    )


def recipe(folder: Path, **source: Any) -> RunConfig:
    values = {
        "name": "test",
        "output_dir": str(folder / "runs"),
        "model": {"config": {"model_type": "llama"}},
        "adapter": {"kind": "none"},
        "data": {
            "seq_len": 32,
            "tokenizer": str(folder / "tokenizer"),
            "on_bad_record": "skip",
            "sources": [{"path": PATH, "name": "s"} | source],
        },
        "batch": {"global_tokens": 64},
        "train": {"tokens": 64},
    }
    return resolve_paths(RunConfig.model_validate(values))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path / "tokenizer", write_corpus(tmp_path))
    return tmp_path


def ask(endpoint: str, folder: Path, *recipes: RunConfig) -> list[dict[str, Any]]:
    """The data report, or the error, of each recipe, prepared one after the other."""
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), "PYTHONPATH": os.getcwd()}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}
    lines = "".join(config.model_dump_json() + "\n" for config in recipes)
    done = subprocess.run(
        [sys.executable, "-c", PREPARE], input=lines, capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_hub_data_set_has_the_tokens_of_its_files_and_one_commit(folder: Path) -> None:
    (folder / "same.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    expected = prepare(recipe(folder, path=str(folder / "same.jsonl"))).identity
    hub, train = repository(), recipe(folder, subset="de", split="train")
    with serving(hub) as endpoint:
        other = recipe(folder, subset="de", split="train", revision="v2")
        missing = recipe(folder, path="hf://datasets/org/other")
        wrong = [recipe(folder, subset="de"), recipe(folder, subset="fr"), other, missing, recipe(folder, subset="cut")]
        first, again, *refused = ask(endpoint, folder, train, train, *wrong)
    assert first["identity"] == again["identity"] == expected
    (source,) = first["sources"]
    assert (source["documents"], source["records"]) == (3, 3)
    manifest = json.loads((Path(source["folder"]) / "manifest.json").read_text())
    assert manifest["inputs"][0]["path"] == f"{PATH}@{COMMIT}/de/train"
    for answer, named in zip(refused, ("train, test", "'de'", "v2", "other", "damaged_file 1"), strict=True):
        assert answer["code"] == EXIT_DATA
        assert named in answer["error"]
        assert "\n" not in answer["error"]
    asked = [request for request in hub.requests if request.startswith("GET /api/datasets/org/name -> ")]
    assert len(asked) == 1  # which commit it is
    # Now there is no hub any more, and the store serves.
    assert commits(train) == [COMMIT]
    assert prepare(train).identity == expected
    assert json.loads((folder / "runs" / "data" / REVISIONS).read_text()) == {f"{PATH}@main": COMMIT}


@pytest.mark.matrix
def test_without_a_hub_the_error_says_where_to_prepare(folder: Path) -> None:
    (answer,) = ask("http://127.0.0.1:9", folder, recipe(folder))
    assert answer["code"] == EXIT_DATA
    assert "dist-cpt prepare" in answer["error"]


@pytest.mark.matrix
def test_hub_that_stops_answering_is_no_damaged_file(folder: Path) -> None:
    """Under `skip` the rest of the text would be missing without a word."""
    hub = repository()
    hub.unavailable = "de/train-1.jsonl"
    with serving(hub) as endpoint:
        (answer,) = ask(endpoint, folder, recipe(folder, subset="de", split="train"))
    assert answer["code"] == EXIT_STORAGE, answer


def test_keys_of_the_hub_elsewhere_and_other_addresses_are_refused(tmp_path: Path) -> None:
    for number, source in enumerate(
        (
            {"path": "a.jsonl", "revision": "main"},
            {"path": "a.jsonl", "subset": "de"},
            {"path": "s3://bucket/a.jsonl"},
            {"path": f"{PATH}@main"},
            {"path": f"{PATH}/de/train-0.jsonl"},
        )
    ):
        values = recipe(tmp_path).model_dump(mode="json")
        values["data"]["sources"] = [source]
        path = tmp_path / f"{number}.yaml"
        path.write_text(json.dumps(values))
        with pytest.raises(ConfigError, match="hf://datasets/ORG/NAME"):
            load_recipe(path)
    assert recipe(tmp_path).data.sources[0].path == PATH
