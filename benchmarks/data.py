"""Text -> packed training blocks: dist-cpt's `prepare` against the usual run_clm recipe, in one run.

Same work: the same jsonl file and fast tokenizer, from raw text to blocks of seq_len tokens with one EOS per
document. Theirs: datasets.Dataset.from_json -> map(tokenize, batched) -> map(group_texts, batched), on as many
processes as there are cores. Ours: prepare (with its sha256 and fsync) -> pack. Every round starts from
nothing: no cache of either side is reused. Rounds alternate; medians are reported.

    python benchmarks/data.py [--megabytes 30] [--rounds 5] [--write]
    python benchmarks/data.py --scaling --megabytes 400     one worker on one core, two on two
    python benchmarks/data.py --memory 10 200 [--words]     peak memory by input size, and of one (at most 1 GiB)

`--words` takes words of 40 letters and a tokenizer that has a token for each: a twelfth of the tokens per byte, for
sizes that take hours otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import version
from itertools import chain, cycle
from pathlib import Path
from random import Random
from typing import Any

# kernels.py beside this file would shadow Hugging Face's package of that name.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]

SEQ_LEN = 2048
VOCABULARY = 16384
EOS = "<eos>"
LONGEST_MEGABYTES = 1074.0  # of one document: 1 GiB
NUM_PROCESSES = len(os.sched_getaffinity(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--megabytes", type=float, default=30.0, help="of text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="to benchmarks/results/")
    parser.add_argument("--scaling", action="store_true", help="one and two workers in place of the comparison")
    parser.add_argument("--memory", type=float, nargs="+", metavar="MEGABYTES", help="in place of the comparison")
    parser.add_argument("--words", action="store_true", help="of --memory: long words with a token each")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dist-cpt-bench-") as folder:
        if arguments.memory:
            result = memory(Path(folder), arguments.memory, words=arguments.words)
        elif arguments.scaling:
            result = scaling(Path(folder), arguments.megabytes, arguments.rounds)
        else:
            result = compare(Path(folder), arguments.megabytes, arguments.rounds)
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.write:
        what = "data_memory" if arguments.memory else "data"
        target = Path(__file__).parent / "results" / f"{date.today().isoformat()}_cpu_{what}.json"
        target.parent.mkdir(exist_ok=True)
        target.write_text(text + "\n")


def compare(folder: Path, megabytes: float, rounds: int) -> dict[str, Any]:
    """Time both ways `rounds` times in turn and check that they saw the same tokens."""
    import datasets

    datasets.disable_progress_bars()
    corpus, tokenizer = folder / "corpus.jsonl", folder / "tokenizer"
    num_texts, num_bytes = write_corpus(corpus, megabytes)
    train_tokenizer(tokenizer)
    load_before = os.getloadavg()
    ways: dict[str, Callable[[Path], dict[str, Any]]] = {
        "dist_cpt": lambda work: by_prepare(corpus, tokenizer, work),
        "run_clm": lambda work: by_run_clm(corpus, tokenizer, work),
    }
    for way in ways.values():  # imports, page cache; not counted
        once(way, folder / "warm-up")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    outcomes: dict[str, dict[str, Any]] = {}
    for number in range(rounds):
        # The order alternates, so that a drift of the machine favours neither.
        for name in sorted(ways, reverse=bool(number % 2)):
            taken, cpu_taken, outcomes[name] = once(ways[name], folder / f"{name}-{number}")
            seconds[name].append(taken)
            cpu[name].append(cpu_taken)
    if outcomes["dist_cpt"]["tokens"] != outcomes["run_clm"]["tokens"]:
        raise SystemExit(f"not the same work: {outcomes}")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "what": "raw jsonl text to packed blocks, dist_cpt prepare + pack against datasets.map + group_texts",
        "date": date.today().isoformat(),
        "machine": {"cores": NUM_PROCESSES, "processor": platform.machine(), "python": platform.python_version()},
        "versions": {p: version(p) for p in ("tokenizers", "transformers", "datasets", "numpy")},
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "corpus": {"texts": num_texts, "text_bytes": num_bytes, "tokens": outcomes["dist_cpt"]["tokens"]},
        "seq_len": SEQ_LEN,
        "vocabulary": VOCABULARY,
        "rounds": rounds,
        "results": {
            name: {
                **outcomes[name],
                "seconds": [round(s, 3) for s in seconds[name]],
                "cpu_seconds": [round(s, 3) for s in cpu[name]],
                "median_seconds": round(medians[name], 3),
                "tokens_per_second": round(outcomes[name]["tokens"] / medians[name]),
            }
            for name in ways
        },
        "ratio": round(medians["run_clm"] / medians["dist_cpt"], 3),
        # Less sensitive to other load than elapsed time.
        "cpu_ratio": round(statistics.median(cpu["run_clm"]) / statistics.median(cpu["dist_cpt"]), 3),
    }


def scaling(folder: Path, megabytes: float, rounds: int) -> dict[str, Any]:
    """Time one worker on one core and two on two, in turn; starting, which both do once, is measured and taken off."""
    corpus, tokenizer = folder / "corpus.jsonl", folder / "tokenizer"
    write_corpus(corpus, megabytes)
    train_tokenizer(tokenizer)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("two cores are needed")
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for number in range(rounds):
        for workers in sorted(seconds, reverse=bool(number % 2)):
            work = folder / f"{workers}-{number}"
            whole, _ = by_command(corpus, tokenizer, work, workers, cores[:workers])
            start, _ = by_command(corpus, tokenizer, work, workers, cores[:workers])  # all is there already
            seconds[workers].append(whole - start)
            shutil.rmtree(work)
    medians = {workers: statistics.median(values) for workers, values in seconds.items()}
    return {"what": "prepare, one worker on one core against two on two", "megabytes": megabytes, "rounds": rounds,
            "seconds": seconds, "speedup": round(medians[1] / medians[2], 3)}  # fmt: skip


def memory(folder: Path, sizes: list[float], *, words: bool) -> dict[str, Any]:
    """Peak memory of `prepare`: of many documents, and of one text and one line of JSON of the same size."""
    tokenizer = folder / "tokenizer"
    texts = long_words() if words else standard_library()
    train_word_tokenizer(tokenizer, texts) if words else train_tokenizer(tokenizer)
    peaks: dict[str, dict[str, float]] = {}
    seconds: dict[str, dict[str, float]] = {}
    for megabytes in sizes:
        for name in ("many.jsonl", "one.txt", "one.jsonl"):
            size = megabytes if name == "many.jsonl" else min(megabytes, LONGEST_MEGABYTES)
            corpus, parts = folder / name, repeated(texts, size)
            with corpus.open("w", encoding="utf-8") as file:
                if name == "many.jsonl":
                    file.writelines(json.dumps({"text": text}) + "\n" for text in parts)
                elif name == "one.txt":
                    file.writelines(parts)
                else:
                    file.write('{"text": "')
                    file.writelines(json.dumps(text)[1:-1] for text in parts)
                    file.write('"}\n')
            taken, peak = by_command(corpus, tokenizer, folder / "work", 1, sorted(os.sched_getaffinity(0)))
            peaks.setdefault(name, {})[f"{size:g} MB"] = round(peak)
            seconds.setdefault(name, {})[f"{size:g} MB"] = round(taken, 1)
            print(f"{name} of {size:g} MB: {peak:.0f} MiB, {taken:.0f} s", file=sys.stderr, flush=True)
            shutil.rmtree(folder / "work")
            corpus.unlink()
    return {
        "what": "peak resident MiB of prepare",
        "text": "words of 40 letters, a token each" if words else "Python's standard library, byte-level BPE",
        "peaks": peaks,
        "seconds": seconds,
        "largest_to_smallest": {name: round(max(row.values()) / min(row.values()), 3) for name, row in peaks.items()},
    }


def long_words() -> list[str]:
    """200 texts of 250 words each."""
    random = Random(0)
    words = ["".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=40)) for _ in range(5000)]
    return [" ".join(random.choices(words, k=250)) + "\n" for _ in range(200)]


def train_word_tokenizer(folder: Path, texts: list[str]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for text in texts for word in text.split()})
    backend = Tokenizer(models.WordLevel({EOS: 0} | {word: 1 + n for n, word in enumerate(words)}, unk_token=EOS))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, model_max_length=10**9).save_pretrained(folder)


def by_command(corpus: Path, tokenizer: Path, work: Path, workers: int, cores: list[int]) -> tuple[float, float]:
    """Seconds and peak resident MiB, of the largest process, of one `dist-cpt prepare` on these cores."""
    recipe = corpus.with_suffix(".yaml")
    recipe.write_text(json.dumps(recipe_values(corpus, tokenizer, work)))
    command = [sys.executable, "-m", "dist_cpt.cli", "prepare", str(recipe), "--json", "--workers", str(workers)]
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, preexec_fn=lambda: os.sched_setaffinity(0, cores), cwd=corpus.parent
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"prepare ended with status {status}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def once(way: Callable[[Path], dict[str, Any]], work: Path) -> tuple[float, float, dict[str, Any]]:
    """Elapsed and CPU seconds of one preparation in a temporary folder, and its result."""
    work.mkdir()
    start, cpu_start = time.perf_counter(), cpu_seconds()
    result = way(work)
    taken, cpu_taken = time.perf_counter() - start, cpu_seconds() - cpu_start
    shutil.rmtree(work)
    return taken, cpu_taken, result


def cpu_seconds() -> float:
    """CPU time of this process and its finished children."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def by_prepare(corpus: Path, tokenizer: Path, work: Path) -> dict[str, Any]:
    from dist_cpt.config.resolve import resolve_paths
    from dist_cpt.config.schema import RunConfig
    from dist_cpt.data.packing import pack
    from dist_cpt.data.prepare import prepare

    os.environ.pop("TOKENIZERS_PARALLELISM", None)
    config = RunConfig.model_validate(recipe_values(corpus, tokenizer, work))
    store = prepare(resolve_paths(config)).sources[0].store
    plan = pack(store.lengths, SEQ_LEN)
    return {
        "documents": store.num_documents,
        "tokens": store.num_tokens,
        "blocks": plan.num_blocks,
        "tokens_in_blocks": plan.num_tokens,
    }


