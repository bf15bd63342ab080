"""One training step of the Llama 3.1 8B architecture on one GPU: dist-cpt beside Hugging Face + PEFT, Liger, Unsloth.

Random bf16 weights made on the device, random tokens, one document per sequence, 8192 tokens a step, AdamW and
clipping in it. LoRA on every linear layer at 4096 and 8192 tokens, LoRA with both vocabulary matrices, and QLoRA
(whose base, a folder, is written once). Each side runs in a process of its own. All train without recomputation
where that fits, else with gradient checkpointing, and the result says which. Reported: tokens/s over the median step,
MFU of 4 N_frozen + 6 N_trainable + attention against 989 TFLOP/s and against the matmul rate measured in the same
run, and the peak of memory. What does not import, fails or is not reached in time is named.

    python benchmarks/gpu_step.py [--seconds 300] [--cases lora_4096] [--sides dist_cpt hf_peft] [--out FILE]
    python benchmarks/gpu_step.py --tiny     every path once on a CPU, in sizes that measure nothing
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Beside this file lies kernels.py: on the path it would be taken for Hugging Face's package of that name.
sys.path[:] = [
    str(ROOT),
    str(ROOT / "kernels"),
    *(p for p in sys.path if Path(p or ".").resolve() != ROOT / "benchmarks"),
]

NO_DEVICE = 64  # as a wrong configuration
SPECIFIED_FLOPS = 989e12  # bf16, dense. Source: NVIDIA H100 and H200 data sheets, SXM
WARM_UP_STEPS, TIMED_STEPS = 3, 8
TOKENS_PER_STEP = 8192
RANK = ALPHA = 64
LEARNING_RATE = 1e-4
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VOCABULARY_MATRICES = ("embed_tokens", "lm_head")
LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
TINY = LLAMA_8B | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True)
class Case:
    seq_len: int
    vocabulary: bool = False  # trains both of its matrices as well
    weights: str = "bf16"


CASES = {
    "lora_4096": Case(4096),
    "lora_8192": Case(8192),
    "lora_embed_head_4096": Case(4096, vocabulary=True),
    "qlora_4096": Case(4096, weights="nf4"),
    "fp8_4096": Case(4096, weights="fp8"),  # beside lora_4096; no peer stores its base so
}
NEEDS = {"dist_cpt": (), "hf_peft": (), "hf_liger": ("liger_kernel",), "unsloth": ("unsloth",)}
SIDES = {
    "dist_cpt": "the single engine, as the training loop calls it: base bf16, NF4 or fp8, LoRA and vocabulary matrices "
    "bf16 with fp32 masters and moments, model.kernels auto",
    "hf_peft": "transformers (sdpa) + PEFT under bf16 autocast, fused AdamW; base bf16 or NF4, adapters fp32",
    "hf_liger": "the same with Liger-Kernel's patches for Llama",
    "unsloth": "FastLanguageModel with its own kernels, fused AdamW",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seconds", type=float, default=3600.0, help="what is not done by then is named")
    parser.add_argument("--out", type=Path, help="write the result here as well")
    parser.add_argument("--tiny", action="store_true", help="every path once, on a CPU")
    parser.add_argument("--one", metavar="SIDE", help=argparse.SUPPRESS)  # in this process
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        one_side(arguments)
        return 0
    import torch

    if not arguments.tiny and not torch.cuda.is_available():
        print("gpu_step.py: no CUDA device here; --tiny tries every path on a CPU", file=sys.stderr)
        return NO_DEVICE
    result = everything(arguments)
    print(json.dumps(result, indent=2))
    return 0


def everything(arguments: argparse.Namespace) -> dict[str, Any]:
    deadline = time.monotonic() + arguments.seconds
    absent = {side: f"not installed: {name}" for side, names in NEEDS.items() for name in names if not found(name)}
    sides = [side for side in arguments.sides if side not in absent]
    plain = [name for name in arguments.cases if CASES[name].weights == "bf16"]
    packed = [name for name in arguments.cases if CASES[name].weights != "bf16"]
    if any(CASES[name].weights == "nf4" for name in packed) and not found("bitsandbytes"):
        absent["qlora"] = "not installed: bitsandbytes"
        packed = [name for name in packed if CASES[name].weights != "nf4"]
    results: dict[str, dict[str, Any]] = {name: {} for name in arguments.cases}
    report: dict[str, Any] = {
        "what": "one training step of the Llama 3.1 8B architecture with random weights on one GPU",
        "date": date.today().isoformat(),
        "complete": False,
        "tiny": arguments.tiny,
        "specified_tflop_per_s": SPECIFIED_FLOPS / 1e12,
        "versions": versions(),
        "absent": absent,
        "work": {"tokens_per_step": TOKENS_PER_STEP, "lora_rank": RANK, "targets": TARGETS, "timed_steps": TIMED_STEPS},
        "sides": SIDES,
        "results": results,
    }
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="dist-cpt-gpu-", dir=memory if free_gib(memory) > 40 else None) as scratch:
        folder = Path(scratch) / "base"
        device = in_a_process("device", [], folder, deadline, arguments)
        report["device"] = device.get("name", device)
        rate = device.get("matmul_flops")
        report["matmul_tflop_per_s"] = None if rate is None else round(rate / 1e12, 1)

        def run(side: str, names: list[str]) -> None:
            measured = in_a_process(side, names, folder, deadline, arguments)
            take(results, side, measured, names, rate)
            write(report, arguments.out)  # at once: whoever started this may stop it

        for side in sides:
            if side != "unsloth":  # it loads folders only
                run(side, plain)
        if packed or "unsloth" in sides:
            written = in_a_process("folder", [], folder, deadline, arguments)
            for side in sides:
                names = packed if side != "unsloth" else [*plain, *packed]
                names = [name for name in names if side == "dist_cpt" or CASES[name].weights != "fp8"]
                if "failed" in written:
                    take(results, side, written, names, rate)
                else:
                    run(side, names)
    report["complete"] = True
    write(report, arguments.out)
    return report


def write(report: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(json.dumps(report, indent=2) + "\n")


def take(
    results: dict[str, dict[str, Any]], side: str, measured: dict[str, Any], names: list[str], rate: float | None
) -> None:
    for name in names:
        results[name][side] = measured.get(name) or {"failed": measured.get("failed", "not reached in time")}
        add_rates(results[name][side], rate)


def add_rates(measured: dict[str, Any], matmul_flops: float | None) -> None:
    if "step_seconds" not in measured:
        return
    seconds = statistics.median(measured["step_seconds"])
    rate = measured["flops_per_step"] / seconds
    measured["tokens_per_second"] = round(measured["tokens_per_step"] / seconds, 1)
    measured["tflop_per_s"] = round(rate / 1e12, 1)
    measured["mfu_of_989"] = round(rate / SPECIFIED_FLOPS, 4)
    measured["mfu_of_measured"] = round(rate / matmul_flops, 4) if matmul_flops else None


def in_a_process(
    side: str, names: list[str], folder: Path, deadline: float, arguments: argparse.Namespace
) -> dict[str, Any]:
    """{case: figures} of one side; of a process that fails or takes too long, what it had measured until then."""
    left = deadline - time.monotonic()
    if left < 5 or (not names and side in SIDES):
        return {"failed": "not reached in time"}
    result = folder.parent / "result.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--one", side, "--folder", str(folder), "--result", str(result)]
    command += ["--tiny"] if arguments.tiny else []
    command += ["--cases", *names] if names else []
    print(f"{side}: {', '.join(names)}", file=sys.stderr, flush=True)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    log = folder.parent / "log.txt"
    try:
        with log.open("w") as output:
            done = subprocess.run(command, env=environment, stdout=output, stderr=output, timeout=left, check=False)
        failed = f"exit {done.returncode}: {last_line(log)}" if done.returncode else None
    except subprocess.TimeoutExpired:
        failed = "not done in time"
    measured = json.loads(result.read_text()) if result.exists() else {}
    return measured | ({"failed": failed} if failed else {})


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def found(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def free_gib(folder: Path) -> float:
    if not folder.is_dir():
        return 0.0
    state = os.statvfs(folder)
    return state.f_bavail * state.f_frsize / 2**30


def versions() -> dict[str, str]:
    names = ("torch", "triton", "transformers", "peft", "bitsandbytes", "flash-attn", "liger-kernel", "unsloth")
    versions = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


# -- one side, in a process of its own -----------------------------------------------------------------------------


def one_side(arguments: argparse.Namespace) -> None:
    import torch

    device = torch.device("cpu" if arguments.tiny else "cuda")
    if arguments.one == "device":
        arguments.result.write_text(json.dumps(describe(device)))
        return
    if arguments.one == "folder":
        write_folder(arguments.folder, device, arguments.tiny)
        return
    if arguments.one == "unsloth":
        import unsloth  # type: ignore[import-not-found]  # noqa: F401  # before transformers, which it patches
    if arguments.one == "hf_liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama  # type: ignore[import-not-found]

        apply_liger_kernel_to_llama()
    measured: dict[str, Any] = {}
    for name in arguments.cases:
        run = Run(CASES[name], device, arguments)
        measured[name] = measure(arguments.one, run)
        arguments.result.write_text(json.dumps(measured))  # at once: a later case may take too long


class Run:
    """One case on one device: its sizes and its tokens."""

    def __init__(self, case: Case, device: Any, arguments: argparse.Namespace) -> None:
        self.case, self.device, self.folder = case, device, arguments.folder
        self.tiny = arguments.tiny
        self.values = dict(TINY if arguments.tiny else LLAMA_8B)
        shrink = 64 if arguments.tiny else 1
        self.seq_len, self.tokens = case.seq_len // shrink, TOKENS_PER_STEP // shrink
        self.num_steps = 3 if arguments.tiny else WARM_UP_STEPS + TIMED_STEPS
        self.recomputes = False

    def blocks(self) -> Any:
        """[steps, sequences, seq_len] token ids."""
        import torch

        shape = (self.num_steps, self.tokens // self.seq_len, self.seq_len)
        return torch.randint(0, self.values["vocab_size"], shape, generator=torch.Generator().manual_seed(0))


def describe(device: Any) -> dict[str, Any]:
    """The device's name and how many FLOPs a second it does in products of bf16 matrices."""
    import torch

    if device.type == "cpu":
        return {"name": "cpu", "matmul_flops": 1e11}
    matrices = [torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(4)]
    seconds = []
    for i in range(30):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.mm(matrices[i % 4], matrices[(i + 1) % 4])
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return {"name": torch.cuda.get_device_name(), "matmul_flops": 2 * 8192**3 / statistics.median(seconds[5:])}


