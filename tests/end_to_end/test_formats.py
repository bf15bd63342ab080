"""A share of what was trained, other programs' layouts and the instruction residual, each against plain arithmetic."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dist_cpt.errors import EXIT_CONFIG, ConfigError
from dist_cpt.export.formats import CONVERTER, export_peft, export_vllm
from dist_cpt.export.merge import Blend, merge
from dist_cpt.export.task_vector import TaskVector, merge_with_task_vector
from tests.command import command
from tests.tiny import llama, write_base
from tests.trained_checkpoint import IDS, plain_logits, trained, trainer_logits, write_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def bases(tmp_path_factory, tokenizer) -> Path:
    root = tmp_path_factory.mktemp("bases")
    write_base(root / "untied", tokenizer)
    write_base(root / "tied", tokenizer, tie_word_embeddings=True)
    instruct = write_base(root / "instruct", tokenizer)
    _move(instruct, 7)
    (instruct / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return root


@pytest.fixture
def checkpoint(bases, tokenizer, tmp_path) -> Path:
    model = trained({"path": str(bases / "untied"), "weights": "fp32"})
    return write_checkpoint(tmp_path / "step-1", model, tokenizer)


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def under(base: Any, adapter: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(base, str(adapter))


def _move(folder: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(folder / "model.safetensors")
    moved = {k: v + 0.02 * torch.randn(v.shape, generator=generator) for k, v in tensors.items()}
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value.float() for file in folder.glob("model*.safetensors") for key, value in load_file(file).items()}


# -- a share of what was trained -----------------------------------------------------------------------------


def test_half_of_an_adapter_is_half_its_scale_and_half_the_way_of_each_matrix(bases, checkpoint, tmp_path):
    merge(checkpoint, tmp_path / "merged", "fp32", scale=0.5)
    model = under(load(bases / "untied"), checkpoint)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.scaling["default"] *= 0.5
    before, inner = load(bases / "untied"), model.get_base_model()
    with torch.no_grad():
        for name in ("get_input_embeddings", "get_output_embeddings"):
            module, old = getattr(inner, name)(), getattr(before, name)()
            module = getattr(module, "modules_to_save", {"default": module})["default"]
            module.weight.copy_((module.weight + old.weight) / 2)
    torch.testing.assert_close(
        plain_logits(load(tmp_path / "merged"), IDS), plain_logits(model, IDS), rtol=0, atol=1e-5
    )
    merge(checkpoint, tmp_path / "none", "fp32", scale=0.0)
    assert all(torch.equal(value, weights(bases / "untied")[key]) for key, value in weights(tmp_path / "none").items())


def test_a_share_of_a_full_run_lies_between_base_and_trained(bases, tokenizer, tmp_path):
    model = trained({"path": str(bases / "tied"), "weights": "fp32"}, adapter={"kind": "none"}, embeddings={})
    full = write_checkpoint(tmp_path / "step-1", model, tokenizer)
    merge(full, tmp_path / "merged", "fp32", scale=0.25)
    before, after, merged = weights(bases / "tied"), weights(full), weights(tmp_path / "merged")
    for key, value in merged.items():
        torch.testing.assert_close(value, before[key] + 0.25 * (after[key] - before[key]), rtol=0, atol=1e-6)
    scratch = trained({"config": llama()}, adapter={"kind": "none"}, embeddings={})
    with pytest.raises(ConfigError, match=r"step-2.* scale"):
        merge(write_checkpoint(tmp_path / "step-2", scratch, tokenizer), tmp_path / "no", "fp32", scale=0.5)


def test_fp16_is_stored_as_such_or_refused(checkpoint, tmp_path):
    assert 0 < merge(checkpoint, tmp_path / "merged", "fp16") < 0.01
    assert {t.dtype for t in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.float16}
    tensors = load_file(checkpoint / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.weight"][0, 0] = 1e5
    save_file(tensors, checkpoint / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"--dtype fp16: .*lm_head\.weight"):
        merge(checkpoint, tmp_path / "beyond", "fp16")


def test_a_peft_folder_merges_without_a_manifest(bases, checkpoint, tmp_path):
    (checkpoint / "manifest.json").unlink()
    assert merge(checkpoint, tmp_path / "merged", "fp32") < 1e-5
    moved = shutil.copytree(bases / "untied", tmp_path / "moved")
    config = json.loads((checkpoint / "adapter_config.json").read_text())
    (checkpoint / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    assert command("merge", checkpoint, "--out", tmp_path / "x").error_lines[0].startswith(f"dist-cpt: {checkpoint}")
    ended = command("merge", checkpoint, "--out", tmp_path / "again", "--base", moved, "--dtype", "fp32")
    assert ended.code == 0, ended.err
    assert weights(tmp_path / "again").keys() == weights(tmp_path / "merged").keys()
    assert all(torch.equal(v, weights(tmp_path / "merged")[k]) for k, v in weights(tmp_path / "again").items())


def test_a_classifiers_head_stays_and_its_adapter_leaves(bases, tokenizer, tmp_path):
    from transformers import AutoModelForSequenceClassification

    classes = {"task": "classify", "classify": {"labels": ["a", "b", "c"]}, "seed": 3, "embeddings": {}}
    checkpoint = write_checkpoint(
        tmp_path / "step-1", trained({"path": str(bases / "untied"), "weights": "fp32"}, **classes), tokenizer
    )
    merge(checkpoint, tmp_path / "half", "fp32", scale=0.5)
    head = load_file(checkpoint / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert torch.equal(weights(tmp_path / "half")["score.weight"], head)
    assert export_peft(checkpoint, tmp_path / "peft") < 1e-6
    merge(checkpoint, tmp_path / "merged", "fp32")
    vanilla = AutoModelForSequenceClassification.from_pretrained
    adapted = plain_logits(under(vanilla(bases / "untied", num_labels=3), tmp_path / "peft"), IDS)
    torch.testing.assert_close(adapted, plain_logits(vanilla(tmp_path / "merged"), IDS), rtol=0, atol=1e-5)


def test_a_share_is_set_wherever_the_model_went(bases):
    """`--sweep` moves the model to a GPU, which gives its parameters another storage."""
    model, ground = load(bases / "instruct"), load(bases / "untied")
    blend = Blend(model, ground)
    model.double()
    blend.set(0.0)
    for parameter, expected in zip(model.parameters(), ground.parameters(), strict=True):
        assert torch.equal(parameter, expected.double())


# -- layouts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["untied", "tied"])
def test_vllms_pieces_are_a_whole_base_and_plain_lora(bases, tokenizer, tmp_path, base):
    model = trained({"path": str(bases / base), "weights": "fp32"})
    checkpoint = write_checkpoint(tmp_path / "step-1", model, tokenizer)
    out = tmp_path / "served"
    assert export_vllm(checkpoint, out, "fp32") < 1e-5
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None
    assert Path(config["base_model_name_or_path"]) == out / "base"
    keys = load_file(out / "adapter" / "adapter_model.safetensors")
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in keys)
    assert "--max-lora-rank 8 --lora-modules served=adapter" in (out / "README.md").read_text()
    assert (out / "base" / "tokenizer.json").is_file()
    expected = trainer_logits(model, IDS)
    torch.testing.assert_close(
        plain_logits(under(load(out / "base"), out / "adapter"), IDS), expected, rtol=0, atol=1e-5
    )
    assert float((plain_logits(load(out / "base"), IDS) - expected).abs().max()) > 1e-2
    assert 0 < export_vllm(checkpoint, tmp_path / "small", "bf16") < 0.1


def test_an_adapter_that_vllm_cannot_read_is_refused(bases, tokenizer, tmp_path):
    where = {"path": str(bases / "untied"), "weights": "fp32"}
    dora = write_checkpoint(
        tmp_path / "dora", trained(where, adapter={"rank": 4, "dora": True}, embeddings={}), tokenizer
    )
    with pytest.raises(ConfigError, match="DoRA"):
        export_vllm(dora, tmp_path / "out")
    assert export_peft(dora, tmp_path / "peft") < 1e-5
    full = write_checkpoint(tmp_path / "full", trained(where, adapter={"kind": "none"}, embeddings={}), tokenizer)
    with pytest.raises(ConfigError, match=str(full)):
        export_vllm(full, tmp_path / "out")
    assert command("export", dora, "--format", "onnx", "--out", tmp_path / "out").code == EXIT_CONFIG


def test_gguf_is_written_by_llama_cpp_or_refused(checkpoint, tmp_path):
    """The converter here is a stand-in that shows how it is called."""
    out = tmp_path / "model.gguf"
    ask = ("export", checkpoint, "--format", "gguf", "--out", out)
    for missing in ((), ("--llama-cpp", tmp_path)):
        ended = command(*ask, *missing)
        assert ended.code == EXIT_CONFIG
        assert "--llama-cpp" in ended.error_lines[0]
    (checkpoint / "manifest.json").unlink()  # a PEFT folder: its file list is not checked
    clone = tmp_path / "llama.cpp"
    (clone / "gguf-py").mkdir(parents=True)
    script = "import json, sys, pathlib\nfolder, _, out, _, kind = sys.argv[1:]\n"
    script += "keys = json.load(open(folder + '/config.json'))['model_type']\n"
    script += "pathlib.Path(out).write_text(f'{keys} {kind}')\nprint('written')\n"
    (clone / CONVERTER).write_text(script)
    ended = command(*ask, "--llama-cpp", clone, "--dtype", "fp16")
    assert (ended.code, ended.out.strip(), out.read_text()) == (0, str(out), "llama f16"), ended.err
    assert str(out) in command(*ask, "--llama-cpp", clone).error_lines[0]
    out.unlink()
    (clone / CONVERTER).write_text("import sys\nsys.exit('Model LlamaForCausalLM is not supported')\n")
    ended = command(*ask, "--llama-cpp", clone)
    assert ended.code == EXIT_CONFIG
    assert "1: Model LlamaForCausalLM is not supported" in ended.error_lines[0]
    assert not out.exists()


# -- task vectors --------------------------------------------------------------------------------


def test_a_task_vector_is_added_tensor_by_tensor(bases, checkpoint, tmp_path):
    vector = TaskVector(str(bases / "instruct"), str(bases / "untied"), 0.5)
    assert merge_with_task_vector(checkpoint, tmp_path / "sum", vector, "fp32")
    merge(checkpoint, tmp_path / "merged", "fp32")
    ours, theirs, origin = (weights(folder) for folder in (tmp_path / "merged", bases / "instruct", bases / "untied"))
    for key, value in weights(tmp_path / "sum").items():
        torch.testing.assert_close(value, ours[key] + 0.5 * (theirs[key] - origin[key]), rtol=0, atol=1e-6)
    assert load(tmp_path / "sum").config.vocab_size == 512
    assert (tmp_path / "sum" / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    (checkpoint / "manifest.json").unlink()  # a PEFT folder: its file list is not checked
    pair = ("--add-residual", bases / "instruct", bases / "untied", "--residual-scale", 0.5, "--dtype", "fp32")
    ended = command("merge", checkpoint, "--out", tmp_path / "again", *pair)
    assert ended.code == 0, ended.err
    assert f"note: {bases / 'untied'}" in ended.out  # a PEFT folder does not record which it was
    assert all(torch.equal(v, weights(tmp_path / "sum")[k]) for k, v in weights(tmp_path / "again").items())


def test_an_untrained_base_plus_the_vector_is_the_instruct_model(bases, checkpoint, tmp_path):
    vector = TaskVector(str(bases / "instruct"), str(bases / "untied"))
    merge_with_task_vector(checkpoint, tmp_path / "sum", vector, "fp32", scale=0.0)
    torch.testing.assert_close(
        plain_logits(load(tmp_path / "sum"), IDS), plain_logits(load(bases / "instruct"), IDS), rtol=0, atol=1e-5
    )


def test_a_task_vector_of_another_model_is_refused(bases, tokenizer, checkpoint, tmp_path):
    def refused(instruct: Path, base: Path) -> str:
        with pytest.raises(ConfigError) as caught:
            merge_with_task_vector(checkpoint, tmp_path / "sum", TaskVector(str(instruct), str(base)), "bf16")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "sum").exists()
        return str(caught.value)

    untied = bases / "untied"
    larger = write_base(tmp_path / "larger", tokenizer, vocab_size=576)
    assert "lm_head.weight is [512, 64]" in refused(larger, untied)
    wide = write_base(tmp_path / "wide", tokenizer, intermediate_size=64)
    assert "mlp" in refused(wide, untied)
    assert "qwen2" in refused(write_base(tmp_path / "qwen2", tokenizer, model_type="qwen2"), untied)
    assert "lm_head.weight" in refused(bases / "tied", untied)
    assert str(tmp_path / "nowhere") in refused(tmp_path / "nowhere", untied)
    other = shutil.copytree(bases / "instruct", tmp_path / "other")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"<pad>"', '"<fill>"'))
    (other / "tokenizer_config.json").write_text(
        (other / "tokenizer_config.json").read_text().replace("<pad>", "<fill>")
    )
    assert "'<pad>'" in refused(other, untied)
    (other / "tokenizer.json").unlink()
    (other / "tokenizer_config.json").unlink()
    (other / "chat_template.jinja").unlink()
    assert f"{other} has no tokenizer" in refused(other, untied)


def test_options_that_would_do_nothing_are_refused(checkpoint, tmp_path):
    for options, named in (
        ((), "--out"),
        (("--out", tmp_path / "x", "--residual-scale", "0.5"), "--residual-scale"),
        (("--out", tmp_path / "x", "--sweep", "a,b"), "--sweep a,b"),
        (("--sweep", "-1"), "--sweep -1"),
    ):
        ended = command("merge", checkpoint, *options)
        assert ended.code == EXIT_CONFIG
        assert named in ended.error_lines[0]
    ended = command("export", checkpoint, "--format", "peft", "--out", tmp_path / "x", "--dtype", "bf16")
    assert "--dtype" in ended.error_lines[0]
