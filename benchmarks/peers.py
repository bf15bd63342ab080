"""A training step on the CPU: dist-cpt's single engine beside Hugging Face Trainer + PEFT, TRL and Unsloth, in one run.

Same work: one Llama folder with random bf16 weights, the same token blocks of seq_len (one document each, so that
attention costs both sides the same), micro-batch, accumulation, LoRA targets and rank, both vocabulary matrices
trained, AdamW, clipping, a constant learning rate; no recomputation of activations, no evaluation, no saving. The
losses of all steps are compared before anything is reported. Every side runs in a fresh process per round, so
that its peak memory is its own; the order of the sides changes from round to round. tokens/s is over the time
from the end of one optimizer step to the end of the next, data loading included; the time to the first step is from
the start of the process. Trained in full at 1e-5, the vocabulary matrices also show which of their weights updates of
that size move.

TRL and Unsloth get an environment each, made once in `--environments` by pip with the versions below; torch and what
they do not replace are those of this environment. What cannot be installed or does not train is named and left out.

    python benchmarks/peers.py [--peers trl unsloth] [--shape all] [--rounds 3] [--steps 8] [--write]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

# Beside this file lies kernels.py: on the path it would be taken for Hugging Face's package of that name.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]

WARM_UP_STEPS = 2
LEARNING_RATE = 1e-5  # of everything, since Trainer has one; what the recipes of others give the vocabulary
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
    "trl": "SFTTrainer with the settings of trainer_bf16",
    "unsloth": "FastLanguageModel and UnslothTrainer in bf16, the vocabulary matrices in modules_to_save",
}
OURS = "dist_cpt"
PEERS = tuple(side for side in SIDES if side != OURS)
# What pip installs for a side over this environment, in this order; the others run in this environment.
PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl", "unsloth", "unsloth_zoo", "datasets")
REQUIREMENTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "trl": (("trl==1.16.0",),),
    "unsloth": (
        (
            *("transformers==5.17.0", "trl==1.15.0", "datasets==4.8.5", "huggingface_hub<3", "torchao==0.18.0"),
            *("pillow", "kernels", "tyro"),
        ),
        ("--no-deps", "unsloth==2026.10.9", "unsloth_zoo"),  # their own pins exclude this torch
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help=f"timed, after {WARM_UP_STEPS} of warm-up")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS)
    parser.add_argument("--environments", type=Path, default=Path.home() / ".cache/dist-cpt/peers")
    parser.add_argument("--write", action="store_true", help="to benchmarks/results/")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # one measurement, in this process
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        measured = measure(arguments.side, arguments.folder, arguments)
        Path(arguments.folder, f"{arguments.side}.json").write_text(json.dumps(measured))
        return
    names = list(SHAPES) if arguments.shape == "all" else [arguments.shape]
    load_before = os.getloadavg()
    left_out: dict[str, str] = {}
    pythons = {OURS: sys.executable}
    for peer in arguments.peers:
        try:
            pythons[peer] = environment(peer, arguments.environments)
        except subprocess.CalledProcessError as error:
            left_out[peer] = f"its environment cannot be made: {error.stderr.decode()[-500:]}"
    shapes = {name: compare(name, arguments, pythons, left_out) for name in names}
    result = {
        "what": "one LoRA + vocabulary training step, dist_cpt single engine beside peers",
        "date": date.today().isoformat(),
        "machine": {"cores": len(os.sched_getaffinity(0)), "processor": cpu_model(), "threads": arguments.threads},
        "python": platform.python_version(),
        "versions": {side: versions(python) for side, python in pythons.items()},
        "left_out": left_out,
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
        target = Path(__file__).parent / "results" / f"{date.today().isoformat()}_cpu_peers.json"
        target.parent.mkdir(exist_ok=True)
        target.write_text(text + "\n")


def environment(side: str, folder: Path) -> str:
    """The interpreter of a side: this one, or of an environment that is made here unless an earlier run has."""
    if side not in REQUIREMENTS:
        return sys.executable
    place, done = folder / side, folder / side / "installed.json"
    python = str(place / "bin/python")
    if done.is_file() and json.loads(done.read_text()) == json.loads(json.dumps(REQUIREMENTS[side])):
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(place)], check=True)
    (site,) = place.glob("lib/python*/site-packages")
    (site / "z_inherited.pth").write_text(f"{sysconfig.get_path('purelib')}\n")  # after its own packages
    for requirements in REQUIREMENTS[side]:
        command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", *requirements]
        subprocess.run(command, check=True, stdout=sys.stderr, stderr=subprocess.PIPE)
    done.write_text(json.dumps(REQUIREMENTS[side]))
    return python


def versions(python: str) -> dict[str, str]:
    """Of the packages that an environment computes with."""
    read = (
        "import importlib.metadata as m, json, sys; "
        "print(json.dumps({d.metadata['Name']: d.version for d in reversed(list(m.distributions()))}))"
    )
    found = json.loads(subprocess.run([python, "-c", read], check=True, capture_output=True).stdout)
    return {name: found[name] for name in PACKAGES if name in found}


def compare(
    shape: str, arguments: argparse.Namespace, pythons: dict[str, str], left_out: dict[str, str]
) -> dict[str, Any]:
    """Measure every side of one shape in turn, `rounds` times, and check that their losses agree.

    A peer that does not train goes from `pythons` to `left_out`.
    """
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in pythons}
    with tempfile.TemporaryDirectory(prefix="dist-cpt-bench-") as folder:
        write_base(Path(folder) / "base", shape)
        for number in range(arguments.rounds):
            # The order changes, so that a drift of the machine favours no one.
            for side in sorted(pythons, reverse=bool(number % 2)):
                load_before = os.getloadavg()[0]
                try:
                    run_side(side, pythons[side], folder, shape, arguments)
                except subprocess.CalledProcessError as error:
                    if side == OURS:
                        raise
                    left_out[side] = f"it does not train: {error}; its messages are above"
                    del pythons[side], runs[side]
                    continue
                measured = json.loads(Path(folder, f"{side}.json").read_text())
                runs[side].append(measured | {"load_average": [load_before, os.getloadavg()[0]]})
    check_same_work(runs)
    tokens = arguments.seq_len * arguments.micro_batch * arguments.accumulation
    sides = {side: summarise(measured, tokens) for side, measured in runs.items()}
    peers = [side for side in sides if side != OURS]
    against = {peer: ratios(sides[OURS], sides[peer]) for peer in peers}
    fastest = max(peers, key=lambda side: sides[side]["tokens_per_second"], default=None)
    return {
        "model": {"model_type": "llama", **SHAPES[shape]},
        "results": sides,
        "against": against,
        "headline": {"against": fastest, **against[fastest]} if fastest else None,
    }


def run_side(side: str, python: str, folder: str, shape: str, arguments: argparse.Namespace) -> None:
    root = Path(__file__).resolve().parents[1]
    ours = [str(root), str(root / "kernels"), str(root / "launch")] if side == OURS else []
    paths = [*ours, os.environ.get("PYTHONPATH", "")]
    command = [python, __file__, "--side", side, "--folder", folder, "--shape", shape, "--started", str(time.time())]
    for option in ("steps", "seq_len", "micro_batch", "accumulation", "threads"):
        command += [f"--{option.replace('_', '-')}", str(getattr(arguments, option))]
    settings = os.environ | {
        "OMP_NUM_THREADS": str(arguments.threads),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    subprocess.run(command, env=settings, check=True, stdout=sys.stderr, cwd=folder)


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
        "seconds_to_first_step": round(statistics.median(run["seconds_to_first_step"] for run in measured), 1),
        "fraction_moved": measured[0]["fraction_moved"],
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
        losses, trained = by_dist_cpt(base, blocks, arguments, clock)
    else:
        losses, trained = by_trainer(side, base, blocks, arguments, clock, folder)
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
        "trainable": sum(tensor.numel() for tensor in trained.values()),
        "seconds_to_first_step": clock.first_step - arguments.started,
        "fraction_moved": moved(base, trained, blocks),
    }


def moved(base: str, trained: dict[str, Any], blocks: Any) -> dict[str, float]:
    """How many weights of the vocabulary matrices differ from the base's: of the head, and of rows that were read."""
    import torch
    from safetensors.torch import load_file

    before = load_file(Path(base) / "model.safetensors")
    fractions = {}
    for name, key in (("lm_head", "lm_head.weight"), ("embed_tokens", "model.embed_tokens.weight")):
        (after,) = (tensor for path, tensor in trained.items() if f"{name}." in path and "lora" not in path)
        changed = after.detach().float() != before[key].float()
        rows = blocks.unique() if name == "embed_tokens" else torch.arange(len(changed))
        fractions[name] = round(float(changed[rows].float().mean()), 5)
    return fractions


