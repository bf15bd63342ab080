"""A training step on the CPU: dist-cpt's single engine against Hugging Face Trainer + PEFT, in one run.

Same work: one Llama folder with random bf16 weights, the same token blocks of seq_len (one document each, so that
attention costs both sides the same), micro-batch, accumulation, LoRA targets and rank, both vocabulary matrices
trained, AdamW, clipping, a constant learning rate; no recomputation of activations, no evaluation, no saving. The
losses of all steps are compared before anything is reported. Every side runs in a fresh process per round, so
that its peak memory is its own; the order of the sides changes from round to round. tokens/s is over the time
from the end of one optimizer step to the end of the next, data loading included.

    python benchmarks/step.py [--shape all] [--rounds 3] [--steps 8] [--write]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Beside this file lies kernels.py: on the path it would be taken for Hugging Face's package of that name.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]

WARM_UP_STEPS = 2
LEARNING_RATE = 1e-4
WEIGHT_DECAY = 0.01
LORA_RANK = LORA_ALPHA = 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODULES_TO_SAVE = ("embed_tokens", "lm_head")
VOCABULARY = 32000
# bf16 weights and bf16 products leave about three digits of a mean loss; a wrong batch or label is off by far more.
LOSS_TOLERANCE = 0.02

SHAPES: dict[str, dict[str, int]] = {
    "main": {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1408, "num_attention_heads": 8},
    "small": {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 704, "num_attention_heads": 4},
}
SIDES = {
    "dist_cpt": "load_model + single engine, accumulate and step as the training loop calls them: frozen base bf16, "
    "LoRA and vocabulary matrices bf16 copies with fp32 masters and moments, fused AdamW, chunked linear "
    "cross-entropy",
    "trainer_autocast": "Trainer(bf16=True, optim=adamw_torch_fused), model loaded in fp32: every weight, master "
    "and moment fp32, products in bf16 under autocast; PEFT LoRA, modules_to_save for the vocabulary matrices",
    "trainer_bf16": "Trainer(bf16=True, optim=adamw_torch_fused), model loaded in bf16: frozen base bf16, "
    "LoRA fp32 (PEFT's default), vocabulary matrices and their moments bf16 without fp32 masters",
}
OURS, PEERS = "dist_cpt", ("trainer_autocast", "trainer_bf16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help=f"timed, after {WARM_UP_STEPS} of warm-up")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="to benchmarks/results/")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # one measurement, in this process
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        measured = measure(arguments.side, arguments.folder, arguments)
        Path(arguments.folder, f"{arguments.side}.json").write_text(json.dumps(measured))
        return
    names = list(SHAPES) if arguments.shape == "all" else [arguments.shape]
    load_before = os.getloadavg()
    shapes = {name: compare(name, arguments) for name in names}
    result = {
        "what": "one LoRA + vocabulary training step, dist_cpt single engine against Hugging Face Trainer + PEFT",
        "date": date.today().isoformat(),
        "machine": {"cores": len(os.sched_getaffinity(0)), "processor": cpu_model(), "threads": arguments.threads},
        "versions": {"python": platform.python_version()}
        | {p: version(p) for p in ("torch", "transformers", "peft", "accelerate")},
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "work": {
            "seq_len": arguments.seq_len,
            "micro_batch": arguments.micro_batch,
            "accumulation": arguments.accumulation,
            "tokens_per_step": arguments.seq_len * arguments.micro_batch * arguments.accumulation,
            "vocabulary": VOCABULARY,
            "lora": {"rank": LORA_RANK, "targets": TARGETS, "trained_in_full": MODULES_TO_SAVE},
            "rounds": arguments.rounds,
            "timed_steps_per_round": arguments.steps,
            "gradient_checkpointing": False,
        },
        "sides": SIDES,
        "shapes": shapes,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.write:
        target = Path(__file__).parent / "results" / f"{date.today().isoformat()}_cpu_step.json"
        target.parent.mkdir(exist_ok=True)
        target.write_text(text + "\n")


def compare(shape: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure every side of one shape in turn, `rounds` times, and check that their losses agree."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory(prefix="dist-cpt-bench-") as folder:
        write_base(Path(folder) / "base", shape)
        for number in range(arguments.rounds):
            # The order changes, so that a drift of the machine favours no one.
            for side in sorted(SIDES, reverse=bool(number % 2)):
                load_before = os.getloadavg()[0]
                run_side(side, folder, shape, arguments)
                measured = json.loads(Path(folder, f"{side}.json").read_text())
                runs[side].append(measured | {"load_average": [load_before, os.getloadavg()[0]]})
    check_same_work(runs)
    tokens = arguments.seq_len * arguments.micro_batch * arguments.accumulation
    sides = {side: summarise(measured, tokens) for side, measured in runs.items()}
    fastest = max(PEERS, key=lambda side: sides[side]["tokens_per_second"])
    against = {peer: ratios(sides[OURS], sides[peer]) for peer in PEERS}
    return {
        "model": {"model_type": "llama", **SHAPES[shape]},
        "results": sides,
        "against": against,
        "headline": {"against": fastest, **against[fastest]},
    }


def run_side(side: str, folder: str, shape: str, arguments: argparse.Namespace) -> None:
    root = Path(__file__).resolve().parents[1]
    paths = [str(root), str(root / "kernels"), str(root / "launch"), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, __file__, "--side", side, "--folder", folder, "--shape", shape]
    for option in ("steps", "seq_len", "micro_batch", "accumulation", "threads"):
        command += [f"--{option.replace('_', '-')}", str(getattr(arguments, option))]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(arguments.threads),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    subprocess.run(command, env=environment, check=True, stdout=sys.stderr)


def check_same_work(runs: dict[str, list[dict[str, Any]]]) -> None:
    expected = runs[OURS][0]["losses"]
    for side, measured in runs.items():
        for run in measured:
            worst = max(abs(a - b) for a, b in zip(run["losses"], expected, strict=True))
            same = run["trainable"] == runs[OURS][0]["trainable"] and worst <= LOSS_TOLERANCE
            if not same:
                raise SystemExit(f"not the same work: {side} {run} against {OURS} {runs[OURS][0]}")


def summarise(measured: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    seconds = [value for run in measured for value in run["seconds"]]
    cpu_seconds = [run["cpu_seconds"] / len(run["seconds"]) for run in measured]
    memory = {
        key: round(statistics.median(run["memory_mib"][key] for run in measured), 1)
        for key in measured[0]["memory_mib"]
    }
    return {
        "tokens_per_second": round(tokens / statistics.median(seconds), 1),
        "step_seconds": [[round(value, 3) for value in run["seconds"]] for run in measured],
        "cpu_seconds_per_step": round(statistics.median(cpu_seconds), 3),
        # Well below `threads`: something else held the cores, and the round says nothing about speed.
        "cores_used": [round(run["cpu_seconds"] / sum(run["seconds"]), 2) for run in measured],
        "load_average": [run["load_average"] for run in measured],
        "memory_mib": memory,
        "first_and_last_loss": [round(measured[0]["losses"][0], 4), round(measured[0]["losses"][-1], 4)],
        "trainable_parameters": measured[0]["trainable"],
    }


def ratios(ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, float]:
    def memory(key: str) -> float:
        return round(ours["memory_mib"][key] / peer["memory_mib"][key], 3)

    return {
        "tokens_per_second": round(ours["tokens_per_second"] / peer["tokens_per_second"], 3),
        # Less disturbed than elapsed time by whatever else the machine does.
        "cpu_seconds": round(peer["cpu_seconds_per_step"] / ours["cpu_seconds_per_step"], 3),
        "peak_memory": memory("peak"),
        "peak_memory_over_imports": memory("peak_over_imports"),
        "peak_memory_over_loaded_model": memory("peak_over_loaded_model"),
    }


# -- one side, in a process of its own ------------------------------------------------------------------------


def measure(side: str, folder: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds and loss of each step, memory and trainable parameters of one side."""
    import torch

    torch.set_num_threads(arguments.threads)
    num_steps = WARM_UP_STEPS + arguments.steps
    count = num_steps * arguments.accumulation * arguments.micro_batch
    blocks = torch.randint(
        0, VOCABULARY, (count, arguments.seq_len), generator=torch.Generator().manual_seed(0), dtype=torch.int64
    )
    base = str(Path(folder) / "base")
    clock = Clock(WARM_UP_STEPS)
    if side == OURS:
        losses, trainable = by_dist_cpt(base, blocks, arguments, clock)
    else:
        weights = torch.float32 if side == "trainer_autocast" else torch.bfloat16
        losses, trainable = by_trainer(base, weights, blocks, arguments, clock, folder)
    seconds = [b - a for a, b in zip(clock.ends[WARM_UP_STEPS - 1 :], clock.ends[WARM_UP_STEPS:], strict=False)]
    peak = status_mib("VmHWM")
    memory = {
        "peak": peak,
        "peak_over_imports": peak - clock.after_imports,
        "peak_over_loaded_model": peak - clock.after_model,
    }
    return {
        "seconds": seconds,
        "cpu_seconds": clock.cpu_end - clock.cpu_start,
        "losses": losses,
        "memory_mib": memory,
        "trainable": trainable,
    }