def write_folder(folder: Path, device: Any, tiny: bool) -> None:
    """A base with random weights, and a tokenizer of numbers for who insists on one."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    model = random_model(dict(TINY if tiny else LLAMA_8B), device)
    model.save_pretrained(folder)
    words = {f"t{i}": i for i in range(model.config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t1", pad_token="t2", unk_token="t0").save_pretrained(
        folder
    )
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()


def random_model(values: dict[str, Any], device: Any) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = values.pop("model_type")
    torch.manual_seed(0)
    with torch.device(device):
        config = AutoConfig.for_model(kind, **values)
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")


def measure(side: str, run: Run) -> dict[str, Any]:
    """Seconds of each timed step, the peak of memory, FLOPs and losses; or one line on why there is none."""
    import torch

    while True:
        try:
            step, flops = dist_cpt(run) if side == "dist_cpt" else peer(side, run)
            return timed(step, run) | {"flops_per_step": flops, "gradient_checkpointing": run.recomputes}
        except torch.cuda.OutOfMemoryError as error:
            if run.recomputes:
                return {"failed": " ".join(str(error).split())[:200]}
            run.recomputes = True
        except Exception as error:  # of a peer's version that does not go with the rest, most likely
            return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
        finally:
            step = None
            gc.collect()
            if run.device.type == "cuda":
                torch.cuda.empty_cache()


def timed(step: Any, run: Run) -> dict[str, Any]:
    import torch

    on_gpu = run.device.type == "cuda"
    losses, seconds = [], []
    for number, blocks in enumerate(run.blocks()):
        if on_gpu:
            torch.cuda.synchronize()
            if number == WARM_UP_STEPS:
                torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        loss = step(blocks)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        losses.append(float(loss))
    warm_up = 1 if run.tiny else WARM_UP_STEPS
    return {
        "tokens_per_step": run.tokens,
        "seq_len": run.seq_len,
        "step_seconds": [round(value, 5) for value in seconds[warm_up:]],
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None,
        "first_and_last_loss": [round(losses[0], 4), round(losses[-1], 4)],
    }


def dist_cpt(run: Run) -> tuple[Any, int]:
    """(step of a batch of blocks, which gives its loss; model FLOPs of a step)."""
    from unittest import mock

    import numpy as np
    import torch

    from dist_cpt.config.schema import RunConfig
    from dist_cpt.data.batch import IGNORE_INDEX, Batch
    from dist_cpt.engines.build import build_engine
    from dist_cpt.model import load
    from dist_cpt.optim.groups import param_groups

    config = RunConfig.model_validate(recipe(run))

    def random_base(*_: Any) -> tuple[Any, dict[str, Any]]:
        # a recipe refuses an adapter on random weights, and 16 GB from a disk would take longer than all steps
        return random_model(dict(run.values), run.device), {"path": None, "revision": None, "sha256": "random"}

    with mock.patch.object(load, "load_base", load.load_base if run.case.weights != "bf16" else random_base):
        model = load.load_model(config, device=run.device)
    groups = param_groups(model.trainable, config.optim, adapter=True)
    engine = build_engine(model.module, model.trainable, groups, model.layers, config, run.device)
    lrs = {group.name: group.peak_lr for group in groups}

    def step(ids: torch.Tensor) -> float:
        size, length = ids.shape
        labels = torch.cat([ids[:, 1:], torch.full((size, 1), IGNORE_INDEX)], dim=1)
        positions = torch.arange(length).repeat(size, 1)
        borders = torch.arange(0, size * length + 1, length, dtype=torch.int32)
        targets = size * (length - 1)
        counts = np.array([[size, ids.numel(), targets]])
        batch = Batch(ids, labels, positions, borders, length, targets, counts, tuple(range(size)))
        engine.accumulate(batch, targets, last=True)
        return engine.step(lrs).read().loss

    return step, model_flops(run)


def model_flops(run: Run) -> int:
    """What the model needs for a step, without recomputation: the same for every side."""
    from dist_cpt.config.schema import RunConfig
    from dist_cpt.plan.shapes import shapes_of
    from dist_cpt.plan.step_model import token_work
    from dist_cpt.plan.tensors import training_of

    training = training_of(RunConfig.model_validate(recipe(run)), shapes_of(run.values))
    return round(token_work(training, run.seq_len).model_flops * run.tokens)


def recipe(run: Run) -> dict[str, Any]:
    return {
        "name": "bench",
        "model": {"path": str(run.folder), "weights": run.case.weights},
        "adapter": {"rank": RANK, "alpha": ALPHA, "rslora": False, "targets": TARGETS},
        "embeddings": {"train": VOCABULARY_MATRICES if run.case.vocabulary else ()},
        "data": {"seq_len": run.seq_len, "sources": [{"path": "none"}]},
        "batch": {"global_tokens": run.tokens, "micro_batch": run.tokens // run.seq_len},
        "train": {"tokens": run.tokens},
        "optim": {"lr": LEARNING_RATE, "embedding_lr": LEARNING_RATE, "max_grad_norm": 1.0},
        "engine": {"kind": "single", "activation_checkpointing": "full" if run.recomputes else "none"},
    }


def peer(side: str, run: Run) -> tuple[Any, int]:
    """As `dist_cpt`."""
    import torch

    model = by_unsloth(run) if side == "unsloth" else by_transformers(run)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)

    def step(ids: torch.Tensor) -> torch.Tensor:
        ids = ids.to(run.device)
        with torch.autocast(run.device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step, model_flops(run)


def by_transformers(run: Run) -> Any:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if run.case.weights == "nf4":
        import torch
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        packed = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        model: Any = AutoModelForCausalLM.from_pretrained(
            run.folder,
            dtype=torch.bfloat16,
            quantization_config=packed,
            device_map={"": run.device},
            attn_implementation="sdpa",
        )
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    else:
        model = random_model(dict(run.values), run.device)
    if run.recomputes:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = False
    return get_peft_model(
        model,
        LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            target_modules=list(TARGETS),
            modules_to_save=list(VOCABULARY_MATRICES) if run.case.vocabulary else None,
            task_type="CAUSAL_LM",
        ),
    )


def by_unsloth(run: Run) -> Any:
    import torch
    from unsloth import FastLanguageModel  # type: ignore[import-not-found]

    model, _ = FastLanguageModel.from_pretrained(
        str(run.folder), max_seq_length=run.seq_len, dtype=torch.bfloat16, load_in_4bit=run.case.weights == "nf4"
    )
    return FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0,
        target_modules=[*TARGETS, *(VOCABULARY_MATRICES if run.case.vocabulary else ())],
        use_gradient_checkpointing="unsloth" if run.recomputes else False,
    )


if __name__ == "__main__":
    sys.exit(main())
