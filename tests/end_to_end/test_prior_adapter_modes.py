"""A new adapter on top of a prior one, folded into the base or stacked under it: a whole run, engine by engine."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dist_cpt.adapters.peft_folder import PRIOR_KEY
from dist_cpt.adapters.quantize import read_weight, write_weight
from dist_cpt.errors import ConfigError
from dist_cpt.export.checkpoint_model import load_fp32
from dist_cpt.export.merge import merge, quantisation_gap
from dist_cpt.model.continue_from import PriorInUse
from dist_cpt.model.load import load_model
from tests import tiny
from tests.run_ranks import run_ranks
from tests.whole_run import built, rows, train

CPU = torch.device("cpu")
BOTH = ["embed_tokens", "lm_head"]
MATRIX = pytest.mark.matrix


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_corpus(tmp_path_factory.mktemp("prior") / "corpus")


@pytest.fixture(scope="module")
def base(corpus: Path) -> Path:
    return tiny.write_base(corpus.parent / "base", tiny.write_tokenizer(corpus.parent / "tokenizer", corpus))


@pytest.fixture(scope="module")
def prior(base: Path) -> Path:
    """An adapter of PEFT's own, every value random: LoRA of another rank and scale, embedding and head in full."""
    from tests.peft_adapter import write_peft

    folder = base.parent / "prior"
    return write_peft(folder, str(base), r=6, lora_alpha=40, use_rslora=True, modules_to_save=BOTH)


def recipe(base: Path, corpus: Path, out: Path, prior: Path, mode: str, weights: str = "fp32", **changes: Any) -> Any:
    adapter = {"rank": 4, "alpha": 4, "continue_from": {"path": str(prior), "mode": mode}}
    model = {"path": str(base), "weights": weights}
    return tiny.recipe(base, corpus, out, model=model, adapter=adapter, train={"tokens": 6 * 512}) | changes


def vanilla(base: Path, prior: Path) -> Any:
    """The sum of base and prior adapter as PEFT and transformers compute it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(plain, str(prior)).eval()


def probe_logits(model: Any) -> torch.Tensor:
    ids = torch.randint(0, 512, (1, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float()


def check_run(folder: Path, base: Path, prior: Path, mode: str, weights: str) -> None:
    """What a finished run has recorded."""
    continued = json.loads((folder / "continued.json").read_text())
    assert continued["mode"] == mode
    assert continued["loss_with"] != continued["loss_without"]
    assert abs(continued["loss_of_the_engine"] - continued["loss_with"]) < 2e-2
    assert 0.8 < continued["share_in_effect"] < 1.2
    if mode == "fold":
        assert continued["logit_gap_mean"] < continued["logit_effect_mean"]
        assert (continued["logit_gap_max"] > 1e-3) == (weights != "fp32")
    contract = json.loads((folder / "contract.json").read_text())
    assert all(check["passed"] for check in contract["checks"])
    trained = {t["name"] for group in contract["groups"] for t in group["tensors"]}
    assert {f"base_model.model.{n}.weight" for n in ("model.embed_tokens", "lm_head")} <= trained
    assert not any(".prior." in name for name in trained)
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    manifest = json.loads((newest / "manifest.json").read_text())
    prior_record = manifest.get("content", manifest)["base"][PRIOR_KEY]
    assert prior_record["mode"] == mode
    assert len(prior_record["sha256"]) == len(prior_record["adapter_sha256"]) == 64
    adapter = json.loads((newest / "adapter_config.json").read_text())
    assert adapter[PRIOR_KEY]["adapter"] == str(prior)
    assert not Path(adapter["base_model_name_or_path"]).exists(), "a loader would take it for an adapter of the base"


def check_export(folder: Path, base: Path, prior: Path, out: Path) -> None:
    """Base + prior + new, and base + prior alone, against PEFT on PEFT's own merge of the prior one."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    newest = sorted((folder / "checkpoints").iterdir())[-1]
    under = vanilla(base, prior).merge_and_unload()
    without_new = probe_logits(under)
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['stands_on'\]"):
        whole = PeftModel.from_pretrained(under, str(newest)).eval()
    want = probe_logits(whole)
    assert float((want - without_new).abs().max()) > 1e-3
    for base_only, expected in ((False, want), (True, without_new)):
        target = out / f"merged-{base_only}"
        merge(newest, target, "fp32", base_only=base_only)
        got = probe_logits(AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval())
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    torch.testing.assert_close(probe_logits(load_fp32(newest, base)), want, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("mode", "weights"),
    [("fold", "nf4"), ("stack", "bf16"),
     *(pytest.param(m, w, marks=MATRIX) for m in ("fold", "stack") for w in ("fp32", "bf16", "nf4", "int8", "fp8")
       if (m, w) not in (("fold", "nf4"), ("stack", "bf16")))],
)  # fmt: skip
def test_a_run_on_top_of_a_prior_adapter(
    mode: str, weights: str, base: Path, corpus: Path, prior: Path, tmp_path: Path
) -> None:
    values = recipe(base, corpus, tmp_path / "runs", prior, mode, weights)
    assert train(values) == 0
    folder = tmp_path / "runs" / "tiny"
    check_run(folder, base, prior, mode, weights)
    losses = [row["loss"] for row in rows(folder / "metrics.jsonl")]
    assert losses[-1] < losses[0]
    shutil.rmtree(folder / "checkpoints" / "step-00000006")
    first = (folder / "continued.json").read_bytes()
    assert train(values) == 0
    assert json.loads((folder / "certificate.json").read_text())["verdict"] == "pass"
    assert [row["loss"] for row in rows(folder / "metrics.jsonl")] == losses, "a resume folds to other bits"
    assert (folder / "continued.json").read_bytes() == first
    check_export(folder, base, prior, tmp_path)
    gap = quantisation_gap(sorted((folder / "checkpoints").iterdir())[-1])
    assert (gap is not None) == (weights in ("nf4", "int8", "fp8"))
    assert gap is None or 0 < gap < 10


