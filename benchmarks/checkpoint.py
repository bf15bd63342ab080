"""Saving and resuming on the CPU: dist-cpt against torch.distributed.checkpoint and deepspeed, on the same state.

Two ranks over gloo train all parameters of a Llama, masters and moments sharded. Each round saves them in every way,
in alternating order, to a new folder on the same disk. Ours hashes every tensor, forces every file to the disk and
reads it back before it is published; the others do not. `lost_seconds` is the stall plus the slowdown of the steps
during a save. Also measured: bytes per trainable parameter, and the time from opening a checkpoint to the end of the
next step at two positions of the data stream.

`scale` is the same state on 1, 2, 4 and 8 ranks behind a file layer (slow_files.c) that gives each thread a bandwidth,
so that two cores show what ranks on nodes of their own would do; `efficiency` is the time of one rank, over the ranks
times theirs.

    python benchmarks/checkpoint.py [--rounds 5] [--only scale] [--folder DIR] [--write]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

# kernels.py beside this file would shadow Hugging Face's package of that name.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]
sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "kernels", "launch")]

RANKS = 2
VOCABULARY, SEQ_LEN = 8192, 128
MODEL = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
}
POSITIONS = (1_000, 1_000_000_000)
WAYS = {
    "ours": "checkpoint/save.py: fp32 safetensors, sha256 of every tensor, fsync, read back, manifest, rename",
    "ours_beside": "the same from a snapshot in host memory, on a thread beside training; the stall is the snapshot",
    "dcp": "torch.distributed.checkpoint.save of the same tensors as DTensors",
    "dcp_threads": "dcp with 8 threads per rank, each with its own file; ours writes 8 tensors or fewer at a time",
    "dcp_async": "torch.distributed.checkpoint.async_save of them; the stall is until it returns",
    "deepspeed": "engine.save_checkpoint of the same state under ZeRO-3",
    "ours_zero": "ours under ZeRO-3",
}
SCALE_RANKS = (1, 2, 4, 8)
PRELOAD = ("torch", "torch.distributed.fsdp", "torch.distributed.checkpoint", "transformers.models.llama", "deepspeed")
SCALE_MODEL = MODEL | {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "vocab_size": 2048}
MICROSECONDS_PER_MIB = 800_000  # of one thread's reads and writes: slow enough for the cores' own work to count little


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("saves", "scale"), default=None, help="one part of it")
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure; default: a temporary one")
    parser.add_argument("--write", action="store_true", help="to benchmarks/results/")
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory(prefix="dist-cpt-bench-", dir=arguments.folder) as folder:
        load_before = os.getloadavg()
        result: dict[str, Any] = {
            "what": "saving and resuming one training state over gloo on one host",
            "date": date.today().isoformat(),
            "machine": {"cores": len(os.sched_getaffinity(0)), "threads_per_rank": 1},
            "versions": {"python": platform.python_version()} | {p: version(p) for p in ("torch", "deepspeed")},
            "ways": WAYS,
        }
        if arguments.only != "scale":
            saves = on_ranks("measure_saves", Path(folder), arguments.rounds)
            result |= {
                "saves": saves,
                "ratios": ratios(saves),
                "bytes_per_trainable_parameter": in_a_process(measure_bytes, Path(folder)),
                "resume": in_a_process(measure_resume, Path(folder), arguments.rounds),
            }
        if arguments.only != "saves":
            result["scale"] = measure_scale(Path(folder), arguments.rounds)
        result["load_average"] = {"before": load_before, "after": os.getloadavg()}
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.write:
        part = "" if arguments.only is None else f"_{arguments.only}"
        target = Path(__file__).parent / "results" / f"{date.today().isoformat()}_cpu_checkpoint{part}.json"
        target.write_text(text + "\n")


def ratios(saves: dict[str, Any]) -> dict[str, float]:
    """Ours over theirs, and asynchronous over synchronous; below 1 is less time."""
    wall = {way: of["seconds"]["median"] for way, of in saves["ways"].items()}
    stall = {way: of["stall_seconds"]["median"] for way, of in saves["ways"].items()}
    lost = {way: of["lost_seconds"]["median"] for way, of in saves["ways"].items()}
    return {
        "stall_beside_over_now": stall["ours_beside"] / stall["ours"],
        "lost_beside_over_now": lost["ours_beside"] / lost["ours"],
        "dcp_stall_async_over_sync": stall["dcp_async"] / stall["dcp"],
        "ours_over_dcp": wall["ours"] / wall["dcp"],
        "ours_beside_over_dcp_async_stall": stall["ours_beside"] / stall["dcp_async"],
        "ours_beside_over_dcp_async_lost": lost["ours_beside"] / lost["dcp_async"],
        "ours_over_deepspeed": wall["ours_zero"] / wall["deepspeed"],
    }


def measure_saves(folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds of every way, of the slowest rank; collective, rank 0's result is reported."""
    import torch.distributed as dist

    from dist_cpt.checkpoint.background import BackgroundSave
    from dist_cpt.runtime.collectives import all_reduce_max_int

    fsdp, zero = trained({"kind": "fsdp", "shard": "full"}), trained({"kind": "zero", "stage": 3})
    background = BackgroundSave(600.0)
    group = dist.new_group(backend="gloo")
    ways: dict[str, Callable[[Path], Any]] = {
        "ours": lambda path: save(fsdp, path),
        "ours_beside": lambda path: start_beside(fsdp, path, background),
        "dcp": lambda path: dcp_save(fsdp, path, None),
        "dcp_threads": lambda path: dcp_save(fsdp, path, None, threads=8),
        "dcp_async": lambda path: dcp_save(fsdp, path, group),
        "deepspeed": lambda path: zero.engine._engine.save_checkpoint(str(path), tag="x"),
        "ours_zero": lambda path: save(zero, path),
    }
    found: dict[str, dict[str, list[float]]] = {way: {} for way in ways}
    step_seconds: list[float] = []
    for number in range(-1, rounds):
        for way in sorted(ways, reverse=bool(number % 2)):
            path = folder / f"{way}-{number}"
            quiet = timed_steps(fsdp, 3)
            begun = time.perf_counter()
            pending = ways[way](path)
            stall = time.perf_counter() - begun
            beside: list[float] = []
            while callable(pending) and not pending():
                beside += timed_steps(fsdp, 1)
            slower = sum(seconds - statistics.median(quiet) for seconds in beside)
            row = {
                "seconds": time.perf_counter() - begun,
                "stall_seconds": stall,
                "lost_seconds": stall + max(0.0, slower),
                "mib": folder_bytes(path) / 2**20,
            }
            barrier()
            shutil.rmtree(path, ignore_errors=True)
            if number >= 0:  # the first round warms up
                step_seconds += quiet
                for key, value in row.items():
                    slowest = all_reduce_max_int(round(value * 1e6)) / 1e6
                    found[way].setdefault(key, []).append(slowest)
    summary = {way: {key: spread(values) for key, values in rows.items()} for way, rows in found.items()}
    return {"trainable_parameters": fsdp.num_parameters, "step_seconds": spread(step_seconds), "ways": summary}


