"""A checkpoint as a plain Hugging Face folder, proven to give the logits that training had.

Over a quantised base they are those of the unquantised base under the trained adapter, and `quantisation_gap` says
how far they are from the trainer's. A folder that holds quantised weights is unpacked. An earlier adapter that the
run folded or stacked is merged first, in fp32.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from dist_cpt.adapters.lora import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    canonical_key,
    import_peft,
    without_peft_deprecations,
)
from dist_cpt.adapters.pissa import INITIAL, take_out
from dist_cpt.adapters.prior_adapter import STANDS_ON, EarlierAdapter, open_earlier
from dist_cpt.adapters.quantize import QUANTISED, dequantise, load_quantised, stored_weights, whole_model
from dist_cpt.adapters.vocabulary import untie
from dist_cpt.config.schema import ClassifyConfig, ModelConfig
from dist_cpt.errors import CheckpointError, ConfigError, WriteError
from dist_cpt.model.architectures import parts_of
from dist_cpt.model.classify import HEAD, as_classifier, is_classifier, read_labels
from dist_cpt.model.load import WEIGHTS_DTYPE, locate_base, weights_sha256
from dist_cpt.model.safety_checks import require_code_consent

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
DTYPES = WEIGHTS_DTYPE | {"fp16": torch.float16}
MAX_RELATIVE_DIFFERENCE = 1e-5  # of the largest logit, fp32
_PROBE_TOKENS = 32


def merge(
    checkpoint: str | Path,
    out: str | Path,
    dtype: str = "bf16",
    *,
    base: str | None = None,
    base_only: bool = False,
    scale: float = 1.0,
) -> float:
    """Write base and adapter as one Hugging Face folder; a full-parameter checkpoint is cast.

    `checkpoint` is one of this program, or a PEFT folder. Merging happens in fp32, then the weights are stored in
    `dtype` (fp32 | bf16 | fp16). `base` overrides the path
    in the manifest, for a base that moved. With `base_only` the run's own adapter is left out: what is written is the
    base that this adapter belongs to, an earlier one merged in. `scale` is the share of all that was trained, adapter
    and matrices alike: W = base + scale x (trained - base). Two things are proven: the merged model gives the logits of
    base and adapter in fp32, and the written folder those of the merged model. Returns the largest absolute difference
    between the logits of the written folder and those of the checkpoint (at `scale`), both computed in fp32, over
    probe tokens: 0 but for summation order in fp32, the rounding of the weights in 16 bit.

    Raises:
        CheckpointError: no checkpoint, another base than the run had, or logits that differ.
        ConfigError: unknown dtype, `out` is in use, nothing to scale, or weights beyond fp16.
        WriteError: `out` cannot be written.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    require_new(out, dtype)
    base_folder = verified_base(checkpoint, base)
    if base_only and base_folder is None:
        raise ConfigError(f"{checkpoint} has no adapter", remedy="leave --base-only out")
    if base_only and scale != 1.0:
        raise ConfigError("--base-only leaves out what --scale would scale", remedy="give one of them")
    model, expected = merged_model(checkpoint, base_folder, base_only=base_only)
    probe = probe_ids(model.config.vocab_size)
    if scale != 1.0:
        Blend(model, blend_ground(checkpoint, base_folder, base)).set(scale)
        expected = logits_of(model, probe)
    with written(model, out, dtype, [checkpoint, *([base_folder] if base_folder else [])]) as staging:
        return float((logits_of(plain_model(staging), probe) - expected).abs().max())


def merged_model(checkpoint: Path, base_folder: Path | None, *, base_only: bool = False) -> tuple[Any, torch.Tensor]:
    """(the plain fp32 model of a checkpoint with all merged in, logits of base and adapter side by side).

    Raises:
        CheckpointError: the merged model's logits are not those.
    """
    ground = ground_of(checkpoint, base_folder) if base_only and base_folder else load_fp32(checkpoint, base_folder)
    probe = probe_ids(ground.config.vocab_size)
    expected = logits_of(ground, probe)
    if base_folder is None or base_only:
        return ground, expected
    model = ground.merge_and_unload()
    require_same_logits("the merged model", logits_of(model, probe), expected)
    return model, expected


class Blend:
    """Sets a trained model to W = ground + scale x (trained - ground), in fp32 and in place, as often as wanted.

    What the ground has no counterpart for, new rows and a classifier's head, stays as trained.
    """

    def __init__(self, trained: Any, ground: Any) -> None:
        below = ground.state_dict()
        self._moved: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        for name, parameter in trained.named_parameters():
            origin = below.get(name)
            # The ground of a classifier has a head too, but one that nobody trained.
            if origin is None or origin.shape[1:] != parameter.shape[1:] or name == f"{HEAD}.weight":
                continue
            part = parameter.data[: len(origin)]
            origin = origin[: len(part)]
            if not torch.equal(part, origin):
                self._moved.append((parameter, origin.clone(), part - origin))

    @torch.no_grad()
    def set(self, scale: float) -> None:
        for parameter, origin, change in self._moved:  # its storage may have moved to a GPU since
            parameter.data[: len(origin)].copy_(origin.add(change, alpha=scale))


