"""Every change of a run folder goes through the claim: an attempt that was overtaken changes nothing any more."""

from __future__ import annotations

import ast
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dist_cpt.checkpoint.retention import prune, reinstate, set_aside, set_aside_after
from dist_cpt.errors import Superseded
from dist_cpt.run_folder import json_files, names
from dist_cpt.run_folder.checkpoints import published, superseded
from dist_cpt.run_folder.claim import CHANGES, MOVES, Claim
from dist_cpt.run_folder.json_files import read_object, read_rows
from dist_cpt.run_folder.metrics import MetricsFile
from dist_cpt.run_folder.records import CheckpointRecord, EvaluationRecord
from tests.checkpoint_state import save_step
from tests.claimed import claimed, meanwhile, take_over

ROOT = Path(__file__).parents[2] / "dist_cpt"
ROOMS = ("run_folder", "checkpoint", "train", "health", "runtime", "adapters")

# What writes outside of `with claim.change(...)`, and why it may.
OUTSIDE = {
    "run_folder.claim.claim": "makes the claim",
    "run_folder.claim.claim.lock_folder": "makes the claim",
    "run_folder.claim._lock": "makes the claim",
    "run_folder.claim._begin_anew": "makes the claim",
    "run_folder.json_files.remove_quietly": "a temporary file of its own, or of an earlier attempt",
    "run_folder.json_files.write_temporary": "a name of its own",
    "run_folder.json_files.replace_file.replace": "the claim's own files, and a launcher's",
    "run_folder.json_files.swap_in": "called by Claim.put",
    "run_folder.json_files._rename": "called by swap_in",
    "run_folder.json_files.swap_in.exchange_again": "takes a change back",
    "run_folder.json_files.swap_in.remove": "takes a change back",
    "run_folder.metrics.MetricsFile._descriptor": "an empty file, or one that is there",
    "run_folder.exit_file.write_first_hang": "on any rank's watchdog; compares attempts before and after",
    "run_folder.exit_file.replace_hang": "on any rank's watchdog; compares attempts before",
    "run_folder.exit_file._write_temporary": "a name of its own",
    "run_folder.staging.staged": "a folder beside the run's, under a name of its own until it is complete",
    "run_folder.staging.new_output": "what a command was asked to write elsewhere",
    "run_folder.staging.remove_abandoned": "one that a process left which was killed: nobody holds its lock",
    "checkpoint.safetensors_stream.StreamWriter.__init__": "a new file in its own staging folder",
    "checkpoint.save._Save.write_sidecars": "its own staging folder",
    "checkpoint.save._Save.commit": "its own staging folder",
    "checkpoint.retention.remove_folder": "its own staging folder, or one that was pruned under the claim",
    "checkpoint.retention._put_back": "takes a change back",
    "runtime.shared_folder.first_that_sees": "a mark of its own for a moment, before the claim",
    "health.heartbeats.write_heartbeat": "its own line; compares attempts before",
    "health.watchdog.Watchdog.__init__": "the folder of logs, which all attempts append to",
    "health.nccl.save_flight_record": "a rank's own record of a hang",
    "runtime.log.open_log": "the folder of logs, which all attempts append to",
    "train.branch._fill": "that folder",
    "train.branch._link": "that folder",
    "adapters.peft_folder.write_adapter_config": "its own staging folder",
    "adapters.pissa.copy_initial": "its own staging folder",
    "adapters.pissa._find_or_make": "a temporary name",
}
WRITES = {"rename", "unlink", "mkdir", "rmdir", "write_bytes", "write_text", "touch", "symlink_to", "hardlink_to"}
WRITES |= {"rmtree", "copyfile", "copytree", "move", "link", "truncate", "makedirs", "remove", "removedirs"}


def is_write(call: ast.Call) -> bool:
    """Whether a call changes a file or a folder by its name."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
    constants = [
        node.value for node in [*call.args, *[k.value for k in call.keywords]] if isinstance(node, ast.Constant)
    ]
    if name == "open":
        flags = any(flag in ast.unparse(call) for flag in ("O_WRONLY", "O_RDWR", "O_CREAT", "_APPEND"))
        return flags or any(isinstance(mode, str) and set(mode) & set("wax+") and len(mode) <= 3 for mode in constants)
    if name == "replace":
        return owner == "os"
    if name == "remove":
        return owner == "os"
    return name in WRITES or name == "_rename"


def writers(tree: ast.AST, within: str, fenced: bool = False) -> Iterator[tuple[str, bool]]:
    """(function, inside of `with claim.change`) of every write."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield from writers(node, f"{within}.{node.name}")
            continue
        inside = fenced or (isinstance(node, ast.With) and any(".change(" in ast.unparse(i) for i in node.items))
        if isinstance(node, ast.Call) and is_write(node):
            yield within, inside
        yield from writers(node, within, inside)


