"""No line of the source can unpickle, or run what it reads."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
_BUILTINS = {"eval", "exec"}
_METHODS = {"read_pickle", "to_pickle", "unsafe_load", "full_load", "unsafe_load_all", "full_load_all"}


def unsafe(source: str) -> list[str]:
    """Every place in Python source that could unpickle, or run what it reads."""
    tree = ast.parse(source)
    safe_loaders = {"SafeLoader", "CSafeLoader"} | {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and any(_last(base) in ("SafeLoader", "CSafeLoader") for base in node.bases)
    }
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        found += [name for name in names if name.split(".")[0] in _MODULES or name in ("torch.load", "yaml.load")]
        if isinstance(node, ast.Call):
            found += _unsafe_call(node, safe_loaders)
    return found


def _unsafe_call(node: ast.Call, safe_loaders: set[str]) -> list[str]:
    called = ast.unparse(node.func)
    values = {keyword.arg: keyword.value for keyword in node.keywords}
    found = []
    if called in _BUILTINS or _last(node.func) in _METHODS or (called == "__import__" and _module(node) in _MODULES):
        found.append(called)
    if called.endswith("torch.load") and not _is(values.get("weights_only"), True):
        found.append(called)
    if called in ("yaml.load", "yaml.load_all"):
        loader = values.get("Loader", node.args[1] if len(node.args) > 1 else None)
        if loader is None or _last(loader) not in safe_loaders:
            found.append(called)
    if "allow_pickle" in values and not _is(values["allow_pickle"], False):
        found.append(f"{called} allow_pickle")
    if None in values and _last(node.func) == "load":
        found.append(f"{called} with unknown keywords")
    return found


def _last(node: ast.expr) -> str:
    return ast.unparse(node).rsplit(".", 1)[-1]


def _is(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def _module(node: ast.Call) -> str:
    return str(node.args[0].value) if node.args and isinstance(node.args[0], ast.Constant) else "pickle"


def test_no_line_of_the_source_can_unpickle():
    files = sorted(path for folder in ("dist_cpt", "kernels", "launch") for path in (ROOT / folder).rglob("*.py"))
    assert len(files) > 80
    calls = {str(path.relative_to(ROOT)): unsafe(path.read_text(encoding="utf-8")) for path in files}
    assert {path: listed for path, listed in calls.items() if listed} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib as j",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "torch.load(f, weights_only=trusted)",
        "torch.load(f, **options)",
        "from torch import load",
        "np.load(f, allow_pickle=True)",
        "np.load(f, allow_pickle=flag)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.load(text)",
        "yaml.unsafe_load(text)",
        "class L(yaml.FullLoader): pass\nyaml.load(text, Loader=L)",
        "eval(text)",
        "exec(text)",
        "__import__('marshal')",
        "__import__(name)",
        "pd.read_pickle(f)",
    ],
)
def test_the_scan_finds(source):
    assert unsafe(source)


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(f, map_location='cpu', weights_only=True)",
        "np.load(f, allow_pickle=False)",
        "np.load(f)",
        "yaml.safe_load(text)",
        "class L(yaml.SafeLoader): pass\nyaml.load(text, Loader=L)",
        "model.eval()",
        "__import__('re')",
    ],
)
def test_the_scan_accepts(source):
    assert unsafe(source) == []
