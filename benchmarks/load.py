"""Starting on a base: dist-cpt's loading by slices beside `from_pretrained` on every rank and `fully_shard`.

A Llama in bf16 on the disk, LoRA on all of its maps in our ways, gloo ranks that are forked with everything imported.
Per way and number of ranks: seconds until the model is sharded (ours checks fused modules too), GiB/s of the base, and
by how much a rank's resident memory grew at most, mapped files included. Ways take turns within a round, so that ratios
are of the same minutes; the files are in the page cache.

    python benchmarks/load.py [--rounds 2] [--ranks 1 2 4] [--write]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

# kernels.py beside this file would shadow Hugging Face's package of that name.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

MODEL = {
    "vocab_size": 2048,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
ENGINES: dict[str, dict[str, Any]] = {
    "fsdp-full": {"kind": "fsdp", "shard": "full"},
    "fsdp-hybrid": {"kind": "fsdp", "shard": "hybrid", "dp_shard": 2},
    "zero-3": {"kind": "zero", "stage": 3},
}
BASELINE = "from_pretrained"
M_MMAP_THRESHOLD = -3  # malloc.h


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--write", action="store_true", help="to benchmarks/results/")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    import_everything()
    with tempfile.TemporaryDirectory(prefix="dist-cpt-bench-") as folder:
        base = folder + "/base"
        child(save_base, base)
        num_bytes = Path(base, "model.safetensors").stat().st_size
        rows = [row(base, num_bytes, ranks, arguments.rounds) for ranks in arguments.ranks]
    result = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, shared with other work",
        "torch": version("torch"),
        "base_mib": round(num_bytes / 2**20),
        "rounds": arguments.rounds,
        "by_ranks": dict(zip(arguments.ranks, rows, strict=True)),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.write:
        target = Path(__file__).parent / "results" / f"{date.today().isoformat()}_cpu_load.json"
        target.write_text(text + "\n")


def import_everything() -> None:
    """In the parent, once: neither side's time has it."""
    import deepspeed  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import dist_cpt.engines.fsdp2
    import dist_cpt.engines.zero
    import dist_cpt.model.load  # noqa: F401


def save_base(base: str) -> None:
    """Write random weights in bf16, one file."""
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**MODEL)).to(torch.bfloat16).save_pretrained(base, max_shard_size="100GB")


def row(base: str, num_bytes: int, ranks: int, rounds: int) -> dict[str, Any]:
    """The median of each way on `ranks`: seconds of the slowest rank, and the largest growth of a rank."""
    ways = [BASELINE, *(name for name in ENGINES if name != "fsdp-hybrid" or ranks > 1)]
    found: dict[str, list[tuple[float, int]]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            found[way].append(measured(base, way, ranks))
    result: dict[str, Any] = {}
    for way, measurements in found.items():
        seconds = statistics.median(seconds for seconds, _ in measurements)
        result[way] = {
            "seconds": round(seconds, 2),
            "gib_per_second": round(num_bytes / 2**30 / seconds, 3),
            "peak_mib_per_rank": round(max(grown for _, grown in measurements) / 2**20),
        }
    return result


def measured(base: str, way: str, ranks: int) -> tuple[float, int]:
    """(seconds of the slowest rank, bytes of the largest growth of one)."""
    with tempfile.TemporaryDirectory(prefix="dist-cpt-bench-") as folder:
        results = multiprocessing.get_context("fork").SimpleQueue()
        processes = [
            multiprocessing.get_context("fork").Process(target=one_rank, args=(base, way, rank, ranks, folder, results))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert all(process.exitcode == 0 for process in processes), f"{way} on {ranks} ranks failed"
        found = [results.get() for _ in processes]
    return max(seconds for seconds, _ in found), max(grown for _, grown in found)


def child(function: Any, *args: Any) -> None:
    """Run in a process of its own, so that the parent starts no threads and keeps no memory."""
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    process.join()
    assert process.exitcode == 0


def one_rank(base: str, way: str, rank: int, ranks: int, folder: str, results: Any) -> None:
    """Load and shard as one rank of a gloo group that meets over a file."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 2**16)  # so that what malloc keeps is not counted
    libc.malloc_trim(0)
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now
    before, start = memory_of_process("VmRSS"), time.perf_counter()
    kept = pretrained(base) if way == BASELINE else ours(base, ENGINES[way])
    dist.barrier()
    results.put((time.perf_counter() - start, memory_of_process("VmHWM") - before))
    del kept


def pretrained(base: str) -> Any:
    """transformers' model on every rank, then FSDP2 layer by layer."""
    from torch.distributed.fsdp import fully_shard
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    for part in (*model.model.layers, model):
        fully_shard(part)
    return model


def ours(base: str, engine: dict[str, Any]) -> Any:
    """The model and engine of a recipe, without data."""
    from dist_cpt.config.schema import RunConfig
    from dist_cpt.engines.build import build_engine
    from dist_cpt.model.load import load_model
    from dist_cpt.optim.groups import param_groups

    values = {
        "name": "load",
        "model": {"path": base, "weights": "bf16"},
        "adapter": {"kind": "lora", "rank": 8},
        "data": {"seq_len": 128, "sources": [{"path": "none.jsonl"}]},
        "batch": {"global_tokens": 4096},
        "train": {"tokens": 4096},
        "engine": engine,
    }
    config, device = RunConfig.model_validate(values), torch.device("cpu")
    model = load_model(config, device=device, by_slices=True)
    groups = param_groups(model.trainable, config.optim, True)
    return build_engine(model.module, model.trainable, groups, model.layers, config, device, model.unread)


def memory_of_process(field: str) -> int:
    """Of /proc/self/status."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024


if __name__ == "__main__":
    main()
