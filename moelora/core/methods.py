"""Methods: from a name in a recipe to a class. A method is a file; its name is the file name; its recipe keys are the
keyword-only arguments of its class. There is no registry: a name is imported when it is asked for.

    router: {name: smora, top_k: 8}     ->  moelora/routers/smora.py, its one Router, SMoRA(..., top_k=8)

A plugin is such a file outside the package. It is code, so only a caller (or the command line) can name one, never a
recipe.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import create_model

from moelora.core.errors import ConfigError
from moelora.core.validate import Strict, check, nearest

AXES = {
    "experts": "Experts",
    "routers": "Router",
    "init": "Init",
    "ranks": "Ranks",
    "targets": "Targets",
    "optim": "Optim",
    "losses": "Loss",
}
"""Axis (a folder of the package) to the base class of its methods, found in the folder's base.py."""


class Methods:
    """Every method by axis and name: those of the package, and those of the given plugin files."""

    def __init__(self, plugins: Iterable[str | Path] = ()) -> None:
        """plugins: paths of Python files, each with one method. Raises ConfigError for a file that has none."""
        self._plugins: dict[tuple[str, str], type] = {}
        for plugin in plugins:
            path = Path(plugin)
            module = _import_file(path)
            found = [(axis, cls) for axis in AXES if (cls := _method_in(module, axis)) is not None]
            if len(found) != 1:
                bases = ", ".join(AXES.values())
                raise ConfigError(f"plugin {path}: expected one class derived from one of {bases}, found {len(found)}")
            self._plugins[found[0][0], path.stem] = found[0][1]

    def names(self, axis: str) -> list[str]:
        """Method names of an axis."""
        package = importlib.import_module(f"moelora.{axis}")
        shipped = {module.name for module in pkgutil.iter_modules(package.__path__)} - {"base"}
        return sorted(shipped | {name for at, name in self._plugins if at == axis})

    def find(self, axis: str, name: str) -> type:
        """The class of a method. Raises ConfigError with near misses for an unknown name."""
        if (axis, name) in self._plugins:
            return self._plugins[axis, name]
        if name not in self.names(axis):
            raise ConfigError(
                f"{axis}: no method named '{name}'{nearest(name, self.names(axis))}; "
                "a method of your own is given with --plugin FILE.py (or Methods([FILE]))"
            )
        method = _method_in(importlib.import_module(f"moelora.{axis}.{name}"), axis)
        assert method is not None, f"moelora/{axis}/{name}.py must define one {AXES[axis]}"
        return method

    def options(self, axis: str, name: str) -> dict[str, inspect.Parameter]:
        """The recipe keys of a method: keyword-only arguments of its class."""
        parameters = inspect.signature(self.find(axis, name).__init__, eval_str=True).parameters.values()  # type: ignore[misc]
        return {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}

    def check(self, axis: str, spec: Mapping[str, Any]) -> dict[str, Any]:
        """``{name, option: value, ...}`` validated and completed with defaults. Raises ConfigError."""
        name = spec["name"]
        fields: dict[str, Any] = {
            key: (
                Any if option.annotation is inspect.Parameter.empty else option.annotation,
                ... if option.default is inspect.Parameter.empty else option.default,
            )
            for key, option in self.options(axis, name).items()
        }
        schema = create_model(f"{axis}.{name}", __base__=Strict, **fields)
        given = {key: value for key, value in spec.items() if key != "name"}
        return {"name": name, **check(schema, given, f"{axis}.{name}").model_dump()}

    def build(self, axis: str, spec: Mapping[str, Any], *args: Any) -> Any:
        """An instance: framework arguments first, then the checked recipe keys."""
        options = {key: value for key, value in self.check(axis, spec).items() if key != "name"}
        return self.find(axis, spec["name"])(*args, **options)


def _method_in(module: ModuleType, axis: str) -> type | None:
    base = getattr(importlib.import_module(f"moelora.{axis}.base"), AXES[axis])
    own = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, base) and value.__module__ == module.__name__
    ]
    return own[0] if len(own) == 1 else None


def _import_file(path: Path) -> ModuleType:
    if not path.is_file() or path.suffix != ".py":
        raise ConfigError(f"plugin {path}: expected an existing Python file")
    spec = importlib.util.spec_from_file_location(f"moelora_plugin_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
