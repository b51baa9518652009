"""Limits of the house: short files, one test file per method, no unsafe loading, no hidden state."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
ROOT = TOP / "moelora"
AXES = ("experts", "routers", "init", "ranks", "optim", "losses", "targets")
FILES = sorted(ROOT.rglob("*.py"))
METHODS = [
    path for axis in AXES for path in sorted((ROOT / axis).glob("*.py")) if path.stem not in ("__init__", "base")
]
METHOD_LINES, LINES = 120, 350
CONSTANT = re.compile(r"_?[A-Z][A-Z0-9_]*|__all__")
MUTABLE = {"list", "dict", "set", "defaultdict", "OrderedDict", "Counter", "deque", "WeakSet", "WeakKeyDictionary"}
CHANGES = {"append", "extend", "add", "update", "pop", "setdefault", "clear", "insert", "remove"}
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_are_short(path: Path) -> None:
    limit = METHOD_LINES if path in METHODS else LINES
    assert len(path.read_text(encoding="utf-8").splitlines()) <= limit


@pytest.mark.parametrize("path", METHODS, ids=name_of)
def test_every_method_has_its_test_file(path: Path) -> None:
    assert (TOP / "tests" / path.parent.name / f"test_{path.stem}.py").is_file()


@pytest.mark.parametrize("path", METHODS, ids=name_of)
def test_every_method_says_how_a_recipe_names_it(path: Path) -> None:
    said = ast.get_docstring(tree_of(path)) or ""
    assert "Recipe line:" in " ".join(said.split())


def called(node: ast.expr) -> str:
    """The dotted name that is called or read, or an empty string."""
    return ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""


def unsafe(tree: ast.Module) -> Iterator[str]:
    """Everything in a file that must not be there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            names = [alias.name for alias in node.names]
            for name in (module, *names):
                if name.split(".")[0] in MODULES:
                    yield f"line {node.lineno}: {name}"
            if (module == "os" and "environ" in names) or (module == "torch" and "load" in names):
                yield f"line {node.lineno}: from {module} import {', '.join(names)}"
        elif isinstance(node, ast.Call) and called(node.func) in (
            "eval",
            "exec",
            "torch.load",
            "compile",
            "__import__",
        ):
            yield f"line {node.lineno}: {called(node.func)}(...)"
        elif isinstance(node, ast.Attribute) and called(node) in ("os.environ", "os.getenv", "os.putenv"):
            yield f"line {node.lineno}: {called(node)}"
        elif isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            if any(kind is None or called(kind) in ("Exception", "BaseException") for kind in kinds):
                yield f"line {node.lineno}: a handler that catches everything"
        if "trust_remote_code" in (getattr(node, "arg", ""), getattr(node, "value", ""), getattr(node, "id", "")):
            yield f"line {node.lineno}: trust_remote_code"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_unsafe(path: Path) -> None:
    assert list(unsafe(tree_of(path))) == []


def mutable_state(tree: ast.Module) -> Iterator[str]:
    """Module-level names, other than constants, that hold something which changes."""
    for node in tree.body:
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            targets, value = [node.target], node.value
        else:
            continue
        changes = isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp) or (
            isinstance(value, ast.Call) and called(value.func).split(".")[-1] in MUTABLE
        )
        for target in targets:
            if changes and not (isinstance(target, ast.Name) and CONSTANT.fullmatch(target.id)):
                yield f"line {node.lineno}: {ast.unparse(target)}"


def globals_changed(tree: ast.Module) -> Iterator[str]:
    """Functions that assign to names of their module."""
    yield from (f"line {node.lineno}: global" for node in ast.walk(tree) if isinstance(node, ast.Global))


def constants_changed(tree: ast.Module) -> Iterator[str]:
    """Methods that change a container, called on a constant of the module."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        owner, method = node.func.value, node.func.attr
        constant = isinstance(owner, ast.Name) and CONSTANT.fullmatch(owner.id) and len(owner.id) > 1
        if constant and method in CHANGES:
            yield f"line {node.lineno}: {called(owner)}.{method}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_state_at_module_level(path: Path) -> None:
    tree = tree_of(path)
    assert [*mutable_state(tree), *globals_changed(tree), *constants_changed(tree)] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "eval('1')",
        "exec('1')",
        "import os\nos.environ['A'] = '1'",
        "from os import environ",
        "try:\n    pass\nexcept Exception:\n    pass",
        "try:\n    pass\nexcept:\n    pass",
        "try:\n    pass\nexcept (ValueError, Exception):\n    pass",
        "f(trust_remote_code=True)",
        "f(**{'trust_remote_code': True})",
    ],
)
def test_the_rule_against_unsafe_code(source: str) -> None:
    assert list(unsafe(ast.parse(source)))


def test_the_rule_lets_ordinary_code_pass() -> None:
    source = "model.eval()\nspec.loader.exec_module(m)\nre.compile('x')\ntry:\n    pass\nexcept OSError:\n    pass\n"
    assert list(unsafe(ast.parse(source))) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("cache = {}", 1),
        ("seen: list[int] = []", 1),
        ("table = dict(a=1)", 1),
        ("import collections\nd = collections.defaultdict(list)", 1),
        ("NAMES = ['a']\n_HOME = {}\n__all__ = ['a']\nlimit = 3\npair = (1, 2)", 0),
        ("def f():\n    local = []\n    return local", 0),
    ],
)
def test_the_rule_against_module_state(source: str, found: int) -> None:
    assert len(list(mutable_state(ast.parse(source)))) == found