def recipe_values(corpus: Path, tokenizer: Path, work: Path) -> dict[str, Any]:
    return {
        "name": "bench",
        "output_dir": str(work / "runs"),
        "model": {"config": {"model_type": "llama"}},
        "adapter": {"kind": "none"},
        "data": {
            "seq_len": SEQ_LEN,
            "tokenizer": str(tokenizer),
            "cache_dir": str(work),
            "sources": [{"path": str(corpus)}],
        },
        "batch": {"global_tokens": SEQ_LEN},
        "train": {"tokens": SEQ_LEN},
    }


def by_run_clm(corpus: Path, tokenizer: Path, work: Path) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoTokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as transformers recommends when num_proc forks
    fast = AutoTokenizer.from_pretrained(tokenizer)

    def tokenize(batch: dict[str, list[str]]) -> Any:
        return fast([text + EOS for text in batch["text"]])

    def group_texts(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        flat = {key: list(chain(*rows)) for key, rows in batch.items()}
        total = len(flat["input_ids"]) // SEQ_LEN * SEQ_LEN
        blocks = {key: [row[i : i + SEQ_LEN] for i in range(0, total, SEQ_LEN)] for key, row in flat.items()}
        blocks["labels"] = blocks["input_ids"].copy()
        return blocks

    raw = Dataset.from_json(str(corpus), cache_dir=str(work / "arrow"))
    assert isinstance(raw, Dataset)
    options: dict[str, Any] = {"batched": True, "num_proc": NUM_PROCESSES, "load_from_cache_file": False}
    tokenized = raw.map(tokenize, remove_columns=raw.column_names, **options)
    grouped = tokenized.map(group_texts, **options)
    # Counted without decoding the columns: the lengths of the lists are their Arrow offsets.
    return {
        "documents": raw.num_rows,
        "tokens": arrow_values(tokenized),
        "blocks": grouped.num_rows,
        "tokens_in_blocks": grouped.num_rows * SEQ_LEN,
    }


def arrow_values(dataset: Any) -> int:
    """Number of token ids in a dataset."""
    import pyarrow.compute as pc

    return pc.sum(pc.list_value_length(dataset.data.column("input_ids"))).as_py()  # pyright: ignore


def standard_library() -> list[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [f for f in sorted(root.rglob("*.py")) if not {"site-packages", "test", "tests"} & set(f.parts)]
    texts = [f.read_text(encoding="utf-8", errors="ignore") for f in files]
    return [t for t in texts if t.strip() and EOS not in t and "\x00" not in t]


def write_corpus(path: Path, megabytes: float) -> tuple[int, int]:
    """Write the standard library's files, repeated, as jsonl; returns the number of texts and their bytes."""
    num_texts = num_bytes = 0
    with path.open("w", encoding="utf-8") as file:
        for text in repeated(standard_library(), megabytes):
            file.write(json.dumps({"text": text}) + "\n")
            num_texts += 1
            num_bytes += len(text.encode("utf-8"))
    return num_texts, num_bytes


def repeated(texts: list[str], megabytes: float) -> Iterator[str]:
    """The texts over and over, until they are so long."""
    num_bytes = 0
    for text in cycle(texts):
        if num_bytes >= megabytes * 1e6:
            return
        yield text
        num_bytes += len(text.encode("utf-8"))


def train_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    backend.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(standard_library(), trainer)
    # An explicit length: run_clm's tokenizer warns of texts longer than the model otherwise.
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, model_max_length=10**9).save_pretrained(folder)


if __name__ == "__main__":
    main()