class Clock:
    """When steps ended and what memory was held before the first."""

    def __init__(self, warm_up: int) -> None:
        self.ends: list[float] = []
        self.cpu_start = self.cpu_end = self.after_imports = self.after_model = 0.0
        self._warm_up = warm_up

    def imported(self) -> None:
        self.after_imports = status_mib("VmRSS")

    def loaded(self) -> None:
        self.after_model = status_mib("VmRSS")

    def step_ended(self) -> None:
        self.ends.append(time.perf_counter())
        self.cpu_end = time.process_time()
        if len(self.ends) == self._warm_up:
            self.cpu_start = self.cpu_end


def by_dist_cpt(base: str, blocks: Any, arguments: argparse.Namespace, clock: Clock) -> tuple[list[float], int]:
    import numpy as np
    import peft  # noqa: F401  imported before the memory is read, as the peer's is
    import torch
    import transformers  # noqa: F401

    from dist_cpt.config.schema import RunConfig
    from dist_cpt.data.batch import IGNORE_INDEX, Batch
    from dist_cpt.engines.build import build_engine
    from dist_cpt.model.load import load_model
    from dist_cpt.optim.groups import param_groups

    clock.imported()
    config = RunConfig.model_validate(recipe(base, arguments))
    device = torch.device("cpu")
    model = load_model(config, device=device)
    clock.loaded()
    groups = param_groups(model.trainable, config.optim, adapter=True)
    trainable = sum(p.numel() for p in model.trainable.values())
    engine = build_engine(model.module, model.trainable, groups, model.layers, config, device)
    lrs = {group.name: group.peak_lr for group in groups}

    def batch_of(ids: torch.Tensor) -> Batch:
        size, length = ids.shape
        labels = torch.cat([ids[:, 1:], torch.full((size, 1), IGNORE_INDEX)], dim=1)
        positions = torch.arange(length).repeat(size, 1)
        borders = torch.arange(0, size * length + 1, length, dtype=torch.int32)
        counts = np.array([[size, ids.numel(), size * (length - 1)]])
        return Batch(ids, labels, positions, borders, length, size * (length - 1), counts, tuple(range(size)))

    losses = []
    for step_blocks in blocks.split(arguments.micro_batch * arguments.accumulation):
        batches = [batch_of(ids) for ids in step_blocks.split(arguments.micro_batch)]
        num_targets = sum(batch.num_targets for batch in batches)
        for number, batch in enumerate(batches):
            engine.accumulate(batch, num_targets, last=number == len(batches) - 1)
        losses.append(engine.step(lrs).read().loss)
        clock.step_ended()
    return losses, trainable


