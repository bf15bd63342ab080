"""Whole runs with new tokens: old rows keep every bit, and what was saved opens in vanilla PEFT and transformers."""

from __future__ import annotations

import itertools
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_numpy
from safetensors.numpy import save_file

from dist_cpt.data.focus import FILE
from dist_cpt.data.tokenizer import load_tokenizer, tokenizer_hash
from dist_cpt.data.tokenizer_extend import extend_tokenizer
from dist_cpt.data.tokenizer_train import corpus_texts
from dist_cpt.export.generate import generate
from dist_cpt.export.merge import merge, quantisation_gap
from dist_cpt.run_folder.checkpoints import read_manifest
from tests import tiny
from tests.command import command
from tests.run_ranks import run_ranks
from tests.whole_run import rows, train

ROWS = 640  # 512 + 100, as a multiple of 64
LAST = "checkpoints/step-00000012"


@pytest.fixture(scope="module")
def extended(made, tmp_path_factory) -> Path:
    """The base's tokenizer with 100 tokens more."""
    base, corpus = made
    out = tmp_path_factory.mktemp("tokenizer") / "extended"
    done = extend_tokenizer(str(base), out, lambda: corpus_texts([str(corpus)]), num_new=100)
    assert len(done.tokens) == 100
    return out


@pytest.fixture(scope="module")
def with_mixtures(extended, made, tmp_path_factory) -> Path:
    """The extended tokenizer with mixtures for all its tokens but the last, of two old rows each."""
    folder = tmp_path_factory.mktemp("mixtures") / "extended"
    shutil.copytree(extended, folder)
    count = 99
    arrays = {
        "rows": np.arange(tiny.VOCAB_SIZE, tiny.VOCAB_SIZE + count),
        "counts": np.full(count, 2),
        "ids": np.random.default_rng(0).integers(0, tiny.VOCAB_SIZE, 2 * count),
        "weights": np.tile(np.array([0.75, 0.25], dtype=np.float32), count),
    }
    old, new = (tokenizer_hash(load_tokenizer(str(path))) for path in (made[0], extended))
    save_file(arrays, folder / FILE, metadata={"focus": json.dumps({"old_sha256": old, "new_sha256": new})})
    return folder


@pytest.fixture(scope="module")
def bases(made, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tied")
    gpt2 = {
        "model_type": "gpt2",
        "vocab_size": tiny.VOCAB_SIZE,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
    }
    return {
        "untied": made[0],
        "tied": tiny.write_base(folder / "llama", made[0], tie_word_embeddings=True),
        "gpt2": _write_base(folder / "gpt2", made[0], gpt2),
        # ZeRO-3 keeps tensors of less than 100,000 elements whole; these matrices it cuts.
        "wide": tiny.write_base(folder / "wide", made[0], hidden_size=256),
    }


def _write_base(folder: Path, tokenizer: Path, values: dict[str, Any]) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**values)).float().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)
    return folder


def recipe(base: Path, corpus: Path, out: Path, extended: Path, *, weights: str = "bf16", **embeddings: Any):
    given = {"train": ["embed_tokens", "lm_head"], "new_tokens": str(extended), "rows": "new"} | embeddings
    return tiny.recipe(base, corpus, out, model={"path": str(base), "weights": weights}, embeddings=given)


def matrices(folder: Path) -> dict[str, torch.Tensor]:
    """The vocabulary matrices of a folder, by their last two name components."""
    from safetensors.torch import load_file

    found = {key: value for file in folder.glob("*model*.safetensors") for key, value in load_file(file).items()}
    ends = ("embed_tokens.weight", "lm_head.weight", "wte.weight")
    return {".".join(key.split(".")[-2:]): value for key, value in found.items() if key.endswith(ends)}


