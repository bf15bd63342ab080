"""Run every cell of the table of docs/models.md and write it there: `python -m tests.publish_models [KIND ...]`.

With kinds only their rows are run again. A cell trains a tiny model of the type for five steps on one rank.
"""

from __future__ import annotations

import itertools
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from dist_cpt.adapters.language_model import auto_class
from dist_cpt.adapters.quantize import dequantise, load_quantised
from dist_cpt.config.load import build
from dist_cpt.data.batch import Batch
from dist_cpt.engines.single import SingleEngine
from dist_cpt.errors import DistCptError
from dist_cpt.export.merge import merge
from dist_cpt.model.load import TrainableModel, load_model
from dist_cpt.optim.groups import param_groups
from dist_cpt.plan.families import FAMILIES
from tests import tiny
from tests.contract.model import block
from tests.tiny_hybrids import KINDS as HYBRIDS
from tests.tiny_mixtures import KINDS as MIXTURES
from tests.tiny_multimodal import KINDS as MULTIMODAL
from tests.tiny_multimodal import write_multimodal
from tests.trained_checkpoint import CPU, IDS, plain_logits, trainer_logits, write_checkpoint

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- models: begin -->\n", "<!-- models: end -->\n"
CELLS = ("LoRA", "QLoRA", "full", "embeddings", "fused ops", "packing", "export")
STEPS = 5
MATRICES = ("embed_tokens", "lm_head")
SIZES: dict[str, Any] = tiny.llama() | {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "head_dim": 16,
    "sliding_window": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
}
# Types that are refused, and not in the table of shapes.
OTHERS: dict[str, dict[str, Any]] = {
    "gemma3n_text": {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": tiny.VOCAB_SIZE,
        "num_kv_shared_layers": 0,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": None,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "llama4_text": {"num_local_experts": 4, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 96},
}
NOT_FUSED = "no fused modules for its layers"


def model_types() -> tuple[str, ...]:
    """The rows of the table, in order."""
    return (*FAMILIES, *MULTIMODAL, *OTHERS)


class Failed(Exception):
    """A cell that does not do what it claims; the text says what."""


def row(kind: str, tokenizer: Path, folder: Path) -> dict[str, str]:
    """Each cell of a model type: "yes", or why not; files are written to `folder`."""
    base = _write_base(folder / "base", kind, tokenizer)
    run: dict[str, Callable[[], None]] = {
        "LoRA": lambda: _adapter(base, folder / "lora", {}),
        "QLoRA": lambda: _adapter(base, folder / "qlora", {"model": {"path": str(base), "weights": "nf4"}}),
        "full": lambda: _full(base, folder / "full"),
        "embeddings": lambda: _adapter(base, folder / "embeddings", {"embeddings": {"train": list(MATRICES)}}),
        "fused ops": lambda: _fused(base),
        "packing": lambda: _packing(base),
        "export": lambda: _export(base, folder / "lora", folder / "merged"),
    }
    cells = {}
    for name in CELLS:
        if name == "export" and cells["LoRA"] != "yes":  # there is nothing to merge
            cells[name] = cells["LoRA"]
            continue
        try:
            run[name]()
            cells[name] = "yes"
        except Failed as failure:
            cells[name] = str(failure)
        except DistCptError as refusal:
            text = re.sub(r"[^ ]*/base", "the model", str(refusal).partition(" -- ")[0])
            cells[name] = re.sub(rf"(model type )?\b{kind}\b", "this type", text)  # one note for all types
    return cells


def _write_base(folder: Path, kind: str, tokenizer: Path) -> Path:
    if kind in MULTIMODAL:
        return write_multimodal(folder, kind, tokenizer)
    config_class: Any = CONFIG_MAPPING[kind]
    known = {**config_class().to_dict(), **config_class().attribute_map}
    given = SIZES | (MIXTURES | HYBRIDS | OTHERS).get(kind, {})
    values = {key: value for key, value in given.items() if key in known}
    values = {key: value for key, value in values.items() if key not in ("model_type", "tie_word_embeddings")}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config_class(**values)).float().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)
    return folder