def blend_ground(checkpoint: Path, base_folder: Path | None, base: str | None) -> Any:
    """What a scale measures from, in fp32: the base without what the run trained.

    Raises:
        ConfigError: the run began from scratch.
    """
    if base_folder is not None:
        return ground_of(checkpoint, base_folder)
    identity = _manifest(checkpoint)["base"]
    if identity.get("path") is None:
        raise ConfigError(
            f"{checkpoint} was trained from scratch: there is no base to scale from", remedy="leave the scale at 1"
        )
    return plain_model(_same_base(identity, base))


def require_new(out: Path, dtype: str) -> None:
    """Refuse an output folder that is in use and a dtype that is none.

    Raises:
        ConfigError: one of them.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists", remedy="give the name of a new folder")


def require_same_logits(what: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Raises:
    CheckpointError: fp32 logits differ by more than the order of summation explains.
    """
    difference = float((found - expected).abs().max())
    allowed = MAX_RELATIVE_DIFFERENCE * max(1.0, float(expected.abs().max()))
    if not difference <= allowed:
        raise CheckpointError(
            f"{what}'s logits differ from the checkpoint's by {difference:.2e}, allowed {allowed:.2e}"
        )


@contextmanager
def written(model: Any, out: Path, dtype: str, tokenizer_folders: list[Path]) -> Iterator[Path]:
    """`model` as a folder in `dtype` that reads back as the same model; it becomes `out` if the body succeeds.

    Raises:
        CheckpointError: what was written is another model.
        ConfigError: weights that fp16 cannot hold.
        WriteError: it cannot be written.
    """
    staging = _write(round_to(model, dtype), out, tokenizer_folders)
    try:
        probe = probe_ids(model.config.vocab_size)
        require_same_logits(
            "the written folder", logits_of(plain_model(staging), probe), logits_of(model.float(), probe)
        )
        yield staging
        publish(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def round_to(model: Any, dtype: str) -> Any:
    """`model` stored in `dtype`, in place.

    Raises:
        ConfigError: a weight is beyond fp16.
    """
    for name, parameter in model.named_parameters():  # not model.to(): rotary frequencies stay fp32 when loaded
        parameter.data = parameter.data.to(DTYPES[dtype])
        if dtype == "fp16" and not bool(torch.isfinite(parameter).all()):
            raise ConfigError(f"--dtype fp16 cannot hold {name}: a weight is beyond 65504", remedy="use bf16")
    return model


def quantisation_gap(checkpoint: str | Path, *, base: str | None = None) -> float | None:
    """How far the trainer's quantised base is from the one that `merge` and `generate` use, under the trained adapter.

    The largest absolute difference of their logits, both computed in fp32, over probe tokens; None if the run's
    base was not quantised. `base` as for `merge`.

    Raises:
        CheckpointError: no checkpoint, or another base than the run had.
        MissingExtraError: bitsandbytes is not installed.
    """
    checkpoint = Path(checkpoint)
    if not (checkpoint / "manifest.json").is_file() and (checkpoint / ADAPTER_CONFIG).is_file():
        return None  # a PEFT folder does not say
    weights = _manifest(checkpoint)["base"].get("weights")
    if weights not in QUANTISED:
        return None
    base_folder = verified_base(checkpoint, base)
    assert base_folder is not None  # only adapters train over quantised weights
    plain = load_fp32(checkpoint, base_folder)
    probe = probe_ids(plain.config.vocab_size)
    expected = logits_of(plain, probe)
    del plain
    quantised = load_quantised(base_folder, None, torch.device("cpu"), weights)
    for parameter in quantised.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    with ExitStack() as beside:
        if (earlier := _earlier(checkpoint)) is not None:
            adapter, mode = earlier
            _fit_vocabulary(quantised, adapter.folder)
            adapter.put_vocabulary(quantised)
            adapter.fold(quantised) if mode == "fold" else beside.enter_context(adapter.beside(quantised))
        trained = _under_adapter(_with_class_head(quantised, checkpoint), checkpoint)
        return float((logits_of(trained, probe) - expected).abs().max())


def verified_base(checkpoint: Path, override: str | None = None) -> Path | None:
    """The base folder of an adapter checkpoint, its weights hashed against the manifest; None without adapter.

    A PEFT folder without manifest is taken at its word.

    Raises:
        CheckpointError: no manifest and no adapter, or the base's weights are not those of the run.
    """
    if not (checkpoint / "manifest.json").is_file() and (checkpoint / ADAPTER_CONFIG).is_file():
        return _named_base(checkpoint, override)
    manifest = _manifest(checkpoint)
    return _same_base(manifest["base"], override) if manifest["adapter"] else None


def _named_base(adapter: Path, override: str | None) -> Path:
    try:
        said = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        name, revision = said.get("base_model_name_or_path"), said.get("revision")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{adapter / ADAPTER_CONFIG} cannot be read: {error}") from None
    if (note := said.get(STANDS_ON)) is not None:
        name = note["base"]
    if not (override or name):
        raise ConfigError(f"{adapter / ADAPTER_CONFIG} names no base model", remedy="name it with --base")
    return locate_base(override or name, None if override else revision)


def _same_base(identity: dict[str, Any], override: str | None) -> Path:
    folder = locate_base(override or identity["path"], None if override else identity["revision"])
    found = weights_sha256(folder)
    if found != identity["sha256"]:
        raise CheckpointError(
            f"the base at {folder} has sha256 {found[:12]}, the run had {identity['sha256'][:12]}",
            remedy="give the base that the run was started from",
        )
    return folder


def load_fp32(checkpoint: Path, base_folder: Path | None) -> Any:
    """The model of a checkpoint in fp32: under vanilla PEFT on its base, or plain.

    Raises:
        CheckpointError: the adapter's files are missing or pickled.
    """
    if base_folder is None:
        return plain_model(checkpoint)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (checkpoint / name).is_file():
            raise CheckpointError(f"{checkpoint} has no {name}", remedy="adapters are read from safetensors only")
    return _under_adapter(ground_of(checkpoint, base_folder), checkpoint)


def ground_of(checkpoint: Path, base_folder: Path, *, with_vocabulary: bool = False) -> Any:
    """What an adapter belongs to, in fp32: its base, with the earlier adapter that it stands on merged in.

    `with_vocabulary` puts the embedding and the head that the run trained in place as well.
    """
    model = plain_model(base_folder)
    if (earlier := _earlier(checkpoint)) is not None:
        _fit_vocabulary(model, earlier[0].folder)
        earlier[0].require_fit(model)
        earlier[0].put_vocabulary(model)
        earlier[0].fold(model)
    if with_vocabulary:
        _fit_vocabulary(model, checkpoint)
        _put_vocabulary(model, checkpoint)
    return _with_class_head(model, checkpoint)


def _with_class_head(model: Any, checkpoint: Path) -> Any:
    """The classifier that an adapter of one belongs to; the values of its head come with the adapter."""
    labels = read_labels(checkpoint)
    return model if labels is None else as_classifier(model, parts_of(model), ClassifyConfig(labels=labels), seed=0)[0]


def _earlier(checkpoint: Path) -> tuple[EarlierAdapter, str] | None:
    """The adapter that adapter_config.json says this one stands on, and how.

    Raises:
        CheckpointError: it is another one by now.
    """
    said = json.loads((checkpoint / ADAPTER_CONFIG).read_text(encoding="utf-8")).get(STANDS_ON)
    if said is None:
        return None
    adapter = open_earlier(Path(said["adapter"]))
    if adapter.sha256 != said["adapter_sha256"]:
        raise CheckpointError(
            f"{adapter.folder} has sha256 {adapter.sha256[:12]}, {checkpoint} stands on one with "
            f"{said['adapter_sha256'][:12]}",
            remedy="put that adapter back",
        )
    return adapter, said["mode"]


def _under_adapter(model: Any, checkpoint: Path) -> Any:
    peft = import_peft()
    _fit_vocabulary(model, checkpoint)
    with without_peft_deprecations(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", rf"Unexpected keyword arguments \['{STANDS_ON}'\]")  # heeded by `_ground`
        config = peft.PeftConfig.from_pretrained(str(checkpoint))
        if (checkpoint / INITIAL).is_file():
            take_out(model, checkpoint / INITIAL)
            config.init_lora_weights = True  # else PEFT would look for that part itself, and take it out again
        return peft.PeftModel.from_pretrained(model, str(checkpoint), config=config).eval()


def _fit_vocabulary(model: Any, adapter: Path) -> None:
    """Rows and tie as the adapter was trained with: its matrices bring the values of all rows."""
    from safetensors import safe_open

    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    ends = tuple(f".{name}.weight" for name, module in model.named_modules() if module is embeddings or module is head)
    with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as file:
        trained = {key: file.get_slice(key).get_shape()[0] for key in file.keys() if key.endswith(ends)}  # noqa: SIM118
    rows = set(trained.values())
    if len(rows) == 1 and rows != {embeddings.num_embeddings}:
        model.resize_token_embeddings(rows.pop(), mean_resizing=False)
    config = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    tied = head is not None and head.weight is embeddings.weight
    if trained and tied and not config.get("ensure_weight_tying"):
        untie(model)  # as PEFT does, which would also warn


@torch.no_grad()
def _put_vocabulary(model: Any, adapter: Path) -> None:
    from safetensors import safe_open

    with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            name = canonical_key(key)
            if name is not None and ".lora_" not in name:
                model.get_parameter(name.removeprefix("base_model.model.")).copy_(file.get_tensor(key))


def plain_model(folder: Path) -> Any:
    """A whole model folder in fp32, in eval mode; quantised weights are unpacked."""
    import_peft()  # before transformers brings in what peft would, less quietly
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    locate_base(str(folder), None)  # refuses pickled weights
    require_code_consent(folder, ModelConfig(path=str(folder)))  # a merge runs nobody's code
    if (stored := stored_weights(folder)) is not None:
        return dequantise(load_quantised(folder, None, torch.device("cpu"), stored)).eval()
    auto = AutoModelForSequenceClassification if is_classifier(folder) else AutoModelForCausalLM
    loaded: Any = auto.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
    )
    return whole_model(folder, *loaded).eval()


def _manifest(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "manifest.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content = content.get("content", content)
        return {"adapter": bool(content["adapter"]), "base": dict(content["base"])}
    except FileNotFoundError:
        raise CheckpointError(f"{checkpoint} is no checkpoint: it has no manifest.json") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}", remedy="dist-cpt verify shows what holds") from error


def probe_ids(vocab_size: int) -> torch.Tensor:
    """Token ids [1, L], the same for every model of this vocabulary."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (1, _PROBE_TOKENS), generator=generator)


def logits_of(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """fp32 logits [1, L, V] of `input_ids` [1, L]; [1, C] of a classifier."""
    with torch.no_grad():
        return model(input_ids=input_ids, use_cache=False).logits.float()


def write_model(model: Any, out: Path, tokenizer_folders: list[Path]) -> None:
    """`model` and the first tokenizer found as a Hugging Face folder, in shards of 5 GB; its generation ends where a
    turn of the tokenizer's chat does, which a base's own configuration does not know."""
    from transformers import AutoTokenizer

    model.save_pretrained(out, max_shard_size="5GB")
    copy_tokenizer(tokenizer_folders, out)
    generation = getattr(model, "generation_config", None)
    if generation is None or is_classifier(out):
        return
    ends = turn_ends(AutoTokenizer.from_pretrained(out, trust_remote_code=False))
    known = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    if not set(ends) <= set(known):
        told = copy.deepcopy(generation)
        told.eos_token_id = [*(end for end in known if end is not None), *(end for end in ends if end not in known)]
        told.save_pretrained(out)


def turn_ends(tokenizer: Any) -> list[int]:
    """The special token that the chat template puts after an answer; none without a template, or where it puts none."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        return []
    answer = "forty-two"
    talk = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": answer}]
    try:
        _, found, after = tokenizer.apply_chat_template(talk, tokenize=False).rpartition(answer)
    except TemplateError:  # it wants more than a question and an answer
        return []
    first = tokenizer(after, add_special_tokens=False)["input_ids"][:1] if found else []
    return [token for token in first if token in tokenizer.added_tokens_decoder]


def _write(model: Any, out: Path, tokenizer_folders: list[Path]) -> Path:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        staging.chmod(0o755)  # mkdtemp's 0700 would follow the folder to its final name
        write_model(model, staging, tokenizer_folders)
    except OSError as error:
        raise WriteError(f"{out} cannot be written: {error}", remedy="check space and permissions") from error
    return staging


def copy_tokenizer(folders: list[Path], out: Path) -> None:
    """The tokenizer's files of the first of `folders` that has any.

    Raises:
        CheckpointError: none has.
    """
    for folder in folders:
        found = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
        if found:
            for file in found:
                shutil.copyfile(file, out / file.name)
            return
    raise CheckpointError(
        f"no tokenizer in {' or '.join(map(str, folders))}",
        remedy="put the tokenizer's files into the checkpoint's base",
    )


def publish(staging: Path, out: Path) -> None:
    """Give a finished folder its name.

    Raises:
        WriteError: it cannot be renamed.
    """
    try:
        os.replace(staging, out)  # an empty folder at `out` is replaced
    except OSError as error:
        raise WriteError(f"{out} cannot be written: {error}") from error
