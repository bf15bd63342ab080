"""How often a training step makes the host wait for the device: every read of a whole run is counted, by engine.

On a GPU each of these calls waits until the device has done all that it was given; on a CPU they are the same calls,
and can be counted: Python's (`tolist`, `cpu`, `numpy`) and ATen's behind `item`, `float()`, `bool()` and results whose
size depends on values. Counted is what happens inside the training loop, outside saves, evaluations and contract
checks, on the thread that trains. Left out are what the ranks agree on at a boundary, which lies in host memory
everywhere, and branches of the kernels' plain form that only a CPU takes.

`count(engine, ranks)` trains STEPS steps of LoRA and embeddings, with a save and an evaluation, on `ranks` processes.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

STEPS, SEQ_LEN = 20, 32
PYTHON_READS = {"tolist", "cpu", "numpy", "__array__"}
ATEN_READS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_consecutive"}
ELSEWHERE = ("train/saver.py", "train/held_out.py", "train/sample.py", "train/contract.py")
IN_HOST_MEMORY = {"agree_at_boundary", "at_boundary"}
ON_A_CPU = {"_check_range", "_kept_rows"}


def count(engine: dict[str, Any], ranks: int) -> dict[str, float]:
    """Reads per step on rank 0 by whose code makes them: `dist_cpt`, `deepspeed`."""
    with tempfile.TemporaryDirectory(prefix="dist-cpt-reads-") as name:
        folder = Path(name)
        (folder / "recipe.json").write_text(json.dumps(recipe(folder, engine)))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        processes = []
        for rank in range(ranks):
            place = {key: str(value) for key, value in (meeting | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            command = [sys.executable, __file__, str(folder / "recipe.json")]
            environment = os.environ | place | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
            processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        outputs = [process.communicate() for process in processes]
        for process, (_, errors) in zip(processes, outputs, strict=True):
            if process.returncode:
                raise SystemExit(errors.decode())
        counted: dict[str, int] = json.loads(outputs[0][0].splitlines()[-1])
        return {owner: reads / STEPS for owner, reads in counted.items()}


def recipe(folder: Path, engine: dict[str, Any]) -> dict[str, Any]:
    """LoRA and both matrices on a small random base, written here."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    alphabet = {char: number for number, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet | {"<eos>": len(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    size: dict[str, Any] = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(**size, num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=SEQ_LEN)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save(str(folder / "base/tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "pad_token": "<eos>"}
    (folder / "base/tokenizer_config.json").write_text(json.dumps(settings))
    text = Path(__file__).read_text()
    for name, part in (("text", text), ("held-out", text[:200])):
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": part}) + "\n")
    return {
        "name": "reads",
        "output_dir": str(folder),
        "model": {"path": str(folder / "base"), "weights": "bf16", "attention": "mask"},
        "adapter": {"rank": 4, "alpha": 4},
        "embeddings": {"train": ["embed_tokens", "lm_head"]},
        "data": {
            "seq_len": SEQ_LEN,
            "sources": [{"path": str(folder / "text.jsonl")}],
            "validation": [{"name": "held-out", "path": str(folder / "held-out.jsonl")}],
        },
        "batch": {"global_tokens": 4 * SEQ_LEN, "micro_batch": 1},
        "train": {"tokens": STEPS * 4 * SEQ_LEN},
        "optim": {"lr": 1e-3, "embedding_lr": 1e-4},
        "engine": engine,
        "health": {"spike": {"policy": "skip"}},
        "checkpoint": {"every_steps": 8, "trial": False},
        "evaluate": {"every_steps": 10},
        "track": {"wandb": {"mode": "disabled"}},
    }


def counted_training(path: Path) -> Counter[str]:
    """Train this rank's part of a recipe; its reads by owner."""
    import torch
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    from dist_cpt.config.load import build
    from dist_cpt.config.resolve import resolve_paths
    from dist_cpt.runtime.stop import StopRequest
    from dist_cpt.train.run import train

    reads: Counter[str] = Counter()

    class PythonReads(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = [*args, *(kwargs or {}).values()]
            moved = getattr(function, "__name__", "") == "to" and any(str(value) == "cpu" for value in given[1:2])
            if getattr(function, "__name__", "") in PYTHON_READS or (moved and given[0].is_cuda):
                reads.update(owner_of_a_read())
            return function(*args, **(kwargs or {}))

    class AtenReads(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = function.overloadpacket.__name__
            masks = args[1] if name in ("index", "index_put_", "_index_put_impl_") else ()
            masked = any(mask is not None and mask.dtype in (torch.bool, torch.uint8) for mask in masks)
            if name in ATEN_READS or masked:
                reads.update(owner_of_a_read())
            return function(*args, **(kwargs or {}))

    config = resolve_paths(build(json.loads(path.read_text()), str(path)))
    with PythonReads(), AtenReads():
        code, _ = train(config, StopRequest())
    if code:
        raise SystemExit(code)
    return reads


def owner_of_a_read() -> list[str]:
    """Whose code reads now, if that counts."""
    frames = list(frames_above())
    functions = {code.co_name for code in frames}
    files = [code.co_filename for code in frames]
    if "train_loop" not in functions or functions & (IN_HOST_MEMORY | ON_A_CPU):
        return []
    if any(file.endswith(ELSEWHERE) for file in files):
        return []
    packages = [part for file in files for part in Path(file).parts if part in ("dist_cpt", "deepspeed")]
    return packages[:1]


def frames_above() -> Iterator[CodeType]:
    """The code of this thread's frames, innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        yield frame.f_code
        frame = frame.f_back


if __name__ == "__main__":
    # Beside this file lies kernels.py: on the path it would be taken for Hugging Face's package of that name.
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]
    print(json.dumps(counted_training(Path(sys.argv[1]))))
