"""Whole runs in this process, one rank: what a user sees when things go right and when they do not."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import yaml

from dist_cpt.checkpoint.verify import verify_checkpoint, verify_run
from dist_cpt.errors import StorageError
from dist_cpt.run_folder.audit import record_problems
from dist_cpt.run_folder.checkpoints import read_manifest
from dist_cpt.runtime.device_check import emulates_bf16
from dist_cpt.runtime.stop import StopRequest
from tests import tiny
from tests.errno_layer import ErrnoLayer
from tests.whole_run import StopAfter, rows, train


def test_a_run_leaves_what_it_promises(made, tmp_path, capfd):
    auto = {"kind": "auto", "activation_checkpointing": "auto"}
    bf16 = {"path": str(made[0]), "weights": "bf16"}
    values = tiny.recipe(*made, tmp_path, model=bf16, evaluate={"every_steps": 6}, engine=auto)
    values["track"] = values["track"] | {"tensorboard": True}
    assert train(values) == 0
    run = tmp_path / "tiny"
    assert ("no bf16 instructions" in capfd.readouterr().err) == emulates_bf16(torch.device("cpu"))
    metrics = rows(run / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, 13))
    assert [row["position"] for row in metrics] == [[8 * i, 8 * i + 8] for i in range(12)]
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert [(row["step"], row["name"]) for row in rows(run / "evaluations.jsonl")] == [
        (0, "held-out"),
        (6, "held-out"),
        (12, "held-out"),
    ]
    contract = json.loads((run / "contract.json").read_text())
    assert [group["name"] for group in contract["groups"]] == ["adapter", "embeddings"]
    assert all(check["passed"] for check in contract["checks"])
    assert len(contract["checks"]) == 3
    assert json.loads((run / "exit.json").read_text())["code"] == 0
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step-00000004",
        "step-00000008",
        "step-00000012",
    ]
    assert len(list((run / "tensorboard").glob("events.out.tfevents.*"))) == 1
    sample = json.loads((run / "sample.json").read_text())
    assert [one["step"] for one in sample["samples"]] == [0, 6, 12]
    assert {key: sample[key] for key in ("prompt", "text", "step")} == sample["samples"][-1]
    plan = json.loads((run / "plan.json").read_text())
    predicted, measured = plan["predicted"]["memory_bytes"], plan["measured"]
    for part in ("frozen", "trainable", "optimizer"):  # by the shapes, and in the engine's storages
        assert abs(measured["state_bytes"][part] / predicted[part] - 1) < 0.02, part
    assert (plan["engine"], measured["steps"]) == ("single", 10)
    assert all(measured[key] > 0 for key in ("tokens_per_second", "step_seconds", "peak_bytes"))
    (saved,) = {json.dumps(read_manifest(path).recipe["engine"]) for path in (run / "checkpoints").iterdir()}
    assert (json.loads(saved)["kind"], json.loads(saved)["activation_checkpointing"]) == ("single", "none")
    assert yaml.safe_load((run / "recipe.yaml").read_text())["engine"]["kind"] == "auto"  # for a resume to choose again


def test_ten_and_ten_is_twenty_bit_for_bit(made, tmp_path):
    """Stop, resume, finish: parameters, moments, learning rates and block ids as in the unbroken run."""
    from dist_cpt.run_folder.checkpoints import read_manifest

    twenty = {"tokens": 20 * 8 * tiny.SEQ_LEN}
    changes = {"model": {"path": str(made[0]), "weights": "bf16"}, "train": twenty, "checkpoint": {"every_steps": 10}}
    values = tiny.recipe(*made, tmp_path / "unbroken", **changes)
    assert train(values) == 0
    broken = tiny.recipe(*made, tmp_path / "broken", **changes)
    run = tmp_path / "broken" / "tiny"
    assert train(broken, StopAfter(10)) == 75
    assert json.loads((run / "exit.json").read_text())["code"] == 75
    broken["train"] = twenty | {"deterministic": True}  # which a resume may change; no operation here has another form
    assert train(broken) == 0
    manifests = [read_manifest(tmp_path / which / "tiny/checkpoints/step-00000020") for which in ("unbroken", "broken")]
    assert manifests[0].tensors == manifests[1].tensors
    assert manifests[0].state_sha256 == manifests[1].state_sha256
    both = [rows(tmp_path / which / "tiny/metrics.jsonl") for which in ("unbroken", "broken")]
    for a, b in zip(*both, strict=True):
        assert {k: a[k] for k in ("step", "loss", "lr", "grad_norm", "position", "tokens_by_source")} == {
            k: b[k] for k in ("step", "loss", "lr", "grad_norm", "position", "tokens_by_source")
        }
    certificate = json.loads((run / "certificate.json").read_text())
    assert certificate["verdict"] == "pass"
    replay = next(check for check in certificate["checks"] if check["name"] == "replayed_loss")
    assert "difference 0," in replay["detail"]


def test_a_damaged_newest_checkpoint_is_skipped_and_named(made, tmp_path, capfd):
    values = tiny.recipe(*made, tmp_path)
    assert train(values, StopAfter(9)) == 75
    run = tmp_path / "tiny"
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    weights = newest / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    capfd.readouterr()
    assert train(values) == 0
    output = capfd.readouterr().err
    assert newest.name in output
    assert weights.name in output
    assert [row["step"] for row in rows(run / "metrics.jsonl")] == list(range(1, 13))
    assert [row["step"] for row in rows(run / "metrics.rewound.jsonl")] == [9]


def test_a_checkpoint_that_cannot_be_read_is_not_a_damaged_one(made, tmp_path, monkeypatch, capfd):
    values = tiny.recipe(*made, tmp_path)
    run = tmp_path / "tiny"
    assert train(values, StopAfter(9)) == 75
    newest = run / "checkpoints/step-00000009"
    before = {path: path.stat().st_ino for path in (run / "checkpoints").rglob("*")}
    monkeypatch.setenv("DIST_CPT_STORAGE_SECONDS", "0.2")
    for unreadable in (newest, newest / "optimizer-00001-of-00001.safetensors"):
        capfd.readouterr()
        with ErrnoLayer(unreadable, errno.EIO, at=0, for_ever=True).installed():
            assert train(values) == 66
            with pytest.raises(StorageError, match="EIO"):
                verify_run(run)
        (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("dist-cpt: ")]
        assert all(named in line for named in (str(unreadable), "EIO"))
    ended = json.loads((run / "exit.json").read_text())
    assert (ended["code"], "EIO" in ended["reason"]) == (66, True)
    assert {path: path.stat().st_ino for path in (run / "checkpoints").rglob("*")} == before
    monkeypatch.setenv("DIST_CPT_STORAGE_SECONDS", "5")
    with ErrnoLayer(newest, errno.ESTALE, at=3).installed() as layer:
        assert train(values) == 0
    assert len(layer.calls) > 3
    assert rows(run / "events.jsonl")[-1]["kind"] == "end"
    resumed = [row["resumed_from"] for row in rows(run / "events.jsonl") if row["kind"] == "resume"]
    assert resumed == [newest.name]


def test_a_stale_handle_of_the_claim_ends_no_run(made, tmp_path):
    for number in (6, 40):
        with ErrnoLayer(tmp_path, errno.ESTALE, at=number, place="run.json").installed() as layer:
            assert (
                train(tiny.recipe(*made, tmp_path, name=f"tiny{number}", train={"tokens": 4 * 8 * tiny.SEQ_LEN})) == 0
            )
        assert len(layer.calls) > number


def test_another_recipe_in_the_same_folder_is_refused(made, tmp_path, capfd):
    assert train(tiny.recipe(*made, tmp_path)) == 0
    before = (tmp_path / "tiny/exit.json").read_text()
    capfd.readouterr()
    assert train(tiny.recipe(*made, tmp_path, seed=1)) == 64
    assert "seed: 0 -> 1" in capfd.readouterr().err
    assert (tmp_path / "tiny/exit.json").read_text() == before
    assert train(tiny.recipe(*made, tmp_path)) == 0  # finished: nothing left to do, nothing doubled
    assert len(rows(tmp_path / "tiny/metrics.jsonl")) == 12


def test_a_folder_in_which_no_step_was_trained_belongs_to_nobody(made, tmp_path, capfd):
    refused = tiny.recipe(*made, tmp_path, adapter={"targets": ["q_prj"]})
    assert train(refused) == 64
    stopped = StopRequest()
    stopped.requested = "SIGTERM"
    assert train(tiny.recipe(*made, tmp_path, seed=1), stopped) == 75  # with a checkpoint of step 0
    capfd.readouterr()
    assert train(tiny.recipe(*made, tmp_path)) == 0
    run = tmp_path / "tiny"
    assert record_problems(run) == []
    assert [(row["step"], row["name"]) for row in rows(run / "evaluations.jsonl")] == [
        (0, "held-out"),
        (12, "held-out"),
    ]
    assert len(list((run / "untrained").iterdir())) == 2  # nothing of the others is lost
    assert train(tiny.recipe(*made, tmp_path, seed=2)) == 64


def test_a_finished_run_answers_from_its_files_and_changes_none(made, tmp_path):
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", tiny.recipe(*made, tmp_path))
    assert train(yaml.safe_load(recipe.read_text())) == 0
    run = tmp_path / "tiny"
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in run.rglob("*")}
    without_torch = "import sys; sys.modules['torch'] = None; from dist_cpt.cli import main; main()"
    for arguments in (["train", recipe], ["launch", recipe], ["resume", run]):
        done = subprocess.run(
            [sys.executable, "-c", without_torch, *map(str, arguments)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        (line,) = done.stderr.splitlines()
        assert all(named in line for named in (str(run), "step 12"))
        assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in run.rglob("*")} == before
    (run / "checkpoints/step-00000012/adapter_config.json").write_text("{}")
    assert train(yaml.safe_load(recipe.read_text())) == 0  # not finished any more
    assert json.loads((run / "certificate.json").read_text())["step"] == 8


@pytest.mark.parametrize(
    ("section", "value", "code", "named"),
    [
        ("model", {"path": "/nowhere/at/all"}, 64, "/nowhere/at/all"),
        ("data.sources", [{"path": "/nowhere/corpus.jsonl"}], 65, "/nowhere/corpus.jsonl"),
        ("data.sources", "empty", 65, "empty"),
        ("batch", {"global_tokens": 8 * tiny.SEQ_LEN, "micro_batch": 3}, 64, "micro_batch"),
        ("model", "small vocabulary", 65, "vocab"),
        ("adapter", {"targets": ["q_prj"]}, 64, "q_proj"),
    ],
)
def test_bad_input_is_one_line_and_its_code(made, tmp_path, capfd, section, value, code, named):
    values = tiny.recipe(*made, tmp_path)
    if value == "empty":
        (tmp_path / "empty.jsonl").write_text('\n{"text": "  "}\n')
        value = [{"path": str(tmp_path / "empty.jsonl")}]
    if value == "small vocabulary":
        base = tiny.write_base(tmp_path / "small", made[0], vocab_size=300)
        value = {"path": str(base)}
    if section == "data.sources":
        values["data"] = values["data"] | {"sources": value}
    else:
        values[section] = value
    capfd.readouterr()
    assert train(values) == code
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("dist-cpt: ")]
    assert len(lines) == 1
    assert named in lines[0]


def test_wandb_out_of_reach_trains_on_offline(made, tmp_path, monkeypatch, capfd):
    pytest.importorskip("wandb", reason="the extra wandb is part of the development install")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr("dist_cpt.train.start.WANDB_INIT_SECONDS", 3.0)
    assert train(tiny.recipe(*made, tmp_path, track={"wandb": {"mode": "auto"}})) == 0
    assert "offline" in "".join(capfd.readouterr())
    assert list((tmp_path / "tiny/wandb").glob("offline-run-*"))


def command(*arguments: str) -> subprocess.Popen:
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # in the background it is ignored, and would stay so
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "dist_cpt.cli", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)


def test_kill_9_then_the_same_command_finishes_the_run(made, tmp_path):
    recipe = tiny.write_recipe(
        tmp_path / "recipe.yaml", tiny.recipe(*made, tmp_path, train={"tokens": 60 * 8 * tiny.SEQ_LEN})
    )
    child = command("train", str(recipe))
    metrics = tmp_path / "tiny/metrics.jsonl"
    deadline = time.monotonic() + 120
    while (not metrics.is_file() or metrics.read_text().count("\n") < 20) and time.monotonic() < deadline:
        assert child.poll() is None, child.communicate()
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert train(tiny.recipe(*made, tmp_path, train={"tokens": 60 * 8 * tiny.SEQ_LEN})) == 0
    assert [row["step"] for row in rows(metrics)] == list(range(1, 61))


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"])
def test_a_signal_saves_at_the_step_boundary_and_ends_with_75(made, tmp_path, name):
    values = tiny.recipe(*made, tmp_path, train={"tokens": 4000 * 8 * tiny.SEQ_LEN}, checkpoint={"every_minutes": 30})
    metrics = tmp_path / "tiny/metrics.jsonl"

    def send():
        while not metrics.is_file() or metrics.read_text().count("\n") < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), getattr(signal, name))

    before = signal.signal(getattr(signal, name), signal.SIG_DFL)  # under nohup SIGHUP is ignored, and stays so
    threading.Thread(target=send, daemon=True).start()
    with StopRequest() as stop:
        assert train(values, stop) == 75
    signal.signal(getattr(signal, name), before)
    ended = json.loads((tmp_path / "tiny/exit.json").read_text())
    assert name in ended["reason"]
    assert (tmp_path / f"tiny/checkpoints/step-{ended['step']:08d}/manifest.json").is_file()


@pytest.mark.parametrize(
    "stdout", ["/dev/full", *(pytest.param(how, marks=pytest.mark.matrix) for how in ("closed pipe", "closed"))]
)
def test_a_lost_stdout_ends_nothing(made, tmp_path, stdout):
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", tiny.recipe(*made, tmp_path))
    if stdout == "closed pipe":
        reader, descriptor = os.pipe()
        os.close(reader)
    else:
        descriptor = os.open(os.devnull if stdout == "closed" else stdout, os.O_WRONLY)
    arguments = [sys.executable, "-m", "dist_cpt.cli", "train", str(recipe)]
    if stdout == "closed":
        arguments = ["sh", "-c", f"exec {shlex.join(arguments)} >&-"]
    done = subprocess.run(arguments, stdout=descriptor, stderr=subprocess.PIPE, text=True, check=False)
    os.close(descriptor)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "tiny"
    assert json.loads((run / "exit.json").read_text())["code"] == 0
    assert [row["step"] for row in rows(run / "metrics.jsonl")] == list(range(1, 13))
    dropped = [row for row in rows(run / "events.jsonl") if "Console" in row.get("text", "")]
    assert len(dropped) == (stdout != "closed")  # there is nobody to note it for


def test_lost_checkpoints_are_no_fresh_start(made, tmp_path, capfd):
    values = tiny.recipe(*made, tmp_path)
    run = tmp_path / "tiny"
    assert train(values, StopAfter(6)) == 75
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    before = rows(run / "metrics.jsonl")
    assert train(values) == 74
    assert f"step-{len(before):08d}" in capfd.readouterr().err
    assert rows(run / "metrics.jsonl") == before
    (run / "checkpoints").symlink_to(tmp_path / "elsewhere")  # the folder itself may be a link
    assert train(values, StopAfter(9)) == 75
    (run / "checkpoints").unlink()
    (run / "checkpoints").mkdir()
    for step in (tmp_path / "elsewhere").iterdir():  # and so may every checkpoint in it
        (run / "checkpoints" / step.name).symlink_to(step)
    assert train(values) == 0
    assert [row["first_step"] for row in rows(run / "events.jsonl") if row["kind"] == "resume"] == [6, 9]
    assert all(verify_checkpoint(step) == [] for step in (tmp_path / "elsewhere").iterdir())
    assert [row["step"] for row in rows(run / "metrics.jsonl")] == list(range(1, 13))


def test_ctrl_c_in_prepare_is_one_line_and_loses_nothing(made, tmp_path):
    base, _ = made
    big = tmp_path / "big"
    tiny.write_corpus(big)
    text = (big / "corpus.jsonl").read_text()
    with (big / "corpus.jsonl").open("w") as file:
        for _ in range(3000):
            file.write(text)
    values = tiny.recipe(base, big / "corpus.jsonl", tmp_path)
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", values)
    child = command("prepare", str(recipe))
    cache = tmp_path / "data"
    deadline = time.monotonic() + 60
    while not any(cache.glob("*.units-*/*.claim")) and time.monotonic() < deadline:
        assert child.poll() is None, child.communicate()
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, output = child.communicate(timeout=60)
    assert child.returncode == 75
    assert "Traceback" not in output
    assert output.splitlines()[-1].startswith("dist-cpt: ")
    assert [path for path in cache.glob("*.units-*/*") if not path.name.isdecimal()] == []  # finished units are kept


def test_a_lost_run_json_is_made_good_from_the_checkpoints(made, tmp_path):
    values = tiny.recipe(*made, tmp_path)
    run = tmp_path / "tiny"
    assert train(values, StopAfter(6)) == 75
    before = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text("")
    assert train(values) == 0
    after = json.loads((run / "run.json").read_text())
    assert (after["attempts"], after["wandb_run_id"]) == (2, before["wandb_run_id"])


def test_a_stop_before_the_first_step_evaluates_once(made, tmp_path):
    values = tiny.recipe(*made, tmp_path)
    stop = StopRequest()
    stop.requested = "SIGTERM"
    assert train(values, stop) == 75
    assert train(values) == 0
    assert [row["step"] for row in rows(tmp_path / "tiny/evaluations.jsonl")] == [0, 12]


def test_a_damaged_record_of_rollbacks_is_not_forgotten(made, tmp_path, capfd):
    values = tiny.recipe(*made, tmp_path)
    assert train(values, StopAfter(6)) == 75
    (tmp_path / "tiny/rollbacks.json").write_text("{")
    assert train(values) == 74
    assert "rollbacks.json is damaged" in capfd.readouterr().err


def test_a_run_from_an_adapter_proves_its_effect_and_resumes_with_its_counter(made, tmp_path):
    from dist_cpt.run_folder.checkpoints import read_state

    assert train(tiny.recipe(*made, tmp_path / "old")) == 0
    old = tmp_path / "old/tiny/checkpoints/step-00000012"
    lora = {"rank": 4, "alpha": 4, "continue_from": {"path": str(old), "optimizer": True}}
    values = tiny.recipe(*made, tmp_path / "new", adapter=lora, name="next")
    run = tmp_path / "new/next"
    assert train(values, StopAfter(6)) == 75
    assert train(values) == 0
    proof = json.loads((run / "continued.json").read_text())
    assert proof["optimizer_steps"] == 12
    assert proof["loss_with"] < proof["loss_without"] - 0.01
    first = rows(run / "evaluations.jsonl")[0]
    last = rows(tmp_path / "old/tiny/evaluations.jsonl")[-1]
    assert first["loss"] == last["loss"]  # step 0 of this run is where the other one ended
    assert read_state(run / "checkpoints/step-00000012").optimizer_steps == 24
    assert json.loads((run / "certificate.json").read_text())["verdict"] == "pass"


def test_an_adapter_without_effect_is_refused(made, tmp_path, capfd):
    from dist_cpt.runtime.stop import StopRequest

    stop = StopRequest()
    stop.requested = "SIGTERM"
    lora = {"rank": 4, "alpha": 4}
    assert train(tiny.recipe(*made, tmp_path / "old", adapter=lora, embeddings={"train": []}), stop) == 75
    untrained = tmp_path / "old/tiny/checkpoints/step-00000000"
    lora["continue_from"] = str(untrained)
    assert train(tiny.recipe(*made, tmp_path / "new", adapter=lora, embeddings={"train": []})) == 74
    assert "with and without this adapter" in capfd.readouterr().err


@pytest.mark.matrix
def test_8_bit_moments_resume_bit_for_bit_and_learn_as_well(made, tmp_path):
    """The same place: as if unbroken. The loss after 40 steps is that of fp32 moments to a part in a thousand."""
    from dist_cpt.run_folder.checkpoints import read_manifest

    ends = {}
    for name, state in (("fp32", "fp32"), ("8bit", "8bit"), ("broken", "8bit")):
        values = tiny.recipe(
            *made,
            tmp_path,
            name=name,
            adapter={"rank": 8, "alpha": 8},
            train={"tokens": 40 * 8 * tiny.SEQ_LEN},
            optim={"lr": 1.0e-2, "embedding_lr": 1.0e-3, "state": state},
            checkpoint={"every_steps": 10},
        )
        run = tmp_path / name
        if name == "broken":
            assert train(values, StopAfter(17)) == 75
        assert train(values) == 0
        ends[name] = rows(run / "metrics.jsonl")[-1]["loss"]
    digests = [read_manifest(tmp_path / n / "checkpoints/step-00000040").state_sha256 for n in ("8bit", "broken")]
    assert digests[0] == digests[1]
    assert ends["8bit"] != ends["fp32"]
    assert abs(ends["8bit"] - ends["fp32"]) < 1e-3 * ends["fp32"]
    groups = json.loads((tmp_path / "8bit/contract.json").read_text())["groups"]
    assert {group["name"]: group["state_dtype"] for group in groups} == {"adapter": "8bit", "embeddings": "fp32"}