def recipe(base: str, arguments: argparse.Namespace) -> dict[str, Any]:
    tokens = arguments.seq_len * arguments.micro_batch * arguments.accumulation
    return {
        "name": "bench",
        "model": {"path": base, "weights": "bf16"},
        "adapter": {"rank": LORA_RANK, "alpha": LORA_ALPHA, "rslora": False, "targets": TARGETS},
        "embeddings": {"train": MODULES_TO_SAVE},
        "data": {"seq_len": arguments.seq_len, "sources": [{"path": "none"}]},
        "batch": {"global_tokens": tokens, "micro_batch": arguments.micro_batch},
        "train": {"tokens": tokens},
        "optim": {
            "lr": LEARNING_RATE,
            "embedding_lr": LEARNING_RATE,
            "weight_decay": WEIGHT_DECAY,
            "embedding_weight_decay": WEIGHT_DECAY,
            "max_grad_norm": 1.0,
            "betas": [0.9, 0.999],
        },
        "engine": "single",
    }


def by_trainer(
    base: str, weights: Any, blocks: Any, arguments: argparse.Namespace, clock: Clock, folder: str
) -> tuple[list[float], int]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    class Observer(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.step_ended()

    clock.imported()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=weights)
    lora = LoraConfig(
        r=LORA_RANK,
        lora_alpha=LORA_ALPHA,
        target_modules=list(TARGETS),
        modules_to_save=list(MODULES_TO_SAVE),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora)
    clock.loaded()
    losses: list[float] = []

    class Recorder(Trainer):
        """Trainer, keeping the loss of every micro-batch."""

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            losses.append(float(loss))
            return loss

    training = TrainingArguments(
        output_dir=str(Path(folder) / "trainer"),
        use_cpu=True,
        bf16=True,
        optim="adamw_torch_fused",
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        adam_beta1=0.9,
        adam_beta2=0.999,
        max_grad_norm=1.0,
        lr_scheduler_type="constant",
        per_device_train_batch_size=arguments.micro_batch,
        gradient_accumulation_steps=arguments.accumulation,
        max_steps=WARM_UP_STEPS + arguments.steps,
        train_sampling_strategy="sequential",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=0,
    )
    data = [{"input_ids": ids, "labels": ids} for ids in blocks]
    trainer = Recorder(model=model, args=training, train_dataset=data, callbacks=[Observer()])  # type: ignore[arg-type]
    trainer.train()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    per_step = arguments.accumulation
    return [sum(losses[i : i + per_step]) for i in range(0, len(losses), per_step)], trainable


# -- the machine and the base model ----------------------------------------------------------------------------


def write_base(folder: Path, shape: str) -> None:
    """A Llama folder with random weights in bf16, as released bases are."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size: dict[str, Any] = dict(SHAPES[shape])
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=4096, tie_word_embeddings=False, **size)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def status_mib(key: str) -> float:
    """A memory figure of this process in MiB: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