def _load(base: Path, **changes: Any) -> tuple[TrainableModel, Any]:
    values = {
        "name": "x",
        "model": {"path": str(base), "weights": "fp32"},
        "adapter": {"rank": 4, "alpha": 4},
        "data": {"seq_len": 20, "tokenizer": "t", "sources": [{"path": "x"}]},
        "batch": {"global_tokens": 20},
        "train": {"tokens": 20 * STEPS},
        "optim": {"lr": 1e-2, "weight_decay": 0.0},
        "engine": "single",
    }
    config = build(values | changes, where="the table")
    return load_model(config, device=CPU), config


def _train(model: TrainableModel, config: Any) -> None:
    """Five steps, in which everything that trains moves but experts without tokens."""
    before = {name: p.detach().clone() for name, p in model.trainable.items()}
    groups = param_groups(model.trainable, config.optim, config.adapter.kind == "lora")
    engine = SingleEngine(model.module, model.trainable, groups, config, CPU)
    for step in range(1, STEPS + 1):
        batches = [block(step, number) for number in range(2)]
        for number, batch in enumerate(batches):
            engine.accumulate(batch, sum(b.num_targets for b in batches), last=number == 1)
        if engine.step({group.name: group.peak_lr for group in groups}).read().skipped:
            raise Failed(f"step {step} was not finite")
    still = [
        name
        for name, parameter in model.trainable.items()
        if ".experts." not in name and torch.equal(parameter.detach().float(), before[name].to(parameter.dtype).float())
    ]
    if still:
        raise Failed(f"{still[0]} did not move")
    engine.close()


def _adapter(base: Path, folder: Path, changes: dict[str, Any]) -> None:
    """Train, save, and open in vanilla PEFT on the base, dequantised where it was trained in NF4."""
    from peft import PeftModel

    model, config = _load(base, **changes)
    _train(model, config)
    checkpoint = write_checkpoint(folder, model, base)
    quantised = config.model.weights == "nf4"
    if quantised:
        plain = dequantise(load_quantised(base, None, CPU, "nf4"))
    else:
        plain = auto_class(model.hf_config).from_pretrained(base, dtype=torch.float32)
    vanilla = PeftModel.from_pretrained(plain, str(checkpoint))
    _require_equal(model, vanilla, torch.bfloat16 if quantised else torch.float32)


def _full(base: Path, folder: Path) -> None:
    """Train every parameter, save, and open in transformers."""
    model, config = _load(base, adapter={"kind": "none"})
    _train(model, config)
    write_checkpoint(folder, model, base)
    _require_equal(model, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), torch.float32)


def _export(base: Path, checkpoint: Path, merged: Path) -> None:
    """Merge the checkpoint of the cell LoRA, and open the folder in the model's own class."""
    from peft import PeftModel

    merge(checkpoint, merged, "fp32")
    opened = [auto_class_of(folder).from_pretrained(folder, dtype=torch.float32) for folder in (base, merged)]
    adapted = plain_logits(PeftModel.from_pretrained(opened[0], str(checkpoint)), IDS)
    _require_close(plain_logits(opened[1], IDS), adapted, 1e-5 * max(1.0, float(adapted.abs().max())))


def auto_class_of(folder: Path) -> Any:
    """The transformers class that opens a folder."""
    from transformers import AutoConfig

    return auto_class(AutoConfig.from_pretrained(folder))


def _fused(base: Path) -> None:
    with mock.patch("dist_cpt.model.fuse.available", return_value=True):  # the modules, with torch in place of Triton
        model, _ = _load(base)
    if not model.fusion.swapped:
        raise Failed(NOT_FUSED)


