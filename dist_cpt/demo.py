"""The embedded example: a corpus that every machine has, a tiny base model, and a whole run on it.

Old domain: Python's English documentation (`pydoc_data.topics`). New domain: the standard library's source
code. A tokenizer and a small Llama learn the old domain, then the base is adapted to the new one with LoRA
and its embeddings on two ranks under ZeRO-3, is stopped half way, resumes under FSDP2, and is merged. Every
step is a dist-cpt command, printed before it runs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import yaml

from dist_cpt.errors import EXIT_STOPPED, ConfigError, DataError, DistCptError, WriteError
from dist_cpt.run_folder.json_files import read_complete_rows, read_object, read_rows
from dist_cpt.run_folder.names import CERTIFICATE, EVALUATIONS, EVENTS, METRICS, REPORT

COMPARISON = "comparison.html"
VOCAB_SIZE = 2048
SEQ_LEN = 256
BASE_TOKENS = 800_000
CPT_TOKENS = 480_000
GLOBAL_TOKENS = 4096
NEW_DOMAIN_BYTES = 3_000_000
PROMPT = "def read_lines(path):\n"


def run_demo(out: Path, base_tokens: int = BASE_TOKENS, cpt_tokens: int = CPT_TOKENS) -> int:
    """Make corpus, base model, run, merged model, report.html and summary.json in `out`; return 0.

    Raises:
        DistCptError: a step ended with an unexpected exit code, or its result is wrong.
    """
    started = time.monotonic()
    _new_folder(out)
    environment = _environment()
    zero = importlib.util.find_spec("deepspeed") is not None
    first_engine = "{kind: zero, stage: 3}" if zero else "{kind: fsdp, shard: trainable}"
    if not zero:
        print("the extra 'zero' is not installed: the first half runs under FSDP2 with a replicated base instead")

    _write_corpus(out / "corpus")
    _train_tokenizer(out / "corpus" / "documentation.jsonl", out / "tokenizer")
    _write_recipe(out / "base.yaml", _base_recipe(out, base_tokens))
    _write_recipe(out / "code.yaml", _code_recipe(out, first_engine, cpt_tokens))

    print("\n== 1. a base model that knows the old domain only (full-parameter, one rank)")
    _command(environment, "launch", str(out / "base.yaml"))
    _command(environment, "merge", str(out / "runs" / "base"), "--out", str(out / "base-model"), "--dtype", "fp32")

    print(f"\n== 2. continued pretraining on the new domain: LoRA + embeddings, two ranks, {first_engine}")
    run = out / "runs" / "code"
    _stopped_after(environment, out / "code.yaml", run, cpt_tokens // GLOBAL_TOKENS // 2, ranks=2)

    print("\n== 3. the same run, resumed under another engine")
    _command(environment, "resume", str(run), "--procs-per-node", "2", "--set", "engine={kind: fsdp, shard: full}")

    print("\n== 4. what came out")
    _command(environment, "verify", str(run))
    _command(environment, "merge", str(run), "--out", str(out / "merged-model"), "--dtype", "fp32")
    # fmt: off
    _command(environment, "generate", str(out / "merged-model"), "--prompt", PROMPT, "--max-new-tokens", "60",
             "--temperature", "0.8", "--top-k", "40")
    # fmt: on
    for name in (REPORT, METRICS, CERTIFICATE):
        shutil.copyfile(run / name, out / name)

    print("\n== 5. the same seed on one rank, for a while: what another engine changes")
    other = _one_rank_recipe(out, cpt_tokens)
    _write_recipe(out / "one-rank.yaml", other)
    one_rank = out / "runs" / other["name"]
    _stopped_after(environment, out / "one-rank.yaml", one_rank, max(1, cpt_tokens // GLOBAL_TOKENS // 8), ranks=1)
    _command(environment, "report", str(run), str(one_rank), "--out", str(out / COMPARISON))
    summary = _summary(run, out, time.monotonic() - started) | _compared(run, one_rank, out)
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    _print_summary(summary, out)
    return 0


def _new_folder(out: Path) -> None:
    if out.exists() and any(out.iterdir()):
        if not (out / "code.yaml").is_file():
            raise ConfigError(f"--out {out} is not empty and not a demo folder", remedy="give a new folder")
        print(f"{out} contains an earlier demo, which is replaced")
        shutil.rmtree(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"--out {out} cannot be created: {error.strerror}") from error


def _environment() -> dict[str, str]:
    """Two ranks need two GPUs or none: with fewer than two the demo stays on the CPU."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
        if listed.count("GPU ") < 2:
            print("fewer than two GPUs: the demo runs on the CPU")
            environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def _write_corpus(folder: Path) -> None:
    """Two domains, each with a held-out part: documentation topics, and the standard library's modules."""
    from pydoc_data.topics import topics

    folder.mkdir(parents=True)
    documentation = [topics[name] for name in sorted(topics)]
    held_out = documentation[::8]
    _write_jsonl(folder / "documentation.jsonl", [text for text in documentation if text not in held_out])
    _write_jsonl(folder / "documentation-held-out.jsonl", held_out)
    sources: list[str] = []
    size = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            text = path.read_text(encoding="utf-8")
            if text.strip() and size + len(text) <= NEW_DOMAIN_BYTES:
                sources.append(text)
                size += len(text)
    if len(sources) < 20:
        raise DataError("this Python has no standard library sources to learn from", remedy="install its .py files")
    _write_jsonl(folder / "code.jsonl", [text for i, text in enumerate(sources) if i % 10])
    _write_jsonl(folder / "code-held-out.jsonl", sources[::10])
    print(f"corpus: {len(documentation)} documentation topics, {len(sources)} source files")