def test_nothing_writes_into_a_run_folder_outside_of_the_claim() -> None:
    found: set[str] = set()
    fenced: set[str] = set()
    for room in ROOMS:
        for path in sorted((ROOT / room).glob("*.py")):
            for function, inside in writers(ast.parse(path.read_text()), f"{room}.{path.stem}"):
                (fenced if inside else found).add(function)
    assert found - OUTSIDE.keys() == set(), "use claim.change, claim.write or claim.replace"
    assert OUTSIDE.keys() - found == set(), "no longer there"
    assert {"checkpoint.retention.prune", "checkpoint.retention.set_aside"} <= fenced


def test_only_the_claim_and_launchers_replace_files_themselves() -> None:
    callers = {
        f"{path.parent.name}.{path.stem}"
        for room in ROOMS
        for path in (ROOT / room).glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("write_object", "replace_file", "swap_in")
    }
    assert callers == {"run_folder.claim", "run_folder.json_files"}


def evaluation() -> EvaluationRecord:
    return EvaluationRecord(3, "law", "domain", 2.0, 7.4, 1000, 0)


# Every change, as a live attempt asks for it in a folder with checkpoints of steps 1 to 4 and rows of both files.
CHANGE: dict[str, Callable[[Claim], object]] = {
    "stage": lambda claim: save_step(claim.folder, 9, claim=claim),
    "publish": lambda claim: save_step(claim.folder, 9, claim=claim),
    "aside": lambda claim: set_aside_after(claim, 2),
    "reinstate": lambda claim: reinstate(claim, superseded(claim.folder)[0], 1),
    "prune": lambda claim: prune(claim, published(claim.folder)[0], 1),
    **{name: lambda claim, name=name: claim.write(name, {"by": claim.attempt}) for name in names.REPLACED},
    "append.metrics.jsonl": lambda claim: MetricsFile(claim)._append("metrics.jsonl", {"step": 3}),
    "append.evaluations.jsonl": lambda claim: MetricsFile(claim).on_evaluation(evaluation()),
    "append.events.jsonl": lambda claim: MetricsFile(claim).on_message("hello"),
}


@pytest.fixture(scope="module")
def made_run(tmp_path_factory) -> Path:
    """A run with four checkpoints, one of them moved aside, and a record."""
    folder = tmp_path_factory.mktemp("made") / "run"
    folder.mkdir()
    for step in (1, 2, 3, 4):
        save_step(folder, step, keep=9)
    set_aside(claimed(folder), folder / "checkpoints/step-00000001")
    metrics = MetricsFile(claimed(folder))
    for step in (1, 2):
        metrics._append("metrics.jsonl", {"step": step})
    metrics.on_checkpoint(CheckpointRecord(2, "step-00000002", 0.1, 1, 0.1))
    metrics.on_evaluation(evaluation())
    metrics.close()
    for name in names.REPLACED:
        if not (folder / name).exists():
            claimed(folder).replace(name, b'{"step": 1}\n')
    return folder


@pytest.fixture
def run(made_run: Path, tmp_path: Path) -> Path:
    """That run, to be changed."""
    return shutil.copytree(made_run, tmp_path / "run")


def content(folder: Path) -> dict[str, bytes]:
    """Every file but the claim itself."""
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name != "run.json"}


def test_every_change_is_here() -> None:
    assert CHANGE.keys() == set(CHANGES)
    assert set(MOVES) < set(CHANGES)


@pytest.mark.parametrize("what", CHANGES)
def test_an_overtaken_attempt_changes_nothing(run: Path, what: str) -> None:
    before = content(run)
    take_over(run)
    with pytest.raises(Superseded):
        CHANGE[what](claimed(run))
    assert content(run) == before


@pytest.mark.parametrize("what", CHANGES)
def test_an_attempt_that_is_overtaken_in_the_middle_of_a_change_takes_it_back(run: Path, what: str) -> None:
    """The worst moment: after the claim was checked."""
    before = content(run)
    with pytest.raises(Superseded):
        CHANGE[what](meanwhile(claimed(run), what, lambda: take_over(run)))
    after = content(run)
    if what == "publish":  # the later attempt may resume from it by now; it descends from the same checkpoints
        assert {path.name for path in published(run)} == {"step-00000009", *(f"step-{i:08d}" for i in (2, 3, 4))}
        after = {name: value for name, value in after.items() if "step-00000009" not in name}
    elif what == "aside":  # published by this attempt, so it is no loss; see below for the later one's
        assert [path.name[:13] for path in superseded(run)] == ["step-00000004", "step-00000001"]
        return
    assert after == before


def test_what_a_later_attempt_published_is_not_moved_aside(run: Path) -> None:
    def overtake() -> None:
        shutil.rmtree(run / "checkpoints/step-00000004")
        save_step(run, 4, claim=take_over(run), attempt=1, seed=99)

    with pytest.raises(Superseded):
        set_aside_after(meanwhile(claimed(run), "aside", overtake), 3)
    assert published(run)[0].name == "step-00000004"
    assert [path.name[:13] for path in superseded(run)] == ["step-00000001"]