def _packing(base: Path) -> None:
    """The loss of a block is that of its documents alone."""
    model, _ = _load(base)
    packed, together = block(1, 0), 0.0
    borders = packed.cu_seqlens.tolist()
    with torch.no_grad():
        model.module.eval()
        for start, stop in itertools.pairwise(borders):
            together += float(_loss(model, packed.input_ids[:, start:stop], packed.labels[:, start:stop]))
        whole = float(_loss_of(model, packed))
    _require_close(torch.tensor(whole), torch.tensor(together), 1e-5 * abs(together))


def _loss(model: TrainableModel, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    length = ids.shape[1]
    borders = torch.tensor([0, length], dtype=torch.int32)
    return model.module(ids, torch.arange(length)[None], borders, length, labels)[1]


def _loss_of(model: TrainableModel, batch: Batch) -> torch.Tensor:
    return model.module(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen, batch.labels)[1]


def _require_equal(model: TrainableModel, vanilla: Any, dtype: torch.dtype) -> None:
    """The trainer's logits are as near to vanilla's in fp64 as vanilla's own in `dtype` are, to a factor of two."""
    plain = getattr(vanilla, "get_base_model", lambda: vanilla)()
    plain.set_experts_implementation("eager")  # torch._grouped_mm takes no fp64
    truth = plain_logits(vanilla.double(), IDS)
    own = plain_logits(vanilla.to(dtype), IDS).double()
    allowed = 2 * float((own - truth).abs().max())
    _require_close(trainer_logits(model, IDS).double(), truth, max(allowed, 1e-5 * float(truth.abs().max())))


def _require_close(actual: torch.Tensor, expected: torch.Tensor, allowed: float) -> None:
    difference = float((actual.double() - expected.double()).abs().max())
    if not difference <= allowed:
        raise Failed(f"logits or losses differ by {difference:.1e}, allowed {allowed:.1e}")


def table(rows: dict[str, dict[str, str]]) -> str:
    """Markdown: one line for each model type, and below them why a cell says no."""
    notes = list(dict.fromkeys(cell for cells in rows.values() for cell in cells.values() if cell != "yes"))
    lines = [f"| model type | {' | '.join(CELLS)} |", "|---" * (len(CELLS) + 1) + "|"]
    for kind, cells in rows.items():
        shown = (cells[name] if cells[name] == "yes" else f"no ({notes.index(cells[name]) + 1})" for name in CELLS)
        lines.append(f"| `{kind}` | {' | '.join(shown)} |")
    lines += ["", *(f"{number}. {note}" for number, note in enumerate(notes, 1))]
    if not_run := [f"`{kind}`" for kind in model_types() if kind not in rows]:
        lines += ["", f"Not run yet: {', '.join(not_run)}."]
    return "\n".join(lines) + "\n"


def published() -> dict[str, dict[str, str]]:
    """The rows that docs/models.md has."""
    lines = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].splitlines()
    notes = {match[1]: match[2] for line in lines if (match := re.fullmatch(r"(\d+)\. (.*)", line))}
    rows = {}
    for line in lines:
        kind, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if kind.startswith("`"):
            texts = (notes[cell[4:-1]] if cell.startswith("no (") else cell for cell in cells)
            rows[kind.strip("`")] = dict(zip(CELLS, texts, strict=True))
    return rows


def write(rows: dict[str, dict[str, str]]) -> None:
    """Put the table between its two marks."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(before + BEGIN + table(rows) + END + after, encoding="utf-8")


def ran(kinds: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of `kinds`, run one after the other."""
    with tempfile.TemporaryDirectory() as root:
        tokenizer = tiny.write_tokenizer(Path(root, "tokenizer"), tiny.write_corpus(Path(root, "corpus")))
        for kind in kinds:
            with tempfile.TemporaryDirectory() as folder:
                yield kind, row(kind, tokenizer, Path(folder))


if __name__ == "__main__":
    rows = published()
    for kind, cells in ran(tuple(sys.argv[1:]) or model_types()):
        print(kind, cells, flush=True)
        rows[kind] = cells
        write({kind: rows[kind] for kind in model_types() if kind in rows})
