"""Imports point down only, and no axis knows another."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "moelora"
AXES = ("experts", "routers", "init", "ranks", "optim", "losses", "targets")

LEVELS: dict[str, int] = {
    "core": 0,
    "ops": 1,
    **dict.fromkeys(AXES, 2),
    "io": 3,
    "model": 4,
    "data": 5,
    "tools": 5,
    "eval": 6,
    "recipe": 7,
    "train": 8,
    "cli": 9,
    "__main__": 10,
}
"""Part of the package (a folder, or a module at its top) to its floor. ``moelora/__init__.py`` only names things."""

FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def type_checking_only(tree: ast.AST) -> set[ast.AST]:
    """Nodes inside ``if TYPE_CHECKING:``."""
    inside: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for statement in node.body:
                inside.update(ast.walk(statement))
    return inside


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Full names of the moelora modules that are imported anywhere in a file, functions included."""
    skip = type_checking_only(tree)
    for node in ast.walk(tree):
        if node in skip:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "moelora")
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            if base == "moelora":
                yield from (f"moelora.{alias.name}" for alias in node.names)
            elif base.startswith("moelora."):
                yield base


def parts_of(path: Path) -> tuple[str, str]:
    """(part of the package, dotted name of the enclosing package) of a file."""
    relative = path.relative_to(ROOT)
    part = relative.parts[0].removesuffix(".py")
    return part, ".".join(["moelora", *relative.parts[:-1]])


def upward(source: str, path: Path) -> list[str]:
    """What is wrong with a file's imports."""
    part, package = parts_of(path)
    wrong = []
    for name in imported(ast.parse(source), package):
        other = name.split(".")[1]
        if other not in LEVELS and not (ROOT / other).exists() and not (ROOT / f"{other}.py").exists():
            continue  # a name of moelora/__init__.py, such as __version__
        if other == part:
            continue
        assert other in LEVELS, f"{other} has no floor in {__file__}"
        if LEVELS[other] >= LEVELS[part]:
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_down(path: Path) -> None:
    part, _ = parts_of(path)
    assert part in LEVELS, f"moelora/{part} has no floor in {__file__}"
    assert upward(path.read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize(
    ("source", "place", "expected"),
    [
        ("from moelora.model.adapt import adapt", "io/x.py", ["moelora.model.adapt"]),
        ("def f():\n    import moelora.train.run", "model/x.py", ["moelora.train.run"]),
        ("from moelora.losses.base import Loss", "routers/x.py", ["moelora.losses.base"]),
        ("from moelora import cli", "data/x.py", ["moelora.cli"]),
        ("from ..model import adapt", "io/x.py", ["moelora.model"]),
        ("from .folder import x", "io/x.py", []),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from moelora.cli import main", "core/x.py", []),
        ("from moelora import __version__\nfrom moelora.io.folder import x", "model/x.py", []),
        ("from moelora.ops import reference\nfrom moelora.routers.base import Router", "routers/x.py", []),
    ],
)
def test_the_rule_itself(source: str, place: str, expected: list[str]) -> None:
    assert upward(source, ROOT / place) == expected


def test_only_experts_speak_to_the_operator() -> None:
    # Routers, losses and initialisers speak in routes and factors, never in operators. One place scores tokens.
    for axis in ("routers", "losses", "init", "targets"):
        for path in (ROOT / axis).glob("*.py"):
            names = imported(ast.parse(path.read_text(encoding="utf-8")), f"moelora.{axis}")
            spoken = [name for name in names if name.startswith("moelora.ops")]
            assert spoken == (["moelora.ops.project"] if path == ROOT / "routers" / "base.py" else []), path