ENGINES = {"fsdp": "{kind: fsdp, shard: full}", "zero-3": "{kind: zero, stage: 3}"}


@MATRIX
@pytest.mark.parametrize("weights", ["bf16", "nf4", "int8"])
@pytest.mark.parametrize("mode", ["fold", "stack"])
@pytest.mark.parametrize("engine", ENGINES)
def test_on_two_ranks_and_resumed_by_another_engine(
    engine: str, mode: str, weights: str, base: Path, corpus: Path, prior: Path, tmp_path: Path
) -> None:
    values = recipe(base, corpus, tmp_path / "runs", prior, mode, weights)
    values |= {"batch": {"global_tokens": 512, "micro_batch": 1}}
    path, log = tiny.write_recipe(tmp_path / "recipe.yaml", values), tmp_path / "log"
    assert run_ranks(path, 2, f"engine={ENGINES[engine]}", log=log) == [0, 0], log.read_text()[-3000:]
    folder = tmp_path / "runs" / "tiny"
    check_run(folder, base, prior, mode, weights)
    losses = [row["loss"] for row in rows(folder / "metrics.jsonl")]
    shutil.rmtree(folder / "checkpoints" / "step-00000006")
    other = next(name for name in ENGINES if name != engine)
    assert run_ranks(path, 2, f"engine={ENGINES[other]}", log=log) == [0, 0], log.read_text()[-3000:]
    assert json.loads((folder / "certificate.json").read_text())["verdict"] == "pass"
    again = [row["loss"] for row in rows(folder / "metrics.jsonl")]
    assert again[:4] == losses[:4]
    assert again[4:] == pytest.approx(losses[4:], rel=2e-2)
    check_export(folder, base, prior, tmp_path)