def measure_scale(folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds of a save and a load by number of ranks behind the slow file layer, and what follows from them."""
    layer, slow = folder / "slow_files.so", folder / "slow"
    source = Path(__file__).with_name("slow_files.c")
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", str(layer), str(source), "-ldl"], check=True)
    slow.mkdir()
    os.environ |= {"SLOW_FILES_UNDER": str(slow), "SLOW_FILES_US_PER_MIB": str(MICROSECONDS_PER_MIB)}
    os.environ["LD_PRELOAD"] = str(layer)
    seconds = {}
    for ranks in SCALE_RANKS:
        seconds[ranks] = on_ranks("measure_slow_files", slow, rounds, ranks, start="forkserver")
        print(ranks, json.dumps(seconds[ranks]), file=sys.stderr, flush=True)
    del os.environ["LD_PRELOAD"]
    median = {ranks: {way: spread["median"] for way, spread in ways.items()} for ranks, ways in seconds.items()}
    first = median[1]
    return {
        "microseconds_per_mib": MICROSECONDS_PER_MIB,
        "seconds": seconds,
        "efficiency": {n: {way: first[way] / (n * of[way]) for way in of if way in first} for n, of in median.items()},
        "ours_over_dcp": {
            n: {w: of[f"ours_{w}"] / of[f"dcp_{w}"] for w in ("save", "load")} for n, of in median.items()
        },
        "ours_over_dcp_threads": {n: of["ours_save"] / of["dcp_threads_save"] for n, of in median.items()},
        "ours_over_deepspeed": {
            n: {w: of[f"ours_zero_{w}"] / of[f"deepspeed_{w}"] for w in ("save", "load")}
            for n, of in median.items()
            if "deepspeed_save" in of
        },
    }


def measure_slow_files(folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of the slowest rank: each way's save, and its load into the same engine. Collective."""
    import torch.distributed as dist

    from dist_cpt.runtime.collectives import all_reduce_max_int

    model = {"config": SCALE_MODEL, "weights": "bf16"}
    fsdp = trained({"kind": "fsdp", "shard": "full"}, model=model)
    ways: dict[str, tuple[Callable[[Path], Any], ...]] = {
        "ours": (lambda path: save(fsdp, path), lambda path: load_ours(fsdp, path)),
        "dcp": (lambda path: dcp_save(fsdp, path, None), lambda path: dcp_load(fsdp, path)),
        "dcp_threads": (lambda path: dcp_save(fsdp, path, None, threads=8),),  # its load is that of dcp
    }
    if dist.get_world_size() > 1:
        zero = trained({"kind": "zero", "stage": 3}, model=model)
        engine = zero.engine._engine
        ways["ours_zero"] = (lambda path: save(zero, path), lambda path: load_ours(zero, path))
        ways["deepspeed"] = (
            lambda path: engine.save_checkpoint(str(path), tag="x"),
            lambda path: engine.load_checkpoint(str(path), tag="x"),
        )
    found: dict[str, list[float]] = {}
    for way, functions in ways.items():  # outside of the slow folder: what only a first time costs
        path = folder.with_name(f"first-{way}-{dist.get_world_size()}")
        for function in functions:
            barrier()
            function(path)
    for number in range(rounds):
        for way in sorted(ways, reverse=bool(number % 2)):
            path = folder / f"{way}-{number}"
            for what, function in zip(("save", "load"), ways[way], strict=False):
                barrier()
                begun = time.perf_counter()
                function(path)
                slowest = all_reduce_max_int(round((time.perf_counter() - begun) * 1e6)) / 1e6
                found.setdefault(f"{way}_{what}", []).append(slowest)
            shutil.rmtree(path, ignore_errors=True)
    return {way: spread(values) for way, values in found.items()}


def load_ours(built: Trained, path: Path) -> None:
    """As a resume: every byte verified, restored, exported again and compared with the manifest."""
    from dist_cpt.checkpoint.certificate import ReplayedLoss, certify
    from dist_cpt.checkpoint.load import load, newest_valid
    from dist_cpt.checkpoint.plan_files import owners
    from dist_cpt.runtime.collectives import world_size

    found, _ = newest_valid(path)
    assert found is not None
    placed = owners(built.specs, world_size(), adapter=False)
    with load(found, verified=True) as checkpoint:
        order = checkpoint.reading_order()
        built.engine.import_state(checkpoint.read, checkpoint.state.optimizer_steps, order)
        exported = built.engine.export_state(lambda kind, name: placed[kind, name])
        certificate = certify(checkpoint.manifest, exported, {}, ReplayedLoss(0.0, 0.0, 0.0))
    assert certificate["verdict"] == "pass", certificate["failed"]


class Trained:
    """An engine two steps into training, and what a save of it needs."""

    def __init__(self, engine: dict[str, Any], **changes: Any) -> None:
        import torch

        from dist_cpt.config.schema import RunConfig
        from dist_cpt.engines.build import build_engine
        from dist_cpt.model.load import load_model
        from dist_cpt.optim.groups import param_groups
        from dist_cpt.training_state import TensorSpec

        self.config = RunConfig.model_validate(recipe(engine) | changes)
        self.model = load_model(self.config, device=torch.device("cpu"))
        groups = param_groups(self.model.trainable, self.config.optim, adapter=self.config.adapter.kind == "lora")
        self.lrs = {group.name: 1e-4 for group in groups}
        shapes = {name: tuple(tensor.shape) for name, tensor in self.model.trainable.items()}
        self.num_parameters = sum(math.prod(shape) for shape in shapes.values())
        self.specs = [TensorSpec(n, shapes[n], "bf16", group.name) for group in groups for n in group.names]
        self.engine: Any = build_engine(
            self.model.module, self.model.trainable, groups, self.model.layers, self.config, torch.device("cpu")
        )


def trained(engine: dict[str, Any], **changes: Any) -> Trained:
    built = Trained(engine, **changes)
    timed_steps(built, 2)
    return built


def recipe(engine: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": "benchmark",
        "model": {"config": MODEL, "weights": "bf16"},
        "adapter": {"kind": "none"},
        "data": {"seq_len": SEQ_LEN, "tokenizer": "none", "sources": [{"path": "none.jsonl"}]},
        "batch": {"global_tokens": SEQ_LEN * RANKS},
        "train": {"tokens": 10_000},
        "engine": engine,
    }


def timed_steps(built: Trained, count: int) -> list[float]:
    """Seconds of optimizer steps of one block per rank."""
    import numpy as np
    import torch

    from dist_cpt.data.batch import Batch

    ids = torch.randint(0, 2048, (1, SEQ_LEN))  # in the vocabulary of both models
    borders = torch.tensor([0, SEQ_LEN], dtype=torch.int32)
    counts = np.array([[1, SEQ_LEN, SEQ_LEN]])
    batch = Batch(ids, ids, torch.arange(SEQ_LEN)[None], borders, SEQ_LEN, SEQ_LEN, counts, (0,))
    seconds = []
    for _ in range(count):
        begun = time.perf_counter()
        built.engine.accumulate(batch, SEQ_LEN * RANKS, True)
        built.engine.step(built.lrs)
        seconds.append(time.perf_counter() - begun)
    return seconds


def save(built: Trained, path: Path, export: Any = None, position: int = 8) -> Any:
    from dist_cpt.checkpoint.save import RunCheckpoints
    from dist_cpt.checkpoint.save import save as save_checkpoint
    from dist_cpt.run_folder.claim import Claim
    from dist_cpt.run_folder.manifest import Identity
    from dist_cpt.run_folder.train_state import Probe, Randomness, TrainState

    state = TrainState(
        step=8,
        position=position,
        tokens=8 * position,
        tokens_by_source={},
        skipped_total=0,
        random=Randomness(seed=0, step=8),
        schedule={},
        wandb_run_id="benchmark",
        attempt=0,
        optimizer_steps=8,
        next_block_ids=(),
        probe=Probe(block_ids=(), loss=0.0),
    )
    adapter = built.model.adapter_config is not None
    identity = Identity({}, {}, "benchmark", built.engine.kind)
    run = RunCheckpoints(Claim(path, 0, "", ""), built.specs, identity, adapter, sidecars=[built.model.write_config])
    return save_checkpoint(run, export or built.engine.export_state, state)


def start_beside(built: Trained, path: Path, background: Any) -> Callable[[], bool]:
    export = built.engine.snapshot()
    background.start(lambda: save(built, path, export))

    def done() -> bool:
        if all_ended(background.ended):
            background.collect() if background.running else None
            return True
        return False

    return done


def dcp_state(built: Trained) -> dict[str, Any]:
    """The training state as DTensors over the engine's own memory."""
    from torch.distributed.tensor import DTensor

    state: dict[str, Any] = {}
    for name, parameter in built.engine._parameters.items():
        state[f"master.{name}"] = parameter.detach()
        for kind in ("exp_avg", "exp_avg_sq"):
            local = built.engine._adam.read(kind, name).view(parameter.to_local().shape)
            state[f"{kind}.{name}"] = DTensor.from_local(
                local, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
            )
    return state


def dcp_save(built: Trained, path: Path, group: Any, threads: int = 1) -> Callable[[], bool] | None:
    """Asynchronous, over its own `group`, if one is given; one thread is its default."""
    import torch.distributed.checkpoint as dcp

    if group is None:
        dcp.save(dcp_state(built), storage_writer=dcp.FileSystemWriter(path, thread_count=threads))
        return None
    future: Any = dcp.async_save(dcp_state(built), checkpoint_id=path, process_group=group)
    return lambda: all_ended(future.done())


def dcp_load(built: Trained, path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.load(dcp_state(built), checkpoint_id=path)


def all_ended(mine: bool) -> bool:
    from dist_cpt.runtime.collectives import all_reduce_ints

    return all_reduce_ints([int(mine)])[0] == RANKS


def barrier() -> None:
    import torch.distributed as dist

    dist.barrier()


def folder_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def measure_bytes(folder: Path) -> dict[str, float]:
    """Bytes of a checkpoint folder per trainable parameter, without the tokenizer."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found: dict[str, float] = {}
    base = folder / "base"
    full = Trained({"kind": "single"})
    full.model.hf_config.save_pretrained(base)
    full.model.module.hf_model.save_pretrained(base)
    cases: dict[str, Any] = {"full": None, "lora_rank_32": [], "lora_rank_32_embed_head": ["embed_tokens", "lm_head"]}
    for name, train in cases.items():
        if train is None:
            built = full
        else:
            lora = {"adapter": {"rank": 32, "alpha": 32}, "embeddings": {"train": train}}
            built = Trained({"kind": "single"}, model={"path": str(base)}, **lora)
        timed_steps(built, 1)
        save(built, folder / name)
        found[name] = folder_bytes(folder / name) / built.num_parameters
    dist.destroy_process_group()
    return found


def measure_resume(folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds from a run folder to the end of the first step after a resume, by position of the data stream."""
    import torch.distributed as dist

    from dist_cpt.checkpoint.load import load, newest_valid
    from dist_cpt.config.load import build
    from dist_cpt.config.resolve import resolve_paths
    from dist_cpt.data.loader import BlockLoader
    from dist_cpt.data.prepare import prepare
    from dist_cpt.data.prepared import open_prepared
    from dist_cpt.demo import _train_tokenizer, _write_corpus

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    corpus = folder / "corpus"
    with contextlib.redirect_stdout(sys.stderr):
        _write_corpus(corpus)
    source = max(corpus.glob("*.jsonl"), key=lambda file: file.stat().st_size)
    with contextlib.redirect_stdout(sys.stderr):
        _train_tokenizer(source, folder / "tokenizer")
    values = recipe({"kind": "single"})
    values["data"] = {"seq_len": SEQ_LEN, "tokenizer": str(folder / "tokenizer"), "sources": [{"path": str(source)}]}
    values["output_dir"] = str(folder / "runs")
    config = resolve_paths(build(values, "benchmark"))
    prepare(config)
    built = trained({"kind": "single"})
    for position in POSITIONS:
        save(built, folder / f"at-{position}", position=position)
    seconds: dict[int, list[float]] = {position: [] for position in POSITIONS}
    for number in range(rounds + 1):
        for position in sorted(POSITIONS, reverse=bool(number % 2)):
            begun = time.perf_counter()
            found, _ = newest_valid(folder / f"at-{position}")
            assert found is not None
            with load(found, verified=True) as checkpoint:
                built.engine.import_state(checkpoint.read, checkpoint.state.optimizer_steps)
                at = checkpoint.state.position
            batch = BlockLoader(open_prepared(config), SEQ_LEN, 0, 0).batch([at])
            built.engine.accumulate(batch, batch.num_targets, True)
            built.engine.step(built.lrs)
            if number:
                seconds[position].append(time.perf_counter() - begun)
    dist.destroy_process_group()
    near, far = (statistics.median(seconds[position]) for position in POSITIONS)
    return {"seconds": {str(p): spread(values) for p, values in seconds.items()}, "far_over_near": far / near}


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def on_ranks(function: str, folder: Path, rounds: int, ranks: int = RANKS, start: str = "spawn") -> Any:
    context = multiprocessing.get_context(start)
    context.set_forkserver_preload(list(PRELOAD))  # imported once for all ranks
    here, there = context.Pipe()
    arguments = [(rank, ranks, function, folder, rounds, there if rank == 0 else None) for rank in range(ranks)]
    processes = [context.Process(target=one_rank, args=each) for each in arguments]
    for process in processes:
        process.start()
    there.close()
    try:
        return here.recv()
    finally:
        for process in processes:
            process.join()


def one_rank(rank: int, ranks: int, function: str, folder: Path, rounds: int, answer: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
    store = dist.FileStore(str(folder / f"store-{ranks}"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    result = globals()[function](folder, rounds)
    if answer is not None:
        answer.send(result)
    dist.destroy_process_group()


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """A fresh process: the groups and peaks of one measurement do not touch the next."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=answer_with, args=(there, function.__name__, arguments))
    process.start()
    there.close()
    try:
        return here.recv()
    finally:
        process.join()


def answer_with(answer: Any, function: str, arguments: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    answer.send(globals()[function](*arguments))


if __name__ == "__main__":
    main()
