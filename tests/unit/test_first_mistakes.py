"""What a newcomer meets first: a mistyped path, key or folder, the command alone, and a reader that has seen enough."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dist_cpt.config.load import load_recipe
from dist_cpt.config.places import require_places
from dist_cpt.config.resolve import resolve_paths
from dist_cpt.errors import DataError
from dist_cpt.run_folder.claim import claim
from dist_cpt.run_folder.staging import staged
from tests import tiny
from tests.command import command

FIXTURE = Path(__file__).parents[1] / "fixtures/run_v2"
STORE = FIXTURE / "cache/corpus-7cc22a33da55"

# Each ends with the exit code in front, names what is not there, and has loaded no torch.
MISTYPED = """
64 train nope.yaml
64 train no-model.yaml
65 train no-text.yaml
64 launch no-model.yaml
64 plan nope.yaml
64 resume nope
64 branch nope --at 1 --name b
64 extend nope --tokens 5
64 status nope
64 status .
64 report nope
64 report .
74 verify nope
74 verify .
64 inspect nope
64 merge nope --out y
64 export nope --format peft --out y
64 generate nope
64 model-check nope
65 data inspect nope
"""
CHECK = """
import sys
from tests.command import command
for line in open("mistyped"):
    code, *arguments = line.split()
    ended = command(*arguments)
    last = ended.error_lines[-1]
    assert ended.code == int(code) and len(ended.error_lines) == 1, (line, ended)
    assert any(word in last for word in ("nope", " is ne", " is not")), (line, last)
    assert "torch" not in sys.modules, line
"""


def recipe(folder: Path, **changes) -> dict:
    return tiny.recipe(FIXTURE / "base", FIXTURE / "corpus/corpus.jsonl", folder, **changes)


def test_a_mistyped_path_is_named_before_torch_is_loaded(tmp_path):
    tiny.write_recipe(tmp_path / "no-model.yaml", recipe(tmp_path, model={"path": str(tmp_path / "nope")}))
    values = recipe(tmp_path)
    values["data"]["sources"] = [{"path": str(tmp_path / "nope.jsonl")}]
    tiny.write_recipe(tmp_path / "no-text.yaml", values)
    (tmp_path / "mistyped").write_text(MISTYPED.strip())
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", CHECK], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_text_that_is_gone_is_left_to_the_stores_that_are_there(tmp_path):
    values = recipe(tmp_path)
    values["data"] |= {"sources": [{"path": str(tmp_path / "nope.jsonl")}], "cache_dir": str(tmp_path / "stores")}
    config = resolve_paths(load_recipe(tiny.write_recipe(tmp_path / "r.yaml", values)))
    with pytest.raises(DataError, match=r"nope\.jsonl does not exist"):
        require_places(config)
    (tmp_path / "stores").mkdir()
    require_places(config)


def test_the_name_that_other_trainers_use_for_a_key(tmp_path):
    path = tiny.write_recipe(tmp_path / "r.yaml", recipe(tmp_path, optim={"learning_rate": 1e-4}))
    assert command("plan", path).error_lines == [
        f"dist-cpt: {path}: unknown key optim.learning_rate; did you mean optim.lr?"
    ]


@pytest.mark.parametrize("arguments", [(), ("data",), ("tokenizer",)])
def test_a_command_alone_prints_its_help(arguments):
    ended = command(*arguments)
    assert (ended.code, ended.err) == (0, "")
    assert "Usage: " in ended.out


@pytest.mark.parametrize(
    "arguments",
    [
        ("data", "inspect", str(STORE), "--json"),
        ("data", "decode", str(STORE), "--tokenizer", str(FIXTURE / "base")),
        ("--help",),  # which rich prints
    ],
)
def test_a_reader_that_has_seen_enough_ends_a_command_as_it_ends_any_tool(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as pipe:
        line = [sys.executable, "-m", "dist_cpt.cli", *arguments]
        done = subprocess.run(line, stdout=pipe, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_a_stream_that_was_closed_before_the_start_is_no_error(closed):
    shell = f"exec {shlex.quote(sys.executable)} -m dist_cpt.cli --version {closed}"
    done = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


KILLED = """
import os, signal, sys
from pathlib import Path
from dist_cpt.run_folder.staging import staged
with staged(Path(sys.argv[1])) as folder:
    (folder / "copied").write_bytes(bytes(100))
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("next_one", ["branch", "claim"])
def test_what_a_killed_branch_staged_is_removed_by_the_next_one(tmp_path, next_one):
    folder = tmp_path / "tiny"
    subprocess.run([sys.executable, "-c", KILLED, str(folder)], check=False)
    (left,) = tmp_path.glob(".tiny.*.tmp")
    with staged(tmp_path / "tiny.2") as living:  # of another name, and alive
        if next_one == "branch":
            with staged(folder):
                pass
        else:
            config = resolve_paths(load_recipe(tiny.write_recipe(tmp_path / "r.yaml", recipe(tmp_path))))
            claim(folder, config, "0a1b2c3d").close()
        assert folder.is_dir()
        assert not left.exists()
        assert living.is_dir()
