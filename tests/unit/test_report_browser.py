"""The report and the comparison in headless Chromium: what is drawn, read by hovering, served, and how wide it is."""

from __future__ import annotations

import json
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from dist_cpt.report.compare import comparison_html
from dist_cpt.report.report import report_html, write_page, write_report
from dist_cpt.report.watch import page_server
from dist_cpt.run_folder.contents import read_run
from tests.recorded_run import HOSTILE, make_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")


def rewritten(folder: Path, name: str, change: Any) -> None:
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    (folder / name).write_text("".join(json.dumps(change(row)) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """Two runs of one seed: the second one's loss differs from step 101 on. The first has all that a run may record."""
    place = tmp_path_factory.mktemp("runs")
    runs = [make_run(place / name, name=name) for name in ("zero", "fsdp")]
    rewritten(runs[1], "metrics.jsonl", lambda row: row | {"loss": row["loss"] + 0.25 * (row["step"] > 100)})
    parts = {"mfu": 0.41, "memory_bytes": {"frozen": 16e9, "optimizer": 8e9}}
    rewritten(runs[0], "metrics.jsonl", lambda row: row | parts)
    rewritten(runs[0], "evaluations.jsonl", lambda row: row | {"base_loss": 2.0, "bits_per_byte": row["loss"] / 3})
    sample = json.loads((runs[0] / "sample.json").read_text())
    over_time = [sample | {"step": step, "text": f" {step} {HOSTILE}"} for step in (0, 200)]
    (runs[0] / "sample.json").write_text(json.dumps(sample | {"samples": [*over_time, dict(sample)]}))
    later = {"time": "2026-03-09T10:00:00", "step": 400, "task": "arc_easy", "acc": 0.625}
    (runs[0] / "evaluated.jsonl").write_text(json.dumps(later) + "\n")
    memory = {"frozen": 2.0**31, "trainable": 2.0**28, "optimizer": 2.0**29, "total": 2.0**35}
    measured = {"frozen": 2**31, "trainable": 2**28, "optimizer": 2**29}
    plan = {
        "engine": "zero-3",
        "machine": {"device": "NVIDIA H100", "source": "published kernels"},
        "predicted": {"tokens_per_second": 1000.0, "step_seconds": 2.0, "memory_bytes": memory, "loading_bytes": 1},
        "measured": {"steps": 9, "tokens_per_second": 900.0, "step_seconds": 2.2, "state_bytes": measured}
        | {"peak_bytes": 2**34, "peak_of": "CUDA allocated"},
    }
    (runs[0] / "plan.json").write_text(json.dumps(plan))
    return runs


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def opened(browser) -> Iterator[Any]:
    """A function that opens a page at a width; every message of its console is a failure."""
    problems: list[str] = []
    pages = []

    def open_page(place: Path, width: int) -> Any:
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: problems.append(request.url) if request.url != place.as_uri() else None)
        page.goto(place.as_uri())
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert problems == []


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_the_report_is_drawn_and_fits(folders, opened, width):
    page = opened(write_report(folders[0]), width)
    titles = [text.split("\n")[0] for text in page.locator("figure.chart figcaption").all_inner_texts()]
    starts = ("Forgetting gauge", "Held-out perplexity", "Training loss", "Learning rate", "Gradient norm", "Speed")
    assert all(title.startswith(start) for title, start in zip(titles, (*starts, "MFU", "Memory"), strict=True)), titles
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for figure in page.locator("figure.chart").all():
        box, lines = figure.bounding_box(), [line.bounding_box() for line in figure.locator("polyline.s").all()]
        left, right = min(line["x"] for line in lines), max(line["x"] + line["width"] for line in lines)
        assert box["x"] < left
        assert right < box["x"] + box["width"]
        assert right - left > 0.4 * box["width"]
    headings = page.locator("h2").all_inner_texts()
    assert headings[:2] == ["What was learned", "What was forgotten"]
    assert {"Plan against measured", "Measured after training"} <= set(headings)
    assert "acc 0.625" in page.locator("main").inner_text()
    assert page.locator("mark").all_inner_texts()[1] == f" 200 {HOSTILE}"


@needs_browser
def test_hovering_reads_the_values(folders, opened):
    page = opened(write_report(folders[0]), 1280)
    rows = [json.loads(line) for line in (folders[0] / "metrics.jsonl").read_text().splitlines()]

    def tip(title: str, x: float, y: float) -> list[str]:
        svg = page.locator("figure.chart", has_text=title).first.locator("svg")
        svg.scroll_into_view_if_needed()
        box = svg.bounding_box()
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        return page.locator("#tip").inner_text().split("\n")

    step, *values = tip("Learning rate", 0.5, 0.5)
    rates = rows[int(step.removeprefix("step ")) - 1]["lr"]
    shown = dict(value.split("  ") for value in values)
    assert shown.keys() == rates.keys()
    assert all(abs(float(shown[name]) / rate - 1) < 0.01 for name, rate in rates.items())
    first, loss, gain = tip("Forgetting gauge", 0.99, 0.01)  # the last evaluation is the one with most of both
    assert first == "this run  step 400"
    lines = (folders[0] / "evaluations.jsonl").read_text().splitlines()
    last = {row["name"]: row["loss"] - 2.0 for row in map(json.loads, lines)}
    assert abs(float(loss.rpartition("  ")[2]) - last["general"]) < 1e-3
    assert abs(float(gain.rpartition("  ")[2]) + (last["legal"] + last["contracts"]) / 2) < 1e-2
    page.mouse.move(0, 0)
    assert page.locator("#tip").is_hidden()


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_a_comparison_is_drawn_and_fits(folders, opened, tmp_path, width):
    page = opened(write_page(comparison_html(folders), tmp_path / "comparison.html"), width)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator("figure.chart svg").count() == page.locator("figure.chart").count() == 9
    assert page.locator("figure.chart", has_text="less that of zero").locator("polyline.s").count() == 1


def test_a_comparison_says_where_two_runs_of_a_seed_part(folders):
    html = comparison_html(folders)
    assert "at step 101" in html
    assert "0.25</td>" in html
    assert "none: equal to the last digit" in comparison_html([folders[0], folders[0]])
    same_name = comparison_html([folders[0], folders[0], folders[1]])
    assert f"1: zero ({folders[0].parent.name}/zero)" in same_name


def test_a_chart_without_values_is_left_out(folders, tmp_path):
    run = make_run(tmp_path / "run", num_steps=40)
    for name in ("evaluations.jsonl", "sample.json"):
        (run / name).unlink()
    html = report_html(read_run(run))
    assert all(absent not in html for absent in ("MFU", "gauge", "Held-out", "Plan against", "prompt over time"))
    assert html.count("<figure") == 5


def test_the_page_is_served_on_loopback_and_follows_the_run(tmp_path):
    run = make_run(tmp_path / "run", num_steps=40)
    made: list[int] = []

    def page() -> str:
        made.append(1)
        return report_html(read_run(run), refresh_seconds=10)

    server = page_server([run], page)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}/"

    def get(path: str = "", **headers: str) -> tuple[int, str]:
        try:
            with closing(urllib.request.urlopen(urllib.request.Request(url + path, headers=headers))) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with closing(error):
                return error.code, ""

    try:
        assert server.server_address[0] == "127.0.0.1"
        code, first = get()
        assert (code, 'http-equiv="refresh" content="10"' in first) == (200, True)
        assert get()[1] == first
        assert len(made) == 1  # made again only for new files
        rewritten(run, "metrics.jsonl", lambda row: row | {"loss": 99.5})
        assert "99.5" in get()[1]
        assert get("recipe.yaml")[0] == 404
        assert get(Host="evil.example")[0] == 403
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
