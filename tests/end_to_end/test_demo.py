"""The whole story at a small size: two ranks, a stop, another engine, a report, a merged model."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from dist_cpt.demo import GLOBAL_TOKENS, run_demo


@pytest.mark.matrix  # `.ci/run` runs the whole demo
def test_the_demo_tells_its_story(tmp_path, capfd):
    out = tmp_path / "demo"
    steps = 30
    assert run_demo(out, base_tokens=40 * GLOBAL_TOKENS, cpt_tokens=steps * GLOBAL_TOKENS) == 0
    assert f"{out / 'report.html'}\n" in capfd.readouterr().out
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == steps
    assert summary["certificate"] == "pass"
    assert [a["engine"] for a in summary["attempts"]] == ["zero-3", "fsdp-full"]
    assert summary["attempts"][1]["first_step"] >= steps // 2
    assert summary["domains"]["code"]["change_fraction"] < -0.4
    assert "change_fraction" in summary["domains"]["documentation"]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    blocks = [block for row in rows for block in range(*row["position"])]
    assert blocks == list(range(steps * 16))
    certificate = json.loads((out / "certificate.json").read_text())
    assert all(check["passed"] for check in certificate["checks"])
    assert (certificate["saved_by"]["engine"], certificate["restored_by"]["engine"]) == ("zero-3", "fsdp-full")
    page = (out / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    assert all(title in page for title in ("Forgetting gauge", "Plan against measured", "The same prompt over time"))
    assert summary["compared_steps"] >= steps // 8
    assert summary["largest_loss_difference"] < 0.1  # ZeRO-3 on two ranks against one rank, from the same seed
    assert "Training loss against code" in (out / "comparison.html").read_text()
    wandb = [path.name for path in (out / "runs/code/wandb").glob("offline-run-*")]
    assert len(wandb) == 2
    assert len({name.rsplit("-", 1)[1] for name in wandb}) == 1  # one W&B run

    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(out / "merged-model").config.vocab_size == 2048


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    command = [sys.executable, "-m", "dist_cpt.cli", "demo", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 64
    assert str(tmp_path) in done.stderr
    assert (tmp_path / "thesis.txt").read_text() == "mine"
