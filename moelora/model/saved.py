"""Modules trained in full beside the experts, such as a new classifier: PEFT's ``modules_to_save``."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moelora.core.errors import TargetError
from moelora.core.tape import Port
from moelora.core.validate import nearest
from moelora.model.quantised import form


class TrainedCopy(nn.Module):
    """A module of the base trained in full, such as a new classifier (PEFT's ``modules_to_save``), beside its original.

    Whatever else is asked of it (a weight, a size) is answered by the one in use.
    """

    def __init__(self, original: nn.Module, port: Port) -> None:
        super().__init__()
        self.original, self.trained = original, copy.deepcopy(original).requires_grad_(True)
        self.port = port

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (self.trained if self.port.enabled else self.original)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original", "trained", "port"):
                raise
            return getattr(self.trained if self.port.enabled else self.original, name)


def find_saved(model: nn.Module, names: list[str]) -> list[str]:
    """Paths of the modules that ``names`` (paths or their endings) mean, outermost only.

    Raises TargetError when a name means none, or a module is quantised or shares a parameter with the rest of the model
    (tied weights).
    """
    modules = [path for path, _ in model.named_modules() if path]
    found: list[str] = []
    for name in names:
        paths = [path for path in modules if path == name or path.endswith(f".{name}")]
        if not paths:
            known = {path.rsplit(".", 1)[-1] for path in modules} - {str(number) for number in range(1000)}
            raise TargetError(f"modules_to_save: '{name}' matches no module{nearest(name, known)}")
        found += [path for path in paths if not _inside(path, [*found, *(other for other in paths if other != path)])]
    for path in found:
        for parameter in model.get_submodule(path).parameters():
            if form(parameter) is not None:
                raise TargetError(
                    f"modules_to_save: '{path}' is quantised ({form(parameter)}), and cannot be trained; "
                    "quantization_config.llm_int8_skip_modules leaves modules as they are"
                )
        own = {id(parameter) for parameter in model.get_submodule(path).parameters()}
        for other, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) in own and not _inside(other, [path]):
                raise TargetError(f"modules_to_save: '{path}' is tied to '{other}'; untie them first")
    return found


def saved_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The trained modules of an adapted model, by their path in the base model."""
    return {path: module.trained for path, module in model.named_modules() if isinstance(module, TrainedCopy)}


@torch.no_grad()
def fill_saved(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give the trained modules values, by name in the base model, or as ``write`` names them."""
    for path, module in saved_modules(model).items():
        for key, value in module.state_dict(keep_vars=True).items():
            name = next((name for name in (f"{path}.trained.{key}", f"{path}.{key}") if name in tensors), None)
            if name is not None:
                value.copy_(tensors[name])


def _inside(path: str, outer: list[str]) -> bool:
    return any(path == other or path.startswith(f"{other}.") for other in outer)