# -- the model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["fold", "stack"])
def test_it_computes_what_peft_computes_and_its_matrices_train_from_their_fp32_values(
    mode: str, base: Path, corpus: Path, prior: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    model = load_model(built(recipe(base, corpus, tmp_path, prior, mode, "fp32")), device=CPU)
    want = probe_logits(vanilla(base, prior))
    ids = torch.randint(0, 512, (1, 32), generator=torch.Generator().manual_seed(0))
    borders = torch.tensor([0, 32], dtype=torch.int32)
    with torch.no_grad():
        got = model.module(ids, torch.arange(32)[None], borders, 32)
    torch.testing.assert_close(got, want[:, -1], rtol=0, atol=1e-5 * float(want.abs().max()))
    stored = load_file(prior / "adapter_model.safetensors")
    mixed = load_model(built(recipe(base, corpus, tmp_path, prior, mode, "bf16")), device=CPU)
    for name in ("base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"):
        assert torch.equal(mixed.trainable[name], stored[name]), "through bf16"
    frozen = {name for name, p in mixed.module.named_parameters() if not p.requires_grad}
    pairs = {name for name in frozen if ".prior." in name}
    assert len(pairs) == (2 * 2 * 7 if mode == "stack" else 0)
    assert not any(".prior." in name for name in mixed.trainable)


@pytest.mark.parametrize("mode", ["fold", "stack"])
def test_an_engine_that_lost_an_adapter_of_little_effect_is_found(
    mode: str, base: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the new text the adapter is worth less than the tolerance of the mean loss in bf16."""
    from tests.peft_adapter import edit_tensors, write_peft

    folder = write_peft(tmp_path / "old", str(base), r=6)
    edit_tensors(folder, lambda t: {k: v * (0.1 if "lora_B" in k else 1) for k, v in t.items()})
    values = recipe(base, corpus, tmp_path / "runs", folder, mode, "bf16", embeddings={}, train={"tokens": 512})
    assert train(values) == 0
    evidence = json.loads((tmp_path / "runs/tiny/continued.json").read_text())
    assert abs(evidence["loss_with"] - evidence["loss_without"]) < 2e-3 * evidence["loss_with"]
    assert 0.9 < evidence["share_in_effect"] < 1.1

    def lose(in_use: PriorInUse, causal_lm: Any, dtype: torch.dtype) -> None:
        if mode == "fold":
            for name in in_use.adapter.lora:
                layer = causal_lm.get_base_model().get_submodule(name).base_layer
                a, b, scale = in_use.adapter.pair(name)
                write_weight(layer, read_weight(layer) - scale * b @ a)

    monkeypatch.setattr(PriorInUse, "complete", lose)
    assert train(values | {"name": "lost"}) == 74
    reason = json.loads((tmp_path / "runs/lost/exit.json").read_text())["reason"]
    share = re.search(r"logits show (-?\d\.\d+)", reason)
    assert share is not None, reason
    assert str(folder) in reason
    assert not 0.5 < float(share[1]) < 1.5


def test_a_tied_base_and_frozen_matrices(base: Path, corpus: Path, tmp_path: Path) -> None:
    from tests.peft_adapter import edit_tensors, write_peft

    tied = tiny.write_base(tmp_path / "tied", base, tie_word_embeddings=True)
    with warned("tie_word_embeddings"):
        folder = write_peft(tmp_path / "old", str(tied), modules_to_save=BOTH, ensure_weight_tying=True)
    values = recipe(tied, corpus, tmp_path, folder, "fold", embeddings={"train": ["embed_tokens"]})
    model = load_model(built(values), device=CPU)
    assert len([name for name in model.trainable if "lora" not in name]) == 1
    edit_tensors(folder, lambda t: t | {"base_model.model.lm_head.weight": t["base_model.model.lm_head.weight"] + 1})
    with pytest.raises(ConfigError, match=r"adapter\.continue_from: .*embedding and head"):
        load_model(built(values), device=CPU)


def warned(text: str) -> Any:
    import warnings

    @contextlib.contextmanager
    def context() -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=f".*{text}", category=UserWarning)
            yield

    return context()


# -- refusals --------------------------------------------------------------------------------------------------------


def test_an_adapter_that_does_not_fit_is_refused(base: Path, corpus: Path, prior: Path, tmp_path: Path) -> None:
    from tests.peft_adapter import edit_config, edit_tensors

    def refused(expected: str, change: Any = None, source: Path = prior, **changes: Any) -> None:
        folder = Path(shutil.copytree(source, tmp_path / "copy", dirs_exist_ok=True))
        if change is not None:
            change(folder)
        with pytest.raises(ConfigError, match=expected) as caught:
            load_model(built(recipe(base, corpus, tmp_path, folder, "fold", **changes)), device=CPU)
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 64
        shutil.rmtree(folder)

    q_proj = "base_model.model.model.layers.0.self_attn.q_proj"
    refused(
        r"set embeddings.train: \[embed_tokens, lm_head\], or adapter.continue_from.freeze_embeddings",
        embeddings={"train": []},
    )
    refused(r" lm_head .* set embeddings.train: \[embed_tokens, lm_head\]", embeddings={"train": ["embed_tokens"]})
    refused("use_dora True", lambda f: edit_config(f, use_dora=True))
    refused("'IA3'", lambda f: edit_config(f, peft_type="IA3"))
    refused("init_lora_weights 'pissa'", lambda f: edit_config(f, init_lora_weights="pissa"))
    refused("set model.path", lambda f: edit_config(f, **{PRIOR_KEY: {"mode": "fold"}}))
    refused(
        " 500, here 512",
        lambda f: edit_tensors(f, lambda t: {k: v[:500] if k.endswith(("tokens.weight", "head.weight")) else v
                                             for k, v in t.items()}),
    )  # fmt: skip
    refused(
        r"model.layers.0.self_attn.q_proj of shape \[64, 32\] \(rank 6\), here \[64, 64\]",
        lambda f: edit_tensors(f, lambda t: t | {f"{q_proj}.lora_A.weight": t[f"{q_proj}.lora_A.weight"][:, :32]}),
    )
    refused(
        "model.layers.7.mlp.up_proj",
        lambda f: edit_tensors(f, lambda t: {k.replace("layers.1.mlp.up", "layers.7.mlp.up"): v for k, v in t.items()}),
    )
    refused(
        "pickled adapter_model.bin",
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
    )
    refused("no adapter_config.json", lambda f: (f / "adapter_config.json").unlink())
    frozen = recipe(base, corpus, tmp_path, prior, "fold", embeddings={"train": []})
    frozen["adapter"]["continue_from"]["freeze_embeddings"] = True
    assert not [n for n in load_model(built(frozen), device=CPU).trainable if "lora" not in n]


def test_a_checkpoints_adapter_is_refused_on_another_base(base: Path, corpus: Path, tmp_path: Path) -> None:
    """A checkpoint of this program over other weights is refused, in every mode, unless the recipe says otherwise."""
    assert train(tiny.recipe(base, corpus, tmp_path / "runs", train={"tokens": 512})) == 0
    checkpoint = tmp_path / "runs" / "tiny" / "checkpoints" / "step-00000001"
    other = tiny.write_base(tmp_path / "other", base, rms_norm_eps=1e-5)
    from safetensors.torch import load_file, save_file

    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    for mode in ("fold", "train"):
        values = recipe(other, corpus, tmp_path / mode, checkpoint, mode)
        assert train(values) == 64
        reason = json.loads((tmp_path / mode / "tiny" / "exit.json").read_text())["reason"]
        assert "sha256" in reason
        assert "adapter.continue_from.other_base: true" in reason
        values["adapter"]["continue_from"]["other_base"] = True
        assert train(values | {"name": "again"}) == 0


# -- the recipes -----------------------------------------------------------------------------------------------------

RECIPES = Path(__file__).parents[2] / "recipes"


def shrunk(path: Path, base: Path, prior: Path, corpus: Path, out: Path) -> dict[str, Any]:
    """A recipe with its adapter, weights, schedule and engine as they are, on a tiny base and little text."""
    values = yaml.safe_load(path.read_text())
    given = values["adapter"]["continue_from"]
    values["adapter"]["continue_from"] = {**(given if isinstance(given, dict) else {}), "path": str(prior)}
    values["model"]["path"] = str(base)
    sizes = tiny.recipe(base, corpus, out)
    return values | {key: sizes[key] for key in ("output_dir", "data", "track")} | {
        "batch": {"global_tokens": 512, "micro_batch": 1},
        "train": {"tokens": 6 * 512},
        "checkpoint": {"every_steps": 4},
        "evaluate": {},
    }  # fmt: skip


@MATRIX
@pytest.mark.parametrize(
    "name", ["continue_fsdp", "continue-optimizer_zero3", "stack_fsdp", "instruct-4bit_fold_zero3"]
)
def test_the_recipes_run_on_two_ranks_and_resume(
    name: str, base: Path, corpus: Path, prior: Path, tmp_path: Path
) -> None:
    (path,) = RECIPES.glob(f"*{name}_2xH100.yaml")
    if name.startswith("continue"):
        adapter = {"rank": 64, "alpha": 64}
        assert train(tiny.recipe(base, corpus, tmp_path / "before", adapter=adapter, train={"tokens": 4 * 512})) == 0
        prior = tmp_path / "before" / "tiny" / "checkpoints" / "step-00000004"
    if "4bit" in name:
        base = quantised(base, tmp_path / "tiny-it-4bit")
    values = shrunk(path, base, prior, corpus, tmp_path / "runs")
    recipe_path, log = tiny.write_recipe(tmp_path / "recipe.yaml", values), tmp_path / "log"
    assert run_ranks(recipe_path, 2, log=log) == [0, 0], log.read_text()[-3000:]
    folder = tmp_path / "runs" / values["name"]
    evidence = json.loads((folder / "continued.json").read_text())
    assert evidence["optimizer_steps"] == (4 if "optimizer" in name else 0)
    assert evidence["loss_with"] != evidence["loss_without"]
    assert f"without it {evidence['loss_without']:.4f}" in log.read_text()
    losses = [row["loss"] for row in rows(folder / "metrics.jsonl")]
    shutil.rmtree(folder / "checkpoints" / "step-00000006")
    assert run_ranks(recipe_path, 2, log=log) == [0, 0], log.read_text()[-3000:]
    assert [row["loss"] for row in rows(folder / "metrics.jsonl")] == losses
    newest = folder / "checkpoints" / "step-00000006"
    assert merge(newest, tmp_path / "merged", "fp32") < 1e-3
    if "4bit" in name:
        refused = values | {"name": "refused", "model": {**values["model"], "allow_instruct": False}}
        assert train(refused | {"engine": "single"}) == 64
        manifest = json.loads((newest / "manifest.json").read_text())
        quantisation = manifest.get("content", manifest)["base"]["weights_quantisation"]
        assert quantisation == {"blocksize": 64, "double_quant": True, "stored": True}


def quantised(base: Path, folder: Path) -> Path:
    """What looks like an instruct checkpoint in NF4: its name, a chat template, weights saved by bitsandbytes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, quantization_config=nf4, device_map={"": "cpu"}
    )
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder
