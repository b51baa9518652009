"""What the importers have in common: settings read strictly, and a mixture put into a model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moelora.core.errors import AdapterError, ConfigError
from moelora.core.methods import Methods
from moelora.core.tape import Site
from moelora.core.validate import nearest
from moelora.io.files import AGAIN, FIX, fail, read_object, short
from moelora.io.peft import CONFIG, PeftAdapter
from moelora.io.tensors import TensorFile
from moelora.model.adapt import attach
from moelora.model.adapters import fill_experts
from moelora.model.config import resolve
from moelora.model.layer import RoutedLinear
from moelora.model.sources import Source, pinned, warn_of_other_bases

MAX_NUMBER = 1e30
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Settings:
    """The values of a configuration file. Each is asked for by name; at the end nothing else may be on."""

    def __init__(self, folder: Path, name: str, inner: str | None = None) -> None:
        self.path, self.values = folder / name, read_object(folder, name)
        self.asked: set[str] = set()
        if inner is not None:
            self.path, self.values = self.path / inner, self.values[inner]

    def take(self, key: str, good: Callable[[Any], bool], expected: str, default: Any = None, remedy: str = FIX) -> Any:
        """A value that must be ``good``. Raises AdapterError."""
        self.asked.add(key)
        value = self.values.get(key, default)
        if not good(value):
            fail(self.path, key, short(value), expected, remedy)
        return value

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value: bool = self.take(key, lambda v: type(v) is bool, "true or false", default)
        return value

    def whole(self, key: str, least: int, most: int, default: int | None = None) -> int:
        """An integer of a range."""
        value: int = self.take(
            key, lambda v: type(v) is int and least <= v <= most, f"an integer from {least} to {most}", default
        )
        return value

    def number(
        self, key: str, good: Callable[[float], bool], expected: str, default: float | None = None, remedy: str = FIX
    ) -> float:
        """A number, not too large, that must be ``good``."""

        def fits(value: Any) -> bool:
            return type(value) in (int, float) and -MAX_NUMBER <= value <= MAX_NUMBER and good(value)

        return float(self.take(key, fits, expected, default, remedy))

    def off(self, key: str, reason: str) -> None:
        """A setting that must not be on, and why."""
        self.take(key, _inactive, "null, false or empty", None, reason)

    def ignore(self, *keys: str) -> None:
        """Settings that mean nothing for what the model computes."""
        self.asked.update(keys)

    def close(self) -> None:
        """Refuse whatever is on and was not asked for; warn of the rest."""
        unknown = sorted(self.values.keys() - self.asked)
        for key in unknown:
            self.off(key, "moelora does not know this setting, so it cannot honour it")
        if unknown:
            warnings.warn(f"{self.path}: unknown settings, all off: {short(unknown)}", stacklevel=2)


def _inactive(value: object) -> bool:
    return value is None or value is False or value in ("", [], {})


@dataclass(frozen=True)
class Mixture:
    """What a folder holds, checked as far as it can be without the layers.

    adapter: keys of ``AdapterConfig``. sources: the experts, in order. router: what a router holds, by the names of its
    own state, from the first site it serves. notes: what was left out or assumed, one line each.
    """

    folder: Path
    adapter: dict[str, Any]
    sources: list[Source]
    router: Callable[[Site], dict[str, Tensor]]
    notes: list[str] = field(default_factory=list)


def put(model: nn.Module, mixture: Mixture) -> None:
    """Give ``model`` the experts and routers of a mixture. Raises AdapterError, and then leaves the model as it was."""
    methods = Methods()

    def start(layers: dict[str, RoutedLinear]) -> None:
        fill_experts(model, layers, mixture.sources, config)
        seen: set[int] = set()
        for layer in layers.values():
            if id(layer.router) not in seen:
                seen.add(id(layer.router))
                _fill_router(layer.router, mixture.router(layer.site), layer.site.name, mixture.folder)
        for layer in layers.values():
            layer.experts.set_anchors()
            layer.router.prepare(layer.experts.composed())

    try:
        config = resolve(mixture.adapter, methods)
        record = attach(model, pinned(config, mixture.sources), methods, start)
    except ConfigError as error:
        raise AdapterError(f"{mixture.folder}: {error}") from error
    finally:
        for source in mixture.sources:
            source.adapter.file.close()
    record.pins = [source.pin for source in mixture.sources]
    warn_of_other_bases(mixture.sources, model, record.fingerprint)


@torch.no_grad()
def _fill_router(router: nn.Module, state: dict[str, Tensor], site: str, folder: Path) -> None:
    held = router.state_dict(keep_vars=True)
    for key in sorted(held.keys() ^ state.keys()):
        what = "has no value in the folder" if key in held else "is not part of this router"
        raise AdapterError(f"{folder}: '{key}' of the router of '{site}' {what}; {AGAIN}")
    for key, value in held.items():
        if value.shape != state[key].shape:
            raise AdapterError(
                f"{folder}: '{key}' of the router of '{site}' is {list(state[key].shape)} in the folder, here "
                f"{list(value.shape)}; load the base model it was trained beside"
            )
        value.copy_(state[key])


def read_floats(file: TensorFile, name: str, shape: Sequence[int], why: str) -> Tensor:
    """A tensor that must be there, of a floating-point dtype and a shape. Raises AdapterError."""
    entry = file.entries.get(name)
    if entry is None:
        fail(file.path, name, "nothing", f"a tensor of shape {list(shape)} ({why})", AGAIN)
    if entry.dtype not in FLOATS:
        fail(file.path, name, f"dtype {str(entry.dtype).removeprefix('torch.')}", "a floating-point dtype", AGAIN)
    if entry.shape != tuple(shape):
        fail(
            file.path, name, f"shape {list(entry.shape)}", f"{list(shape)} ({why})", "the files do not match: copy all"
        )
    return file.read(name)


def refuse_more_than_lora(adapter: PeftAdapter, what: str) -> None:
    """Raise AdapterError for an expert with more than low-rank factors: others do not mix these as moelora does.

    DoRA is refused by X-LoRA's layers themselves, a bias of lora_B gets no gate there, and modules trained in full or
    taken out of the base model's weights would hold for all experts.
    """
    more = {part for module in adapter.modules.values() for part in module.entries} - {"A", "B"}
    found = [*sorted(more), *sorted(adapter.full)[:1], *([adapter.moved] if adapter.moved else [])]
    if found:
        fail(adapter.folder / CONFIG, "expert", ", ".join(found), "LoRA alone", what)


def target_rule(model: nn.Module, paths: set[str], folder: Path) -> list[str] | str:
    """``target_modules`` that means exactly these modules: the ends of their names, where that is enough.

    Raises AdapterError for a module that the model has not.
    """
    names = [name for name, _ in model.named_modules() if name]
    for path in sorted(paths - set(names)):
        near = nearest(path, [name for name in names if name.endswith(path.rpartition(".")[2])])
        raise AdapterError(f"{folder}: it adapts '{path}', and {type(model).__name__} has no such module{near}")
    for rule in (sorted({path.rpartition(".")[2] for path in paths}), sorted(paths)):
        if {name for name in names if any(f".{name}".endswith(f".{end}") for end in rule)} == paths:
            return rule
    return "|".join(map(re.escape, sorted(paths)))
