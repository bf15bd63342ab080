"""The text model inside a multimodal checkpoint trains; everything else of it is written as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from dist_cpt.errors import ConfigError
from dist_cpt.export.formats import export_vllm
from dist_cpt.export.merge import merge
from tests import tiny
from tests.tiny_multimodal import KINDS, write_multimodal
from tests.trained_checkpoint import IDS, plain_logits, trained, trainer_logits, write_checkpoint
from tests.whole_run import rows, train

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
DEFAULT = ("gemma3", "qwen2_5_vl")


@pytest.fixture(scope="module")
def text_files(tmp_path_factory) -> tuple[Path, Path]:
    """(corpus, tokenizer)."""
    folder = tmp_path_factory.mktemp("text")
    corpus = tiny.write_corpus(folder / "corpus")
    return corpus, tiny.write_tokenizer(folder / "tokenizer", corpus)


def require_untouched(base: Path, written: Path, beside: str) -> None:
    """Every tensor of the towers and projectors has the same bits, and some of the text model differ."""
    before, after = (load_file(folder / "model.safetensors") for folder in (base, written))
    assert set(before) == set(after)
    kept = [name for name in before if beside in name or "projector" in name]
    assert kept
    for name in kept:
        assert before[name].dtype == after[name].dtype, name
        assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)), name
    assert any(not torch.equal(before[n].float(), after[n].float()) for n in before if n not in kept)
    assert (written / "preprocessor_config.json").read_bytes() == (base / "preprocessor_config.json").read_bytes()


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in DEFAULT else pytest.mark.matrix) for kind in KINDS]
)
def test_the_text_model_trains_and_the_rest_is_written_as_it_was(kind, text_files, tmp_path):
    from peft import PeftModel

    _, tokenizer = text_files
    base = write_multimodal(tmp_path / "base", kind, tokenizer)
    model = trained({"path": str(base), "weights": "fp32"})
    assert all(KINDS[kind][2] not in name for name in (*model.trainable, *dict(model.module.named_parameters())))
    checkpoint = write_checkpoint(tmp_path / "step-1", model, tokenizer)
    expected = trainer_logits(model, IDS)

    whole = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    assert float((plain_logits(whole, IDS) - expected).abs().max()) > 1e-2
    vanilla = PeftModel.from_pretrained(whole, str(checkpoint))
    in_fp32, truth = plain_logits(vanilla, IDS), plain_logits(vanilla.double(), IDS)
    # Of vanilla's own error in fp32: Gemma 4 amplifies rounding ten times as much as the others do.
    allowed = 2 * float((in_fp32.double() - truth).abs().max())
    assert float((expected.double() - truth).abs().max()) <= allowed

    merge(checkpoint, tmp_path / "merged", "fp32")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert type(merged) is type(whole)
    assert float((plain_logits(merged, IDS).double() - truth).abs().max()) <= allowed
    require_untouched(base, tmp_path / "merged", KINDS[kind][2])
    if kind == DEFAULT[0]:
        export_vllm(checkpoint, tmp_path / "served", "bf16")
        require_untouched(base, tmp_path / "served" / "base", KINDS[kind][2])


def test_a_run_on_gemma_3_learns_and_resumes_from_its_checkpoints(text_files, tmp_path):
    corpus, tokenizer = text_files
    base = write_multimodal(tmp_path / "base", "gemma3", tokenizer)
    values = tiny.recipe(base, corpus, tmp_path / "runs")
    assert train(values) == 0
    losses = [row["loss"] for row in rows(tmp_path / "runs" / "tiny" / "metrics.jsonl")]
    assert losses[-1] < losses[0] - 0.1
    contract = json.loads((tmp_path / "runs" / "tiny" / "contract.json").read_text())
    assert all(check["passed"] for check in contract["checks"])
    (checkpoint,) = (tmp_path / "runs" / "tiny" / "checkpoints").glob("step-00000012")
    merge(checkpoint, tmp_path / "merged", "bf16")
    require_untouched(base, tmp_path / "merged", "vision_tower")


def test_full_parameters_are_refused_in_one_line(text_files, tmp_path):
    base = write_multimodal(tmp_path / "base", "gemma3", text_files[1])
    with pytest.raises(ConfigError, match=r"^adapter\.kind: none: gemma3 is multimodal[^\n]*$"):
        trained({"path": str(base)}, adapter={"kind": "none"}, embeddings={})