def _write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def _train_tokenizer(corpus: Path, folder: Path) -> None:
    """A byte-level BPE of the old domain, saved as any Hugging Face tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    texts = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    # tokenizer_config.json by hand: the demo's parent process stays free of torch and transformers.
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "model_max_length": 1_000_000,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    print(f"tokenizer: {tokenizer.get_vocab_size()} tokens, trained on the old domain")


def _base_recipe(out: Path, tokens: int) -> dict[str, Any]:
    return {
        "name": "base",
        "output_dir": str(out / "runs"),
        "model": {
            "config": {
                "model_type": "llama",
                "vocab_size": VOCAB_SIZE,
                "hidden_size": 128,
                "intermediate_size": 384,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 1024,
                "tie_word_embeddings": False,
            },
            "weights": "fp32",
        },
        "adapter": {"kind": "none"},
        "data": {
            "seq_len": SEQ_LEN,
            "tokenizer": str(out / "tokenizer"),
            "sources": [{"path": str(out / "corpus" / "documentation.jsonl")}],
            "validation": _held_out(out),
        },
        "batch": {"global_tokens": GLOBAL_TOKENS, "micro_batch": 16},
        "train": {"tokens": tokens},
        "optim": {"lr": 2.0e-3},
        "engine": "single",
        "track": {"wandb": {"mode": "disabled"}},
    }


def _code_recipe(out: Path, engine: str, tokens: int) -> dict[str, Any]:
    return {
        "name": "code",
        "output_dir": str(out / "runs"),
        # Not bf16: a CPU without instructions for it takes 76 times as long for a product.
        "model": {"path": str(out / "base-model"), "weights": "fp32"},
        "adapter": {"rank": 32, "alpha": 32},
        "embeddings": {"train": ["embed_tokens", "lm_head"]},
        "data": {
            "seq_len": SEQ_LEN,
            "sources": [
                {"path": str(out / "corpus" / "code.jsonl"), "weight": 0.9},
                {"path": str(out / "corpus" / "documentation.jsonl"), "weight": 0.1, "role": "replay"},
            ],
            "validation": _held_out(out),
        },
        "batch": {"global_tokens": GLOBAL_TOKENS, "micro_batch": 8},
        "train": {"tokens": tokens},
        "optim": {"lr": 2.0e-3, "embedding_lr": 1.0e-3},
        "engine": yaml.safe_load(engine),
        "checkpoint": {"every_steps": 40},
        "evaluate": {"every_steps": 40},
        "track": {"wandb": {"mode": "offline" if importlib.util.find_spec("wandb") else "disabled"}},
    }


def _one_rank_recipe(out: Path, tokens: int) -> dict[str, Any]:
    """The same training on one rank."""
    same = _code_recipe(out, "single", tokens)
    return same | {"name": "code-one-rank", "track": {"wandb": {"mode": "disabled"}}}


def _held_out(out: Path) -> list[dict[str, str]]:
    corpus = out / "corpus"
    return [
        {"name": "code", "path": str(corpus / "code-held-out.jsonl")},
        {"name": "documentation", "path": str(corpus / "documentation-held-out.jsonl"), "role": "retention"},
    ]


def _write_recipe(path: Path, recipe: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")


def _command(environment: dict[str, str], *arguments: str) -> None:
    print(f"\n$ dist-cpt {shlex.join(arguments)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "dist_cpt.cli", *arguments], env=environment, check=False).returncode
    if code:
        error = DistCptError(f"demo: `dist-cpt {arguments[0]}` ended with exit code {code}")
        error.exit_code = code
        raise error


def _stopped_after(environment: dict[str, str], recipe: Path, run: Path, steps: int, *, ranks: int) -> None:
    """Start the run, send SIGTERM once so many of its steps are done, and require that it saved."""
    arguments = ["launch", str(recipe), "--procs-per-node", str(ranks)]
    print(f"\n$ dist-cpt {shlex.join(arguments)}", flush=True)
    child = subprocess.Popen([sys.executable, "-m", "dist_cpt.cli", *arguments], env=environment)
    try:
        while child.poll() is None and _last_step(run) < steps:
            time.sleep(0.2)
        if child.poll() is None:
            print(f"\n$ kill -TERM {child.pid}    # after step {steps}", flush=True)
            child.send_signal(signal.SIGTERM)
        code = child.wait()
    finally:
        if child.poll() is None:
            child.terminate()
            child.wait()
    if code != EXIT_STOPPED:
        error = DistCptError(f"demo: the stopped run ended with exit code {code} instead of {EXIT_STOPPED}")
        error.exit_code = code or error.exit_code
        raise error


def _last_step(run: Path) -> int:
    rows, _ = read_complete_rows(run / METRICS)
    return rows[-1]["step"] if rows else 0


def _summary(run: Path, out: Path, seconds: float) -> dict[str, Any]:
    steps = [row["step"] for row in read_rows(run / METRICS)]
    if steps != list(range(1, len(steps) + 1)):
        raise DistCptError(f"demo: {run / METRICS} is not continuous across the stop")
    evaluations = read_rows(run / EVALUATIONS)
    domains: dict[str, Any] = {}
    for row in evaluations:
        if row["step"] in (0, steps[-1]):
            when = "before" if row["step"] == 0 else "after"
            domains.setdefault(row["name"], {"role": row["role"]})[f"perplexity_{when}"] = row["perplexity"]
    for values in domains.values():
        values["change_fraction"] = values["perplexity_after"] / values["perplexity_before"] - 1.0
    attempts = [
        {"engine": row["engine"], "world_size": row["world_size"], "first_step": row["first_step"]}
        for row in read_rows(run / EVENTS)
        if row["kind"] in ("start", "resume")
    ]
    certificate = read_object(run / CERTIFICATE)
    return {
        "domains": domains,
        "steps": steps[-1],
        "attempts": attempts,
        "certificate": certificate["verdict"],
        "seconds": round(seconds, 1),
        "report": str((out / REPORT).absolute()),
    }


def _compared(run: Path, other: Path, out: Path) -> dict[str, Any]:
    """How far the training losses of two runs of a seed are apart, over the steps that both have."""
    left, right = ({row["step"]: row["loss"] for row in read_rows(one / METRICS)} for one in (run, other))
    apart = [abs(left[step] - right[step]) for step in left.keys() & right.keys()]
    return {
        "comparison": str((out / COMPARISON).absolute()),
        "compared_steps": len(apart),
        "largest_loss_difference": max(apart, default=None),
    }


def _print_summary(summary: dict[str, Any], out: Path) -> None:
    first, second = summary["attempts"][0], summary["attempts"][-1]
    print(f"\n{summary['report']}\n")
    for name, row in summary["domains"].items():
        what = "learned" if row["role"] == "domain" else "kept or lost"
        print(
            f"{what + ':':<14}{name}: held-out perplexity {row['perplexity_before']:.1f} -> "
            f"{row['perplexity_after']:.1f} ({row['change_fraction']:+.0%})"
        )
    print(f"{'stopped:':<14}after step {second['first_step']} of {summary['steps']} under {first['engine']}")
    resumed = f"under {second['engine']} on {second['world_size']} ranks, certificate {summary['certificate']}"
    print(f"{'resumed:':<14}{resumed}")
    apart = f"loss of {summary['compared_steps']} steps at most {summary['largest_loss_difference']:.2g} apart"
    print(f"{'one rank:':<14}{apart}, {summary['comparison']}")
    print(f"{'merged:':<14}{out / 'merged-model'}, a plain Hugging Face folder")
    print(f"{'took:':<14}{summary['seconds']:.0f} s")