def require_old_rows_still(checkpoint: Path, base: Path, dtype: torch.dtype) -> None:
    """Every old row is the base's, bit for bit, and the new ones are not what they began as."""
    saved, old = matrices(checkpoint), matrices(base)
    assert saved
    for name, values in saved.items():
        before = old.get(name, next(iter(old.values())))  # of a tied base the embedding alone is there
        assert values.shape == (ROWS, before.shape[1])
        assert torch.equal(values[: len(before)], before.to(dtype).float()), name


def require_vanilla_opens(checkpoint: Path, base: Path, merged: Path) -> None:
    """transformers and PEFT alone, told the number of rows, give the logits of our merged folder."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert merge(checkpoint, merged, "fp32") < 1e-5
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert len(tokenizer) == tiny.VOCAB_SIZE + 100
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(merged).get_vocab()
    ids = torch.arange(0, len(tokenizer), 7)[None]
    plain = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    assert plain.config.vocab_size == ROWS
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True` and a tied layer")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model.resize_token_embeddings(ROWS, mean_resizing=False)
        adapted = peft.PeftModel.from_pretrained(model, str(checkpoint)).eval()
        expected, found = adapted(input_ids=ids).logits, plain(input_ids=ids).logits
    assert expected.shape[-1] == ROWS
    assert float((found - expected).abs().max()) < 1e-5 * max(1.0, float(expected.abs().max()))


def test_new_rows_train_alone_and_everything_opens(bases, made, extended, tmp_path, capfd):
    values = recipe(bases["untied"], made[1], tmp_path, extended)
    values["optim"] |= {"weight_decay": 0.3}
    assert train(values) == 0
    run = tmp_path / "tiny"
    require_old_rows_still(run / LAST, bases["untied"], torch.bfloat16)
    require_vanilla_opens(run / LAST, bases["untied"], tmp_path / "merged")
    manifest = read_manifest(run / LAST)
    assert manifest.base["new_tokens"]["first_row"] == tiny.VOCAB_SIZE
    assert manifest.base["new_tokens"]["count"] == 100
    assert generate(run / LAST, "the", max_new_tokens=4).startswith("the")

    # Another extended tokenizer: the rows would mean something else.
    other = tmp_path / "other"
    shutil.copytree(extended, other)
    content = json.loads((other / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    (a, first), (b, second) = sorted(vocab.items(), key=lambda item: item[1])[-2:]
    vocab[a], vocab[b] = second, first
    (other / "tokenizer.json").write_text(json.dumps(content))
    for mode in ("train", "fold"):
        again = recipe(bases["untied"], made[1], tmp_path / mode, other, rows="all")
        again["adapter"] |= {"continue_from": {"path": str(run / LAST), "mode": mode}}
        assert train(again) == 64
        assert "trained its rows under the new tokens" in capfd.readouterr().err
        again["embeddings"]["new_tokens"] = str(run / LAST)  # as the refusal says
        assert train(again | {"name": "again", "train": {"tokens": 512}}) == 0
    capfd.readouterr()
    original = (extended / "tokenizer.json").read_bytes()
    try:
        shutil.copyfile(other / "tokenizer.json", extended / "tokenizer.json")
        shutil.rmtree(run / LAST)
        assert train(values) == 74
        assert train(recipe(bases["untied"], made[1], tmp_path, other) | {"optim": values["optim"]}) == 74
    finally:
        (extended / "tokenizer.json").write_bytes(original)
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("dist-cpt: ")]
    assert len(errors) == 2
    assert all("base.new_tokens" in error for error in errors)


def test_an_untied_head_trains_apart_after_embeddings_alone(bases, made, extended, tmp_path):
    values = recipe(bases["tied"], made[1], tmp_path, extended, rows="all", tie="untie", freeze_rest_steps=5)
    assert train(values) == 0
    run = tmp_path / "tiny"
    saved = matrices(run / LAST)
    assert len(saved) == 2
    assert not torch.equal(*saved.values())
    require_vanilla_opens(run / LAST, bases["tied"], tmp_path / "merged")
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["tie_word_embeddings"] is False
    rates = [row["lr"] for row in rows(run / "metrics.jsonl")]
    assert [lr["adapter"] == 0.0 for lr in rates] == [True] * 5 + [False] * 7
    assert all(lr["embeddings"] > 0.0 for lr in rates)
    checks = json.loads((run / "contract.json").read_text())["checks"]
    assert all(check["passed"] for check in checks)
    assert [(check["step"], check["detail"]) for check in checks if "moment" in check["name"]] == [
        (2, "2 tensors"),
        (7, "30 tensors"),
    ]
    waited = [check for check in checks if "that waits is unchanged" in check["name"]]
    assert [(check["step"], check["detail"]) for check in waited] == [(2, "28 tensors")]


@pytest.mark.matrix
@pytest.mark.parametrize("mode", ["train", "fold", "stack"])
@pytest.mark.parametrize("base", ["untied", "tied"])
def test_a_second_run_goes_on_with_the_new_rows(bases, made, extended, tmp_path, base, mode):
    """New rows first, then all; or the new rows as they are, under a fresh adapter that does not train them."""
    first = recipe(bases[base], made[1], tmp_path / "first", extended)
    assert train(first) == 0
    prior = tmp_path / "first" / "tiny" / LAST
    second = recipe(bases[base], made[1], tmp_path / "second", extended, rows="all")
    second["adapter"] |= {"continue_from": {"path": str(prior), "mode": mode}}
    if mode != "train":
        second["embeddings"] |= {"train": []}
        second["adapter"]["continue_from"] |= {"freeze_embeddings": True}
    assert train(second) == 0
    checkpoint = tmp_path / "second" / "tiny" / LAST
    assert merge(checkpoint, tmp_path / "merged", "fp32") < 1e-5
    merged, before = matrices(tmp_path / "merged"), matrices(prior)
    assert merged
    for name, values in merged.items():
        assert values.shape == before[name].shape
        assert torch.equal(values, before[name]) == (mode != "train"), name
    losses = [row["loss"] for row in rows(tmp_path / "second/tiny/metrics.jsonl")]
    assert losses[0] < rows(tmp_path / "first/tiny/metrics.jsonl")[0]["loss"]


def test_bad_vocabularies_end_before_the_corpus_is_read(bases, made, extended, tmp_path):
    base, corpus = made
    naked = tmp_path / "naked"
    shutil.copytree(base, naked, ignore=shutil.ignore_patterns("tokenizer*"))
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    cases = [
        (naked, extended, "model.path"),
        (base, nothing, "dist-cpt tokenizer extend"),
        (base, base, "embeddings.new_tokens"),
        (base, extended, "dist-cpt tokenizer extend --focus"),
    ]
    for number, (model, new, named) in enumerate(cases):
        init = {"init": "focus"} if "focus" in named else {}
        values = recipe(model, corpus, tmp_path / str(number), new, **init)
        path = tiny.write_recipe(tmp_path / f"{number}.yaml", values)
        ended = command("train", path)
        assert ended.code == 65, ended.err
        assert len(ended.error_lines) == 1
        assert named in ended.error_lines[0]
        assert not (tmp_path / str(number) / "data").exists()


def require_rows_began_as_mixtures(checkpoint: Path, base: Path, tokenizer: Path, mean: Path) -> None:
    """After steps that hardly move them, the rows are still what they began as: in both matrices."""
    arrays = load_numpy(tokenizer / FILE)
    ids, weights = (torch.from_numpy(arrays[key]).view(-1, 2) for key in ("ids", "weights"))
    saved, old = matrices(checkpoint), matrices(base)
    assert len(saved) == len(old) == 2
    for name, values in saved.items():
        expected = (old[name][ids].float() * weights[..., None]).sum(1)
        assert float((values[tiny.VOCAB_SIZE :][:99] - expected).abs().max()) < 1e-5
        assert float((expected - matrices(mean)[name][tiny.VOCAB_SIZE :][:99]).abs().max()) > 1e-2
        assert torch.allclose(values[tiny.VOCAB_SIZE + 99], matrices(mean)[name][tiny.VOCAB_SIZE + 99], atol=1e-5)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("ranks", "engine"), [(1, "single"), (2, "{kind: fsdp, shard: full}"), (2, "{kind: zero, stage: 3}")]
)
def test_rows_begin_as_mixtures_under_every_engine(bases, made, with_mixtures, tmp_path, ranks, engine):
    base = bases["wide"]
    checkpoints = {}
    for init in ("focus", "mean_of_subtokens"):
        values = recipe(base, made[1], tmp_path / init, with_mixtures, weights="fp32", init=init, rows="all")
        values["optim"] |= {"embedding_lr": 1e-7}
        path = tiny.write_recipe(tmp_path / f"{init}.yaml", values)
        log = tmp_path / f"{init}.txt"
        assert run_ranks(path, ranks, f"engine={engine}", log=log) == [0] * ranks, log.read_text()
        checkpoints[init] = tmp_path / init / "tiny" / LAST
    require_rows_began_as_mixtures(checkpoints["focus"], base, with_mixtures, checkpoints["mean_of_subtokens"])
    new_tokens = read_manifest(checkpoints["focus"]).base["new_tokens"]
    assert new_tokens["init"] == "focus"
    assert new_tokens["mixtures"] == 99
    assert "mixtures" not in read_manifest(checkpoints["mean_of_subtokens"]).base["new_tokens"]


@pytest.mark.matrix
@pytest.mark.parametrize("base", ["untied", "tied", "gpt2", "wide"])
@pytest.mark.parametrize("weights", ["bf16", "nf4", "fp32"])
@pytest.mark.parametrize(
    ("ranks", "engine"), [(1, "single"), (2, "{kind: fsdp, shard: full}"), (2, "{kind: zero, stage: 3}")]
)
def test_old_rows_stand_still_under_every_engine(bases, made, extended, tmp_path, base, weights, ranks, engine):
    _run_and_check(bases[base], made[1], extended, tmp_path, weights, ranks, engine)


@pytest.mark.matrix
@pytest.mark.parametrize("shard", ["zero, stage: 1", "zero, stage: 2", "fsdp, shard: trainable"])
def test_the_other_ways_to_shard(bases, made, extended, tmp_path, shard):
    _run_and_check(bases["untied"], made[1], extended, tmp_path, "bf16", 2, f"{{kind: {shard}}}")


def _run_and_check(base, corpus, extended, tmp_path, weights, ranks, engine):
    values = recipe(base, corpus, tmp_path, extended, weights=weights)
    path = tiny.write_recipe(tmp_path / "recipe.yaml", values)
    log = tmp_path / "log.txt"
    assert run_ranks(path, ranks, f"engine={engine}", log=log) == [0] * ranks, log.read_text()
    checkpoint = tmp_path / "tiny" / LAST
    require_old_rows_still(checkpoint, base, torch.float32 if weights == "fp32" else torch.bfloat16)
    require_vanilla_opens(checkpoint, base, tmp_path / "merged")
    if weights == "nf4":
        gap = quantisation_gap(checkpoint)
        assert gap is not None
        assert gap < 0.5


@pytest.mark.matrix
@pytest.mark.parametrize(("ranks", "engine"), [(2, "{kind: fsdp, shard: full}"), (2, "{kind: zero, stage: 3}")])
def test_a_full_parameter_run_leaves_old_rows(bases, made, extended, tmp_path, ranks, engine):
    values = recipe(bases["tied"], made[1], tmp_path, extended, train=[], tie="untie", freeze_rest_steps=3)
    values["adapter"] = {"kind": "none"}
    path = tiny.write_recipe(tmp_path / "recipe.yaml", values)
    log = tmp_path / "log.txt"
    assert run_ranks(path, ranks, f"engine={engine}", log=log) == [0] * ranks, log.read_text()
    checkpoint = tmp_path / "tiny" / LAST
    require_old_rows_still(checkpoint, bases["tied"], torch.float32)
    assert merge(checkpoint, tmp_path / "merged", "fp32") < 1e-6
    assert len(matrices(tmp_path / "merged")) == 2


def _run_low_rank(base, corpus, tmp_path, ranks, engine, weights, rank=4):
    import peft
    from transformers import AutoModelForCausalLM

    values = tiny.recipe(base, corpus, tmp_path, model={"path": str(base), "weights": weights})
    values["embeddings"] = {"train": ["embed_tokens", "lm_head"], "kind": "lora"}
    values["adapter"] = {"rank": rank, "alpha": 4}
    path = tiny.write_recipe(tmp_path / "recipe.yaml", values)
    if ranks == 1:
        assert train(values) == 0
    else:
        assert run_ranks(path, ranks, f"engine={engine}", log=tmp_path / "log.txt") == [0] * ranks, (
            tmp_path / "log.txt"
        ).read_text()
    checkpoint = tmp_path / "tiny" / LAST
    assert not matrices(checkpoint)
    names = [tensor.name for tensor in read_manifest(checkpoint).tensors if tensor.group == "embeddings"]
    assert [name.split("model.", 2)[-1] for name in names] == [
        "model.embed_tokens.lora_embedding_A",
        "model.embed_tokens.lora_embedding_B",
        "lm_head.lora_A.weight",
        "lm_head.lora_B.weight",
    ]
    assert merge(checkpoint, tmp_path / "merged", "fp32") < 1e-5
    for name, values_ in matrices(tmp_path / "merged").items():
        assert not torch.equal(values_, matrices(base)[name])
    ids = torch.arange(0, 500, 7)[None]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        found = peft.PeftModel.from_pretrained(model, str(checkpoint)).eval()(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(input_ids=ids).logits
    assert float((found - merged).abs().max()) < 1e-5
    return checkpoint


def test_low_rank_embeddings_train_and_open(made, tmp_path):
    """Also: the trainer's own loss, recorded for the certificate, is that of the merged model."""
    from transformers import AutoModelForCausalLM

    from dist_cpt.config.load import load_recipe
    from dist_cpt.config.resolve import resolve_paths
    from dist_cpt.data.loader import BlockLoader
    from dist_cpt.data.prepared import open_prepared
    from dist_cpt.run_folder.checkpoints import read_state

    checkpoint = _run_low_rank(*made, tmp_path, 1, "single", "fp32")
    config = resolve_paths(load_recipe(tmp_path / "recipe.yaml"))
    probe = read_state(checkpoint).probe
    loader = BlockLoader(open_prepared(config), config.data.seq_len, config.seed, 1)
    batch = loader.batch(list(probe.block_ids))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    total, count = 0.0, 0
    for ids, labels, positions in zip(batch.input_ids, batch.labels, batch.position_ids, strict=True):
        starts = [*torch.nonzero(positions == 0).flatten().tolist(), len(ids)]
        for start, stop in itertools.pairwise(starts):
            with torch.no_grad():
                logits = merged(input_ids=ids[None, start:stop]).logits[0]
            total += float(torch.nn.functional.cross_entropy(logits, labels[start:stop], reduction="sum"))
            count += int((labels[start:stop] != -100).sum())
    assert probe.loss == pytest.approx(total / count, rel=1e-5)


@pytest.mark.matrix
@pytest.mark.parametrize("weights", ["bf16", "nf4"])
@pytest.mark.parametrize(("ranks", "engine"), [(2, "{kind: fsdp, shard: full}"), (2, "{kind: zero, stage: 3}")])
@pytest.mark.parametrize(("base", "rank"), [("untied", 4), ("wide", 200)])
def test_low_rank_embeddings_under_every_engine(bases, made, tmp_path, ranks, engine, weights, base, rank):
    _run_low_rank(bases[base], made[1], tmp_path, ranks, engine, weights, rank)
