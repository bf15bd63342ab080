"""NF4 and int8 layers have the codes and scales of bitsandbytes, multiply by them, and never change."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from dist_cpt.adapters.int8_linear import int8_linear
from dist_cpt.adapters.nf4_linear import BLOCKSIZE, nf4_linear
from dist_cpt.adapters.quantize import load_quantised, quantisation_state, read_weight, write_weight
from dist_cpt.errors import ConfigError, MissingExtraError
from dist_cpt.export.checkpoint_model import load_fp32, plain_model
from dist_cpt.export.merge import quantisation_gap
from dist_cpt.model.load import load_model
from tests.frozen import FrozenCopy
from tests.quantised_base import recipe, save, source, write_adapter
from tests.tiny import llama

CPU = torch.device("cpu")
SIZES = {"hidden_size": 96, "intermediate_size": 144}  # rows of 16 n elements, not 64 n: blocks go across rows
LINEAR = 2 * 7


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in fp32."""
    return save(tmp_path_factory.mktemp("nf4") / "base", **llama(**SIZES))


def unpack(codes: torch.Tensor, state: Any) -> torch.Tensor:
    """The weight in fp32 by the definition of the format: two codes a byte, the high half first; a table of 16
    values; one scale per block, itself looked up in a table and scaled per 256, around a common offset."""
    indices = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], 1).flatten()[: state.shape.numel()].long()
    scale_blocks = torch.arange(state.absmax.numel()) // 256
    scales = state.state2.code[state.absmax.long()] * state.state2.absmax[scale_blocks] + state.offset
    return (state.code[indices] * scales[torch.arange(indices.numel()) // BLOCKSIZE]).view(state.shape)


def test_codes_and_scales_are_those_of_bitsandbytes(base: Path) -> None:
    from bitsandbytes.functional import quantize_4bit

    model = load_quantised(base, None, CPU, "nf4")
    weights = source(base)
    layers = {name: m for name, m in model.named_modules() if getattr(m, "quant_state", None) is not None}
    assert len(layers) == LINEAR
    for name, layer in layers.items():
        weight = weights[f"{name}.weight"].bfloat16()
        codes, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        got = dict(quantisation_state(nn.ModuleDict({"x": layer})))
        assert torch.equal(layer.weight.data, codes), name
        assert codes.dtype == torch.uint8
        assert torch.equal(got["x.weight.absmax"], state.absmax)
        assert state.absmax.dtype == torch.uint8
        assert state.absmax.numel() == -(-weight.numel() // 64)
        assert torch.equal(got["x.weight.nested_absmax"], state.state2.absmax)
        assert torch.equal(got["x.weight.offset"], state.offset.view(1))
        assert torch.equal(got["x.weight.quant_map"], state.code)
        assert torch.equal(got["x.weight.nested_quant_map"], state.state2.code)
    rest = {name: p for name, p in model.named_parameters() if name.removesuffix(".weight") not in layers}
    assert {p.dtype for p in rest.values()} == {torch.bfloat16}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= rest.keys()


@pytest.mark.parametrize(("rows", "columns"), [(96, 64), (48, 96), (10, 30), (30, 45), (13, 7)])
def test_a_layer_multiplies_by_what_its_codes_say(rows: int, columns: int, tmp_path: Path) -> None:
    """Among the shapes are those whose rows are no multiple of the block, and an odd number of elements."""
    from bitsandbytes.functional import quantize_4bit

    torch.manual_seed(0)
    layer: Any = nn.Linear(columns, rows).bfloat16().requires_grad_(False)
    codes, layer.quant_state = quantize_4bit(
        layer.weight.data, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    original = layer.weight.float()
    layer.weight = nn.Parameter(codes, requires_grad=False)
    want = unpack(codes, layer.quant_state)
    # A code's interval is at most 0.15 of its block's largest element wide on either side, 1/14 on average.
    assert float((want - original).norm() / original.norm()) < 0.15
    x = torch.randn(5, columns).bfloat16().requires_grad_()
    y = nf4_linear(layer, x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, F.linear(x, want.bfloat16(), layer.bias))
    grad = torch.randn_like(y)
    y.backward(grad)
    assert x.grad is not None
    assert torch.equal(x.grad, grad @ want.bfloat16())


def test_training_and_evaluating_leave_every_bit(base: Path) -> None:
    model = load_model(recipe(base), device=CPU)
    frozen = FrozenCopy(model.module)
    codes = dict(model.module.named_parameters())
    stored = {name: p.clone() for name, p in codes.items() if p.dtype == torch.uint8}
    ids = torch.arange(64)[None]
    arguments = (ids, ids, torch.tensor([0, 64], dtype=torch.int32), 64, ids)
    loss, _ = model.module(*arguments)
    loss.backward()
    model.module.eval()
    with torch.no_grad():
        model.module(*arguments)
    assert not frozen.changed()
    assert len(stored) == LINEAR
    assert all(torch.equal(codes[name], values) for name, values in stored.items())
    name, absmax = next(quantisation_state(model.module))
    absmax[0] += 1
    assert frozen.changed() == [name]


def test_adapters_and_vocabulary_train_in_fp32_over_it(base: Path) -> None:
    quantised, plain = (load_model(recipe(base, weights), device=CPU) for weights in ("nf4", "bf16"))
    assert list(quantised.trainable) == list(plain.trainable)
    assert quantised.adapter_config == plain.adapter_config
    for name, parameter in quantised.trainable.items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, plain.trainable[name]), "it does not start from the same values"
    kinds = {type(m).__module__ for m in quantised.module.modules() if type(m).__name__ == "Linear4bit"}
    assert kinds == {"peft.tuners.lora.bnb", "bitsandbytes.nn.modules"}


def test_it_is_close_to_the_base(base: Path) -> None:
    quantised, plain = (load_model(recipe(base, weights), device=CPU) for weights in ("nf4", "fp32"))
    ids = torch.arange(64)[None]
    arguments = (ids, ids, torch.tensor([0, 64], dtype=torch.int32), 64, ids)
    quantised.module.bfloat16()  # as an engine does to what computes
    with torch.no_grad():
        got, want = (float(model.module(*arguments)[1]) / 64 for model in (quantised, plain))
    assert abs(got - want) < 0.02 * want
    assert got != want


def test_the_identity_names_the_quantisation_and_nothing_new_otherwise(base: Path) -> None:
    quantised, plain = (load_model(recipe(base, weights), device=CPU).identity for weights in ("nf4", "bf16"))
    added = {"weights": "nf4", "weights_quantisation": {"blocksize": 64, "double_quant": True}}
    assert quantised == plain | added
    assert not plain.keys() & added.keys()
    json.dumps(quantised)


def test_gpt2_stores_its_weights_the_other_way_round(tmp_path: Path) -> None:
    """Its layers are quantised turned around; the adapter still says how they lie on the disk."""
    values = {"vocab_size": 131, "n_embd": 48, "n_layer": 1, "n_head": 3, "n_positions": 64}
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    folder = save(tmp_path / "gpt2", model_type="gpt2", **values, **tokens)
    quantised, plain = (load_model(recipe(folder, weights), device=CPU) for weights in ("nf4", "bf16"))
    assert quantised.adapter_config == plain.adapter_config
    assert plain.adapter_config is not None
    assert plain.adapter_config["fan_in_fan_out"] is True
    layer = quantised.module.get_submodule("causal_lm.base_model.model.transformer.h.0.mlp.c_fc.base_layer")
    weight = source(folder)["transformer.h.0.mlp.c_fc.weight"].T
    assert layer.quant_state.shape == weight.shape
    assert float((unpack(layer.weight.data, layer.quant_state) - weight).norm() / weight.norm()) < 0.15


def test_a_merge_says_how_far_it_is_from_the_trainer(base: Path, tmp_path: Path) -> None:
    """The gap is that of the two bases under one adapter, here computed from the definition of the format."""
    model = load_model(recipe(base), device=CPU)
    folder = write_adapter(tmp_path / "checkpoint", model)
    gap = quantisation_gap(folder)
    states = {name.removesuffix(".base_layer"): m.quant_state for name, m in model.module.named_modules()
              if "base_layer" in name}  # fmt: skip
    trainers = load_fp32(folder, base)
    probe = torch.randint(0, 512, (1, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = trainers(probe).logits
        for name, m in trainers.named_modules():
            if name.endswith("base_layer"):
                codes = model.module.get_submodule(f"causal_lm.{name}").weight.data
                m.weight.copy_(unpack(codes, states[f"causal_lm.{name.removesuffix('.base_layer')}"]).bfloat16())
        expected = float((trainers(probe).logits - want).abs().max())
    assert gap is not None
    assert gap == pytest.approx(expected, rel=1e-3)
    assert gap > 1e-3
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["base"]["weights"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert quantisation_gap(folder) is None


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        ({"model": {"path": "x", "weights": "fp4"}}, "'fp32', 'bf16', 'fp8', 'nf4' or 'int8'"),
        ({"adapter": {"kind": "none"}, "embeddings": {}}, r"model\.weights: nf4, adapter\.kind: none"),
        (
            {"model": {"path": "x", "weights": "int8"}, "adapter": {"kind": "none"}, "embeddings": {}},
            r"model\.weights: int8, adapter\.kind: none",
        ),
        (
            {"model": {"config": {"model_type": "llama"}, "weights": "nf4"}, "adapter": {"kind": "none"}},
            r"model\.weights: nf4, model\.config: ",
        ),
    ],
)
def test_recipes_that_make_no_sense_are_refused(sections: dict[str, Any], why: str) -> None:
    if "config" in sections.get("model", {}):
        sections = sections | {"data": {"seq_len": 64, "sources": [{"path": "x"}], "tokenizer": "x"}}
    with pytest.raises(ValidationError, match=why):
        recipe(Path("x"), **sections)


def test_bitsandbytes_is_an_extra(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtraError, match=r"^model\.weights: nf4 needs the extra 'qlora'.* pip install"):
        load_model(recipe(base), device=CPU)


# -- int8 ------------------------------------------------------------------------------------------------------------


def test_int8_codes_and_scales_are_those_of_bitsandbytes(base: Path) -> None:
    from bitsandbytes.functional import int8_vectorwise_quant

    model = load_model(recipe(base, "int8"), device=CPU)
    weights, found = source(base), dict(quantisation_state(model.module))
    assert len(found) == LINEAR
    for name, absmax in found.items():
        layer: Any = model.module.get_submodule(name.removesuffix(".weight.row_absmax"))
        original = weights[name.split("base_model.model.")[1].replace(".base_layer", "").removesuffix(".row_absmax")]
        codes, scales, _ = int8_vectorwise_quant(original.bfloat16().half())
        assert torch.equal(layer.weight.data, codes)
        assert torch.equal(absmax, scales)
        # Half a step of the row's scale, and bf16's rounding of the weight before it.
        off = (read_weight(layer) - original).abs()
        assert bool((off <= absmax[:, None] * (0.5 / 127 + 2**-8)).all())
        assert float(off.max()) > 0
    ids = torch.arange(64)[None]
    arguments = (ids, ids, torch.tensor([0, 64], dtype=torch.int32), 64, ids)
    frozen = FrozenCopy(model.module)
    loss, _ = model.module(*arguments)
    loss.backward()
    assert not frozen.changed()
    assert all(p.grad is not None for name, p in model.trainable.items() if "lora_A" not in name)
    name, absmax = next(iter(found.items()))
    absmax[0] += 1
    assert frozen.changed() == [name]


@pytest.mark.parametrize("adversarial", [False, True])
def test_an_int8_product_errs_no_more_than_a_16_bit_one(adversarial: bool) -> None:
    """Against fp32 on what the codes say: output and gradient, at most twice the error of torch's bf16 product."""
    torch.manual_seed(0)
    layer: Any = nn.Linear(200, 96).requires_grad_(False)
    layer.bias.data = layer.bias.data.bfloat16()
    if adversarial:  # rows of very different size, one of them zero, and one that a single element fills
        layer.weight.data *= torch.logspace(-6, 3, 96)[:, None]
        layer.weight.data[0] = 0
        layer.weight.data[1, 1:] *= 1e-4
    original = layer.weight.data.clone()
    layer.row_absmax = torch.zeros(96)
    layer.weight = nn.Parameter(torch.zeros(96, 200, dtype=torch.int8), requires_grad=False)
    write_weight(layer, original)
    weight = read_weight(layer)
    assert bool(((weight - original).abs() <= original.abs().amax(1, keepdim=True) * 0.501 / 127).all())
    x, grad = torch.randn(64, 200).bfloat16(), torch.randn(64, 96).bfloat16()
    exact = x.float() @ weight.T + layer.bias.float(), grad.float() @ weight
    plain = F.linear(x, weight.bfloat16(), layer.bias), grad @ weight.bfloat16()
    leaf = x.clone().requires_grad_()
    got = int8_linear(layer, leaf)
    got.backward(grad)
    assert leaf.grad is not None
    for ours, theirs, want in zip((got.detach(), leaf.grad), plain, exact, strict=True):
        scale = want.abs().amax(0 if ours.shape[1] == 96 else 1, keepdim=True).clamp_min(1e-30)  # W's rows differ
        assert float(((ours - want) / scale).abs().max()) <= 2 * float(((theirs - want) / scale).abs().max())


# -- folders that are quantised already ------------------------------------------------------------------------------


def quantised_folder(base: Path, folder: Path, **how: Any) -> Path:
    """What transformers and bitsandbytes save by themselves."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(**how), device_map={"": "cpu"}
    )
    model.save_pretrained(folder)
    return folder


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}


@pytest.mark.parametrize(
    ("weights", "how"),
    [
        pytest.param("nf4", NF4 | {"bnb_4bit_use_double_quant": True}, id="double"),
        pytest.param("nf4", NF4, id="single"),
        pytest.param("int8", {"load_in_8bit": True}, id="int8"),
    ],
)
def test_a_quantised_folder_is_taken_as_it_is(base: Path, tmp_path: Path, weights: str, how: dict[str, Any]) -> None:
    folder = quantised_folder(base, tmp_path / "quantised", **how)
    stored = source(folder)
    model = load_model(recipe(folder, weights), device=CPU)
    bare = {name.replace(".base_layer", ""): m for name, m in model.module.named_modules()}
    names = {"absmax": "absmax", "quant_map": "quant_map", "nested_absmax": "nested_absmax",
             "nested_quant_map": "nested_quant_map", "row_absmax": "SCB"}  # fmt: skip
    compared = 0
    for name, values in quantisation_state(model.module):
        module, _, what = name.partition(".weight.")
        key = module.split("base_model.model.")[1].replace(".base_layer", "")
        if what == "offset":
            continue
        want = stored[f"{key}.SCB" if what == "row_absmax" else f"{key}.weight.{names[what]}"]
        assert torch.equal(values, want), name
        assert values.dtype == want.dtype
        compared += 1
    assert (
        compared
        == LINEAR
        * {"double": 4, "single": 2, "int8": 1}[
            "int8" if weights == "int8" else "double" if "bnb_4bit_use_double_quant" in how else "single"
        ]
    )
    for key, want in stored.items():
        if want.dtype in (torch.uint8, torch.int8) and key.endswith("_proj.weight"):
            assert torch.equal(bare[f"causal_lm.base_model.model.{key}".removesuffix(".weight")].weight.data, want)
    ids = torch.arange(64)[None]
    arguments = (ids, ids, torch.tensor([0, 64], dtype=torch.int32), 64, ids)
    fresh = load_model(recipe(base, weights), device=CPU)
    losses = []
    for one in (model, fresh):
        one.module.bfloat16()
        with torch.no_grad():
            losses.append(float(one.module(*arguments)[1]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3 if how == NF4 else 0)
    assert model.identity["weights_quantisation"]["stored"] is True
    assert "stored" not in fresh.identity["weights_quantisation"]
    unpacked = load_plain(folder)
    layer = unpacked.model.layers[0].self_attn.q_proj
    assert type(layer) is nn.Linear
    assert torch.equal(layer.weight, read_weight(bare["causal_lm.base_model.model.model.layers.0.self_attn.q_proj"]))
    unpacked.save_pretrained(tmp_path / "unpacked")
    again = load_plain(tmp_path / "unpacked").state_dict()
    assert all(torch.equal(again[name], values) for name, values in unpacked.state_dict().items())


def load_plain(folder: Path) -> Any:
    return plain_model(folder)


@pytest.mark.parametrize(
    ("how", "weights", "expected"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "nf4", "bitsandbytes fp4"),
        (NF4 | {"bnb_4bit_quant_storage": torch.bfloat16}, "nf4", "bitsandbytes nf4 stored as bfloat16"),
        (NF4, "int8", r"int8 -- set model\.weights: nf4"),
        (NF4, "bf16", r"bf16 -- set model\.weights: nf4"),
    ],
)
def test_other_quantised_folders_are_refused(
    base: Path, tmp_path: Path, how: dict[str, Any], weights: str, expected: str
) -> None:
    from transformers import BitsAndBytesConfig

    folder = shutil.copytree(base, tmp_path / "other")
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] = BitsAndBytesConfig(**how).to_dict()
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=expected):
        load_model(recipe(folder, weights), device=CPU)
    values["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="gptq"):
        load_model(recipe(folder, weights), device=CPU)


def test_what_is_written_is_read_back(base: Path) -> None:
    """Folding reads a weight, adds to it and stores it again: each storage, and GPT-2's order, by its own rounding."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    change = torch.randn(96, 96) * 0.1
    for weights in ("nf4", "int8"):
        layer = load_quantised(base, None, CPU, weights).model.layers[0].self_attn.q_proj
        want = read_weight(layer) + change
        write_weight(layer, want)
        off = float((read_weight(layer) - want).norm() / want.norm())
        assert 0 < off < (0.15 if weights == "nf4" else 0.01)
    for plain in (nn.Linear(96, 48, dtype=torch.float32), Conv1D(48, 96)):
        want = read_weight(plain) + change[:48]
        write_weight(plain, want)
        assert torch.equal(read_weight(plain), want)
        x = torch.randn(3, 96)
        torch.testing.assert_close(plain(x), F.linear(x, want, plain.bias))


LOADING = """
import sys, threading, torch
from pathlib import Path
from dist_cpt.adapters.quantize import load_quantised
import transformers, bitsandbytes, peft
transformers.utils.logging.disable_progress_bar()
page, peak, done = 4096, 0, False

def anonymous():
    size, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    return (int(resident) - int(shared)) * page

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())

load_quantised(Path(sys.argv[2]), None, torch.device("cpu"), sys.argv[3])  # all that is imported lazily
before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
model = load_quantised(Path(sys.argv[1]), None, torch.device("cpu"), sys.argv[3])
done = True
thread.join()
print(peak - before, anonymous() - before)
"""


@pytest.mark.matrix
@pytest.mark.parametrize("weights", ["nf4", "int8"])
def test_loading_holds_the_quantised_model_and_one_shard(weights: str, tmp_path: Path, base: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
    values = llama(**sizes, num_key_value_heads=12)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    shard = 20_000_000
    model.bfloat16().save_pretrained(tmp_path / "shards", max_shard_size=shard)
    whole = sum(path.stat().st_size for path in (tmp_path / "shards").glob("*.safetensors"))
    del model
    command = [sys.executable, "-W", "ignore", "-c", LOADING, str(tmp_path / "shards"), str(base), weights]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment |= {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    peak, held = map(int, out.split()[-2:])
    print(f"{weights}: 16-bit weights {whole / 1e6:.0f} MB in shards of {shard / 1e6:.0f}; held afterwards "
          f"{held / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB")  # fmt: skip
    assert held < whole * (0.56 if weights == "int8" else 0.34)
    assert peak < held + 1.5 * shard