def test_what_a_later_attempt_wrote_in_the_middle_of_a_change_is_put_back(run: Path) -> None:
    def overtake() -> None:
        take_over(run).write("certificate.json", {"by": 1})

    with pytest.raises(Superseded):
        meanwhile(claimed(run), "certificate.json", overtake).write("certificate.json", {"by": 0})
    assert read_object(run / "certificate.json") == {"by": 1}


def test_a_file_that_a_later_attempt_made_in_the_middle_of_a_change_stays(run: Path) -> None:
    (run / "exit.json").unlink()
    claim = meanwhile(claimed(run), "exit.json", lambda: take_over(run).write("exit.json", {"code": 0}))
    with pytest.raises(Superseded):
        claim.write("exit.json", {"code": 70})
    assert read_object(run / "exit.json") == {"code": 0}
    (run / "exit.json").unlink()
    with pytest.raises(Superseded):
        meanwhile(claimed(run), "exit.json", lambda: take_over(run)).write("exit.json", {"code": 70})
    assert not (run / "exit.json").exists()


def test_a_row_of_an_overtaken_attempt_goes_to_its_own_old_file(run: Path) -> None:
    """It freezes between its check and its write; the later attempt has nothing to rewind."""
    later: list[MetricsFile] = []

    def overtake() -> None:
        later.append(MetricsFile(take_over(run)))
        later[0].rewind(2)
        later[0]._append("metrics.jsonl", {"step": 3, "attempt": 1})

    stale = MetricsFile(meanwhile(claimed(run), "append.metrics.jsonl", overtake))
    with pytest.raises(Superseded):
        stale._append("metrics.jsonl", {"step": 3, "attempt": 0})
    later[0]._append("metrics.jsonl", {"step": 4, "attempt": 1})
    rows = read_rows(run / "metrics.jsonl")
    assert [(row["step"], row.get("attempt")) for row in rows] == [(1, None), (2, None), (3, 1), (4, 1)]


@pytest.mark.parametrize("exchange", [True, False], ids=["names can be exchanged", "they cannot"])
def test_a_record_that_an_overtaken_attempt_rewinds_is_whole_again(run: Path, monkeypatch, exchange: bool) -> None:
    """It freezes in the middle of its rewind and wakes up while the later attempt has the file open."""
    if not exchange:
        monkeypatch.setattr(json_files, "_rename", lambda source, target, flag: False)
    later: list[MetricsFile] = []

    def overtake() -> None:
        later.append(MetricsFile(take_over(run)))
        later[0].rewind(2)
        for step in (3, 4):
            later[0]._append("metrics.jsonl", {"step": step})

    with pytest.raises(Superseded):
        MetricsFile(meanwhile(claimed(run), "metrics.jsonl", overtake)).rewind(1)
    later[0]._append("metrics.jsonl", {"step": 5})
    later[0].sync()
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert not list(run.glob("*.tmp"))


def test_a_record_that_was_removed_comes_back_with_the_next_row(run: Path) -> None:
    metrics = MetricsFile(claimed(run))
    metrics._append("metrics.jsonl", {"step": 3})
    os.unlink(run / "metrics.jsonl")
    metrics._append("metrics.jsonl", {"step": 4})
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == [1, 2, 3, 4]


def test_rows_that_had_been_rewound_come_back_with_the_checkpoint_that_they_led_to(run: Path) -> None:
    metrics = MetricsFile(claimed(run))
    for step in (3, 4):
        metrics._append("metrics.jsonl", {"step": step, "loss": 1.0})
    metrics.rewind(2)
    metrics._append("metrics.jsonl", {"step": 3, "loss": 2.0})
    metrics.rewind(4)
    assert [(row["step"], row.get("loss")) for row in read_rows(run / "metrics.jsonl")][2:] == [(3, 2.0), (4, 1.0)]
    assert [row["step"] for row in read_rows(run / "metrics.rewound.jsonl")] == [1, 3]


def test_what_was_moved_aside_for_a_step_to_come_is_not_pruned(run: Path) -> None:
    for _ in range(2):
        set_aside_after(claimed(run), 2)
        save_step(run, 3, keep=1)
        save_step(run, 4, keep=1)
    set_aside_after(claimed(run), 2)
    aside = [path.name[:13] for path in superseded(run)]
    save_step(run, 2, keep=1, seed=7)
    prune(claimed(run), published(run)[0], 1)
    assert [path.name[:13] for path in superseded(run) if path.name[:13] > "step-00000002"] == [
        name for name in aside if name > "step-00000002"
    ]


def test_a_claim_removes_the_temporary_files_of_attempts_that_are_gone(tmp_path: Path) -> None:
    from dist_cpt.config.load import build
    from dist_cpt.config.resolve import resolve_paths
    from dist_cpt.run_folder.claim import claim
    from tests import tiny

    config = resolve_paths(build(tiny.recipe(tmp_path / "b", tmp_path / "c", tmp_path / "r"), "x"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/certificate.json.0a1b2c3d.tmp").write_text("{")
    claim(tmp_path / "run", config, "id").close()
    assert not list((tmp_path / "run").glob("*.tmp"))
