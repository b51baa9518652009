"""Strict validation with errors a user can act on: one line per fault, with the nearest valid key."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from moelora.core.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)


class Strict(BaseModel):
    """A configuration section: unknown keys and wrong types are errors, values do not change later."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


def nearest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'? known: ..."`` for an error message; a long list of names only when none is near."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(repr(name) for name in close)}?" if close else ";"
    if not names or (close and len(names) > 24):
        return hint if close else ""
    shown = ", ".join(names[:40]) + (f", ... ({len(names)} in all)" if len(names) > 40 else "")
    return f"{hint} known: {shown}"


def check(model: type[Model], values: Any, where: str) -> Model:
    """``values`` as a ``model``. Raises ConfigError naming ``where``, the key, what was found and what is expected."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a mapping of keys to values, found {values!r}")
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        lines = [_explain(fault, model, where) for fault in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def _explain(fault: Any, model: type[BaseModel], where: str) -> str:
    path = [str(part) for part in fault["loc"]]
    place = ".".join([where, *path]) if where else ".".join(path)
    if fault["type"] == "extra_forbidden":
        parent = ".".join([where, *path[:-1]]) if where else ".".join(path[:-1])
        return f"{parent or 'top level'}: unknown key '{path[-1]}'{nearest(path[-1], _keys_at(model, path[:-1]))}"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "missing":
        return f"{place}: required, but not given"
    if fault["type"] == "value_error":
        return f"{place}: {message}" if place else message
    return f"{place}: {message[0].lower()}{message[1:]}, found {fault['input']!r}"


def _keys_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """Field names of the section that ``path`` leads to; steps that are not fields (dict keys) are walked through."""
    current: Any = model
    for step in path:
        fields = getattr(current, "model_fields", {})
        if step in fields:
            current = _section(fields[step].annotation)
    return list(getattr(current, "model_fields", {}))


def _section(annotation: Any) -> Any:
    """The first configuration section named inside a type such as ``dict[str, Task] | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _section(inner)
        if found is not None:
            return found
    return None
