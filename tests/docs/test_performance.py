"""The tables of docs/performance.md and docs/scale.md and the headers of recipes are what the benchmarks print now."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

from tests.docs.pages import ROOT


def benchmark(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_models_tables():
    """`python benchmarks/roofline.py --write` brings it up to date."""
    module = benchmark("roofline")
    text = module.PAGE.read_text()
    assert text.count("benchmarks/roofline.py --write -->") == 4
    assert module.page_with_tables(text) == text
    headers = dict(module.headers())
    assert len(headers) == len(list((ROOT / "recipes").glob("*.yaml")))
    for path, header in headers.items():
        assert "By the model of a step, not measured: " in header
        assert path.read_text() == header


def test_the_tables_of_scale_are_the_models():
    """`python benchmarks/scaling.py --write` brings them up to date."""
    module = benchmark("scaling")
    text = module.PAGE.read_text()
    assert text.count("<!-- scaling: benchmarks/scaling.py --write -->\nWeak scaling") == 1
    assert module.page_with_tables(text) == text
