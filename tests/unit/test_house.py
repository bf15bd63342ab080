"""What can be counted about the code: sizes, names, who imports whom. Each failure lists the places."""

from __future__ import annotations

import ast
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from dist_cpt.run_folder import names

ROOT = Path(__file__).parents[2]
SOURCE_ROOTS = {"dist_cpt": ROOT, "dist_cpt_kernels": ROOT / "kernels", "dist_cpt_launch": ROOT / "launch"}
MAX_PARAMETERS = 8
MAX_LOOP_LINES, MAX_LOOP_PARAMETERS = 60, 6
MAX_LINES = 45_698  # a budget: delete something before raising it
VAGUE_NAMES = {"utils", "helpers", "common", "misc", "manager", "base"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def product() -> dict[str, ast.Module]:
    """The syntax tree of every module of the product, by dotted name."""
    trees = {}
    for package, root in SOURCE_ROOTS.items():
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            trees[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return trees


def listed(places: Iterable[str]) -> str:
    """One place a line."""
    return "\n" + "\n".join(sorted(places))


def parameters(function: Function) -> list[str]:
    """The names of a function's parameters, self and cls left out."""
    arguments = function.args
    given = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    return [argument.arg for argument in given if argument is not None and argument.arg not in ("self", "cls")]


def public_functions(tree: ast.Module) -> Iterator[tuple[str, Function]]:
    """(qualified name, function) of public functions, public methods and constructors; nested functions left out."""
    for node in tree.body:
        if isinstance(node, Function) and not node.name.startswith("_"):
            yield node.name, node
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, Function) and (method.name == "__init__" or not method.name.startswith("_")):
                    yield f"{node.name}.{method.name}", method


def is_command(function: Function) -> bool:
    """Whether a function is a command of the CLI: its parameters are options."""
    calls = [decorator.func for decorator in function.decorator_list if isinstance(decorator, ast.Call)]
    return any(isinstance(call, ast.Attribute) and call.attr in ("command", "callback") for call in calls)


def test_no_function_takes_more_than_eight_parameters():
    """Public functions and constructors; kernel ops and options of the command line are exempt."""
    long = {}
    for module, tree in product().items():
        for name, function in public_functions(tree):
            is_kernel_op = module.startswith("dist_cpt_kernels") and not name.endswith("__init__")
            if not is_kernel_op and not is_command(function) and len(parameters(function)) > MAX_PARAMETERS:
                long[f"{module}.{name}"] = len(parameters(function))
    assert not long, listed(f"{name} takes {count} parameters" for name, count in long.items())


def test_the_loop_fits_on_a_screen():
    functions = dict(public_functions(product()["dist_cpt.train.loop"]))
    loop = functions["train_loop"]
    assert loop.end_lineno is not None
    assert loop.end_lineno - loop.lineno + 1 <= MAX_LOOP_LINES
    assert len(parameters(loop)) <= MAX_LOOP_PARAMETERS


def string_constants(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """(value, is an operand of `/`) of every string constant that is not a docstring."""
    docstrings, operands = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings.add(id(node.value))  # also the strings that document attributes
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            operands |= {id(node.left), id(node.right)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value, id(node) in operands


def test_a_run_files_name_is_written_in_one_module():
    """As a whole string or as a part of a path; names without a suffix are ordinary words elsewhere."""
    run_files = {value for key, value in vars(names).items() if key.isupper() and isinstance(value, str)}
    assert {"exit.json", "metrics.jsonl", "manifest.json", "logs"} <= run_files
    written = defaultdict(set)
    for module, tree in product().items():
        for value, is_operand in string_constants(tree):
            parts = value.split("/")
            for name in run_files.intersection(parts):
                if "." in name or is_operand or len(parts) > 1:
                    written[name].add(module)
    elsewhere = {name: modules - {names.__name__} for name, modules in written.items()}
    assert not any(elsewhere.values()), listed(f"{name}: {', '.join(sorted(m))}" for name, m in elsewhere.items() if m)


def imported_modules(tree: ast.Module, known: set[str]) -> set[str]:
    """The modules out of `known` that a module imports, anywhere in it."""
    named = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            named |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return named & known


def test_every_module_has_an_importer():
    """Other than the packages themselves and what is started by name."""
    modules = product()
    imported = set().union(*(imported_modules(tree, modules.keys() - {name}) for name, tree in modules.items()))
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"].values()
    started = {script.partition(":")[0] for script in scripts}
    started |= {name for name, tree in modules.items() if 'if __name__ == "__main__"' in _main_guard(tree)}
    packages = {name for name in modules if any(other.startswith(f"{name}.") for other in modules)}
    unused = modules.keys() - imported - started - packages
    assert not unused, listed(unused)


def _main_guard(tree: ast.Module) -> str:
    tests = [node.test for node in tree.body if isinstance(node, ast.If)]
    return "".join(f"if {ast.unparse(test)}".replace("'", '"') for test in tests)


def attributes_of_self(function: Function) -> set[str]:
    """The attributes of self that a method assigns."""
    assigned = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            assigned |= {node.attr} if isinstance(node.value, ast.Name) and node.value.id == "self" else set()
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "object.__setattr__":
            owner, attribute = node.args[:2]
            if ast.unparse(owner) == "self" and isinstance(attribute, ast.Constant):
                assigned.add(str(attribute.value))
    return assigned


def test_every_attribute_is_created_in_the_constructor():
    """Or declared in the class: nobody has to run the program to learn what an object has."""
    classes = {
        node.name: node for tree in product().values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
    }

    def declared(name: str) -> set[str]:
        if name not in classes:
            return set()
        attributes = set().union(*(declared(ast.unparse(base).split("[")[0]) for base in classes[name].bases))
        for node in classes[name].body:
            if isinstance(node, ast.AnnAssign):
                attributes.add(ast.unparse(node.target))
            elif isinstance(node, ast.Assign):
                attributes |= {ast.unparse(target) for target in node.targets}
            elif isinstance(node, Function):
                attributes |= attributes_of_self(node) if node.name in ("__init__", "__post_init__") else {node.name}
        return attributes

    late = []
    for name, node in classes.items():
        methods = [method for method in node.body if isinstance(method, Function)]
        created = set().union(*(attributes_of_self(method) for method in methods)) - declared(name)
        late += [f"{name}.{attribute}" for attribute in created]
    assert not late, listed(late)


def test_the_product_stays_small(capsys):
    lines: dict[str, int] = defaultdict(int)
    for package, root in SOURCE_ROOTS.items():
        for path in (root / package).rglob("*.py"):
            parts = path.relative_to(root).parts
            lines[".".join(parts[:-1])] += len(path.read_text().splitlines())
    with capsys.disabled():
        print("", *(f"{count:7,} {package}" for package, count in sorted(lines.items())), sep="\n")
        print(f"{sum(lines.values()):7,} lines of the product, at most {MAX_LINES:,}")
    assert sum(lines.values()) <= MAX_LINES


def test_no_test_module_imports_another():
    """What several share lives in modules made for it, such as tests/tiny.py."""
    importing = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom) and re.search(r"\btest_", ast.unparse(node)):
                importing.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert not importing, listed(importing)


def test_no_parametrisation_is_sliced_with_a_step():
    """What a test covers is listed: `ENGINES[1::2]` covers something else once an engine is added."""
    sliced = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            decorators = node.decorator_list if isinstance(node, Function | ast.ClassDef) else []
            for part in (part for decorator in decorators for part in ast.walk(decorator)):
                if isinstance(part, ast.Slice) and part.step is not None:
                    sliced.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not sliced, listed(sliced)


def test_source_roots_hold_packages_only():
    """A Python file directly in kernels/ or launch/ would be importable from a checkout and nowhere else."""
    assert [path for folder in ("kernels", "launch") for path in (ROOT / folder).glob("*.py")] == []


def test_every_file_is_named_after_what_it_does():
    folders = (*SOURCE_ROOTS, "tests", "benchmarks")
    files = [path for folder in folders for path in (SOURCE_ROOTS.get(folder, ROOT) / folder).rglob("*.py")]
    assert len(files) > 200
    assert [path for path in files if path.stem in VAGUE_NAMES or path.parent.name in VAGUE_NAMES] == []
