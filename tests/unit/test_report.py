"""report.html: self-contained, escaped, and written for every state a run folder can be in."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dist_cpt.errors import DataError, WriteError
from dist_cpt.report.chart import PLOT, Mark, Series, downsample, line_chart, short_number, smooth
from dist_cpt.report.report import write_report
from tests.recorded_run import HOSTILE, make_run


class _Page(HTMLParser):
    """Text, tags and attributes of a page; fails on tags that do not nest."""

    VOID = frozenset({"meta", "line", "circle", "path", "polyline", "img", "br"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.attributes, self.tags = "", [], []  # type: tuple[str, list[tuple[str, str]], list[str]]
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == [], self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self._open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text += " " + data


def report_of(folder: Path) -> _Page:
    html = write_report(folder).read_text(encoding="utf-8")
    page = _Page(html)
    for name, value in page.attributes:
        assert name not in ("src", "href", "xlink:href", "srcset", "onerror"), (name, value)
    assert not re.search(r"\b(nan|inf|None)\b", re.sub(r"<(script|style)>.*?</\1>", "", html, flags=re.DOTALL))
    assert page.tags.count("script") == 1
    return page


def words(page: _Page) -> str:
    return " ".join(page.text.split())


def test_a_whole_run(tmp_path: Path) -> None:
    page = report_of(make_run(tmp_path / "run"))
    text = words(page)
    for expected in (
        "held-out perplexity of legal 11.59 → 4.963 −57.2%",  # exp(2.45) to exp(1.6 + 0.85 e^-6), by hand
        "held-out perplexity of general 7.538 → 7.768 +3.0%",
        "400 of 400",
        "3 (9 steps repeated)",
        "#0 zero-3 ×8",
        "#1 fsdp-full ×4",
        "#2 fsdp-hybrid ×16",
        "resumed from step-00000180",
        "killed or crashed",
        "335,544,320",
        "470,000,000 per rank",
        "every trainable tensor moved",
        "not checked",
        "pass step 280, saved by fsdp-full on 4 ranks, restored by fsdp-hybrid on 16 ranks",
        "legal domain 90.00% 90.2",
        "shall indemnify",
        "step-00000280",
        "path: /corpus/legal.jsonl",
        "step 124 skipped",
    ):
        assert expected in text, expected
    assert page.tags.count("svg") == 7
    marks = [value for name, value in page.attributes if name == "class" and value == "mark"]
    assert len(marks) == 2 * 6  # both resumes in every chart


@pytest.mark.parametrize(
    "missing",
    [
        "metrics",
        "metrics.rewound",
        "evaluations",
        "events",
        "contract",
        "certificate",
        "sample",
        "exit",
        "recipe",
        "checkpoints",
    ],
)
def test_any_file_may_be_missing(tmp_path: Path, missing: str) -> None:
    run = make_run(tmp_path / "run", 20)
    for path in [p for p in run.iterdir() if p.name.rsplit(".", 1)[0] == missing and p.is_file()]:
        path.unlink()
    if missing == "checkpoints":
        (run / "checkpoints" / "step-00000014" / "manifest.json").unlink()
    report_of(run)


def test_an_empty_folder_and_a_start_without_steps(tmp_path: Path) -> None:
    assert "not started" in words(report_of(tmp_path))
    (tmp_path / "events.jsonl").write_text(
        '{"time":"2026-03-02T10:00:00.000+00:00","kind":"start","attempt":0,"engine":"single","world_size":1,"first_step":0}\n'
    )
    text = words(report_of(tmp_path))
    assert "no end recorded: still running, or killed" in text
    assert "No optimizer step has been recorded yet." in text


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4])
def test_few_rows(tmp_path: Path, num_rows: int) -> None:
    run = make_run(tmp_path / "run", 20)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:num_rows]))
    (run / "evaluations.jsonl").unlink()
    assert report_of(run).tags.count("svg") == 5


def test_one_row_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step":1,"loss":2.0}\n')
    assert "circle" in report_of(tmp_path).tags


def test_a_crashed_run_shows_its_exit_code(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 20)
    (run / "exit.json").write_text('{"code": 71, "reason": "trainability contract broken at step 2"}')
    (run / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes()[:-30])  # torn by the crash
    text = words(report_of(run))
    assert "numerical error trainability contract broken at step 2" in text
    assert "metrics.jsonl: line 20 cannot be read" in text
    assert "19 of 20" in text


def test_wrong_types_and_non_finite_numbers_do_not_stop_it(tmp_path: Path) -> None:
    rows = [
        {"step": 1, "loss": None, "lr": None, "non_finite": {"loss": "nan"}, "tokens_by_source": None},
        {"step": "2", "loss": 1.0},
        {"step": 3, "loss": "x", "lr": {"a": None}, "grad_norm": True, "tokens": None, "skipped": True},
        {"step": 4, "loss": 1e308, "lr": {"a": 0.0}, "grad_norm": 0.0},
    ]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"step":5,"loss":NaN}\n[]\n'
    )
    (tmp_path / "evaluations.jsonl").write_text(
        '{"step":0,"name":"a","perplexity":null}\n{"step":1,"name":"a","perplexity":0}\n'
    )
    (tmp_path / "contract.json").write_text('{"groups": [{}, 3], "frozen": 1, "ties": [1], "checks": [{}]}')
    (tmp_path / "certificate.json").write_text('{"checks": 5, "saved_by": 1}')
    (tmp_path / "events.jsonl").write_text(
        '{"kind":"resume"}\n{"kind":"end"}\n{"kind":"checkpoint"}\n{"kind":"message"}\n'
    )
    (tmp_path / "exit.json").write_text("{")
    (tmp_path / "recipe.yaml").write_text("a: [")
    html = write_report(tmp_path).read_text()
    assert "exit.json: not a JSON object" in html
    assert not re.search(r"(points|cx|cy|x1)=\"[^\"]*(nan|inf)", html)


def test_html_in_any_text_of_a_run_is_escaped(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 20)
    for path in [p for p in run.iterdir() if p.suffix in (".json", ".jsonl")]:
        content = path.read_text()
        for word in (
            "legal",
            "adapter",
            "zero-3",
            "fsdp-full",
            "bf16",
            "cuda",
            "SIGTERM",
            "indemnify",
            "W&B",
            "moved",
            "bit-identical",
            "step-000",
            "lm_head",
        ):
            content = content.replace(word, json.dumps(HOSTILE)[1:-1])
        path.write_text(content)
    (run / "recipe.yaml").write_text(
        f"name: {json.dumps(HOSTILE)}\ndata: {{sources: [{{name: {json.dumps(HOSTILE)}}}]}}\n"
    )
    page = report_of(run)
    assert "img" not in page.tags
    assert words(page).count("<script>alert(1)</script>") > 20


def test_characters_that_are_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "sample.json").write_text('{"prompt": "東京 \\ud800", "text": "\\udfff 🚀\\u0000", "step": 1}')
    (tmp_path / "recipe.yaml").write_bytes(b"name: caf\xe9\n")
    assert "東京" in words(report_of(tmp_path))


@pytest.mark.matrix
def test_a_hundred_thousand_rows(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 20)
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    line = json.dumps(row | {"step": -1, "loss": -2})
    rows = (line.replace("-1", str(i), 1).replace("-2", f"{2 + math.sin(i)}", 1) for i in range(1, 100_001))
    (run / "metrics.jsonl").write_text("\n".join(rows))
    path = write_report(run)
    assert path.stat().st_size < 1_000_000
    assert "100,000 of 20" in words(_Page(path.read_text()))


def test_writing_is_atomic_and_a_failure_is_one_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 20)
    write_report(run)
    assert not list(run.glob("*.tmp"))
    (run / "report.html").unlink()
    (run / "report.html").mkdir()
    with pytest.raises(WriteError, match=r"report\.html cannot be written"):
        write_report(run)
    assert not list(run.glob("*.tmp"))
    with pytest.raises(DataError, match="run folder not found"):
        write_report(tmp_path / "none")


def test_downsampling_keeps_both_ends_and_every_extreme() -> None:
    points = [(float(i), math.sin(i / 500)) for i in range(100_000)]
    points[31_234] = (31_234.0, 9.0)
    points[77_777] = (77_777.0, -9.0)
    kept = downsample(points)
    assert len(kept) <= 1000
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert (31_234.0, 9.0) in kept
    assert (77_777.0, -9.0) in kept
    assert kept == sorted(kept)
    assert downsample(points[:1000]) == points[:1000]
    assert downsample([(float(i), None) for i in range(5000)]) == []


def test_smoothing_is_centred_and_keeps_a_line_a_line() -> None:
    line = [(float(i), 2.0 * i) for i in range(50)]
    assert smooth(line, 5) == line
    assert [y for _, y in smooth([(0, 0.0), (1, 3.0), (2, None), (3, 0.0)], 1)] == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "values", [[5.0], [5.0, 5.0], [0.0, 0.0], [1e-9, 1e12], [-3.0, 4.0], [1.0, math.inf], [8.1, 8.2]]
)
def test_everything_drawn_lies_inside_the_plot(values: list[float], log: bool) -> None:
    points = [(float(i), v) for i, v in enumerate(values)]
    marks = [Mark(float(i) / 20, f"#{i} fsdp-hybrid ×128") for i in range(21)]
    x_range = (0.0, float(max(len(values) - 1, 1)))
    drawing = line_chart("t", [Series("s", points, 0)], x_range=x_range, marks=marks, log=log).drawing
    if drawing is None:
        assert (log, values) == (True, [0.0, 0.0])
        return
    for x, y in [point for _, line in drawing.lines for point in line]:
        assert PLOT.left <= x <= PLOT.right
        assert PLOT.top <= y <= PLOT.bottom
    labels = [(mark.label_x, mark.label_y, mark.label) for mark in drawing.marks if mark.label_y is not None]
    assert all(x + 5.9 * len(text) <= PLOT.width + 2 for x, _, text in labels)
    rows: dict[float, float] = {}
    for x, row, text in labels:  # no label over another
        assert x >= rows.get(row, 0)
        rows[row] = x + 5.9 * len(text)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (950.0, "950"),
        (9500.0, "9500"),
        (12_500.0, "12.5k"),
        (3.2e6, "3.2M"),
        (1e-5, "1e-5"),
        (2.5e-4, "2.5e-4"),
        (0.05, "0.05"),
    ],
)
def test_short_numbers(value: float, shown: str) -> None:
    assert short_number(value) == shown