class Clock:
    """When steps ended and what memory was held before the first."""

    def __init__(self, warm_up: int) -> None:
        self.ends: list[float] = []
        self.first_step = 0.0
        self.cpu_start = self.cpu_end = self.after_imports = self.after_model = 0.0
        self._warm_up = warm_up

    def imported(self) -> None:
        self.after_imports = status_mib("VmRSS")

    def loaded(self) -> None:
        self.after_model = status_mib("VmRSS")

    def step_ended(self) -> None:
        self.first_step = self.first_step or time.time()
        self.ends.append(time.perf_counter())
        self.cpu_end = time.process_time()
        if len(self.ends) == self._warm_up:
            self.cpu_start = self.cpu_end


Trained = dict[str, Any]  # the trainable tensors by name, as they are in the end


def by_dist_cpt(base: str, blocks: Any, arguments: argparse.Namespace, clock: Clock) -> tuple[list[float], Trained]:
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
    return losses, dict(engine._adam.masters)


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
    side: str, base: str, blocks: Any, arguments: argparse.Namespace, clock: Clock, folder: str
) -> tuple[list[float], Trained]:
    """Trainer, or what a peer has in its place."""
    options: dict[str, Any] = {}
    if side == "unsloth":
        import unsloth  # first: it changes what is imported after it
        from unsloth import UnslothTrainer as Base
        from unsloth import UnslothTrainingArguments as Arguments
    elif side == "trl":
        from trl import SFTConfig as Arguments
        from trl import SFTTrainer as Base
    else:
        from transformers import Trainer as Base
        from transformers import TrainingArguments as Arguments
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    class Observer(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.step_ended()

    clock.imported()
    dtype = torch.float32 if side == "trainer_autocast" else torch.bfloat16
    lora = {"r": LORA_RANK, "lora_alpha": LORA_ALPHA, "target_modules": list(TARGETS)}
    if side == "unsloth":
        load = unsloth.FastLanguageModel
        model, _ = load.from_pretrained(base, max_seq_length=arguments.seq_len, dtype=dtype, load_in_4bit=False)
        lora |= {"target_modules": [*TARGETS, *MODULES_TO_SAVE], "lora_dropout": 0, "bias": "none"}
        model = load.get_peft_model(model, **lora, use_gradient_checkpointing=False)
    else:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        lora |= {"modules_to_save": list(MODULES_TO_SAVE), "task_type": "CAUSAL_LM"}
        model = get_peft_model(model, LoraConfig(**lora))
    clock.loaded()
    if side in REQUIREMENTS:  # both are SFTTrainers
        options = {"gradient_checkpointing": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
        options |= {"max_length": arguments.seq_len, "packing": False}
    losses: list[float] = []

    class Recorder(Base):
        """Keeps the loss of every micro-batch."""

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            losses.append(float(loss))
            return loss

    training = Arguments(
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
        **options,
    )
    data: Any = [{"input_ids": ids, "labels": ids} for ids in blocks]
    given: dict[str, Any] = {}
    if side in REQUIREMENTS:
        from datasets import Dataset

        rows = [ids.tolist() for ids in blocks]
        data = Dataset.from_dict({"input_ids": rows, "labels": rows})
        given["processing_class"] = AutoTokenizer.from_pretrained(base)
    trainer: Any = Recorder(model=model, args=training, train_dataset=data, callbacks=[Observer()], **given)
    trainer.train()
    per_step = arguments.accumulation
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    return [sum(losses[i : i + per_step]) for i in range(0, len(losses), per_step)], trained


# -- the machine and the base model ----------------------------------------------------------------------------


def write_base(folder: Path, shape: str) -> None:
    """A Llama folder with random weights in bf16, as released bases are."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size: dict[str, Any] = dict(SHAPES[shape])
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=4096, tie_word_embeddings=False, **size)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    # The blocks are ids already, but some peers want a tokenizer.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, "<eos>"])}
    Tokenizer(models.BPE(vocabulary, [])).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "pad_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def status_mib(key: str) -> float:
    """A memory figure of this process in MiB: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
