"""Merging: experts with constant gates written into the base model's weights.

    W' = (1 + d) W + sum_e g_e s_e B_e A_e,    b' = (1 + d) b + sum_e g_e shift_e,    d = sum_e g_e stretch_e

(d is zero but for DoRA experts) computed in float32 (float64 for float64 weights) and rounded once to the dtype of the
file. ``merge_files`` does it file by file, one weight in memory at a time; ``merge`` does it to a model in memory, and
``merged`` for as long as a context lasts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moelora.core.errors import AdapterError, ConfigError, MoeloraError
from moelora.model.layer import RoutedLinear
from moelora.model.record import adaptation, routed_layers
from moelora.model.saved import TrainedCopy
from moelora.model.sources import bias_of
from moelora.tools.export.plain import constant_gates, fold, random_tokens, routed
from moelora.tools.export.shards import PLAIN, Shards

ALTERNATIVES = (
    "--to lora writes one LoRA that comes near it and measures how near, --to peft and --to vllm write every expert by "
    "itself, and moelora.load keeps the router"
)


@dataclass(frozen=True)
class Delta:
    """What one layer's experts add to its weight [O, D] and bias [O], gates being constant. stretch, shift: [O]."""

    layer: RoutedLinear
    gates: Tensor

    @torch.no_grad()
    def weight(self, old: Tensor) -> Tensor:
        """W' in the layout and dtype of W."""
        lora = fold(self.layer.experts, self.gates)
        wide = torch.promote_types(old.dtype, torch.float32)
        update = (lora.B.to(old.device, wide) @ lora.A.to(old.device, wide)) * lora.scale
        rows = old.t() if isinstance(self.layer.base_layer, Conv1D) else old
        stretch = self._mixed("stretch")
        if stretch is not None:
            update = update + stretch.to(update).unsqueeze(1) * rows.to(wide)
        new = (rows.to(wide) + update).to(old.dtype)
        return new.t() if isinstance(self.layer.base_layer, Conv1D) else new

    @torch.no_grad()
    def bias(self, old: Tensor) -> Tensor:
        """b' in the dtype of b."""
        new = old.to(torch.promote_types(old.dtype, torch.float32))
        stretch, shift = self._mixed("stretch"), self._mixed("shift")
        new = new if stretch is None else new + new * stretch.to(new)
        return (new if shift is None else new + shift.to(new)).to(old.dtype)

    @property
    def shifts(self) -> bool:
        """Whether the bias changes too."""
        factors = self.layer.experts.composed()
        if factors.stretch is not None and bias_of(self.layer.base_layer) is not None:
            return True
        return factors.shift is not None and bool(factors.shift.any())

    def _mixed(self, name: str) -> Tensor | None:
        each: Tensor | None = getattr(self.layer.experts.composed(), name)
        return None if each is None else self.gates.to(each) @ each


def deltas(model: nn.Module, task: int | None) -> dict[str, Delta]:
    """What every layer's experts add. Raises ConfigError where that depends on the token, or on a task not given."""
    gates = constant_gates(model, task)
    if gates is None:
        raise ConfigError(
            f"router '{adaptation(model).config.router['name']}' decides token by token, so no weights without it are "
            f"equal to the model; {ALTERNATIVES}"
        )
    return {layer.site.name: Delta(layer, gates[layer.site.name]) for layer in routed_layers(model)}


def merge_files(model: nn.Module, base: Path, into: Path, task: int | None) -> dict[str, float]:
    """Write the base model's files to the folder ``into``, the experts of ``model`` merged into them.

    The model's own base weights are not read: it may be empty (meta device). Trained copies (modules_to_save) take the
    place of their originals. Gives the relative error of every layer's update, from the written files. Raises
    AdapterError or ConfigError.
    """
    found, shards = deltas(model, task), Shards(base, model)
    changes: dict[str, Callable[[Tensor], Tensor]] = {}
    for path, delta in found.items():
        changes[f"{path}.weight"] = delta.weight
        if delta.shifts:
            if f"{path}.bias" not in shards.parameters:
                raise ConfigError(f"experts have a bias at '{path}', and the base model's layer has none to add it to")
            changes[f"{path}.bias"] = delta.bias
    for path, module in model.named_modules():
        if isinstance(module, TrainedCopy):
            for key, value in module.trained.state_dict().items():
                changes[f"{path}.{key}"] = _instead(value)
    shards.refuse_tied(changes)
    for path in found:
        dtype = shards.entry(f"{path}.weight").dtype
        if dtype not in PLAIN:
            raise AdapterError(f"{base}: '{path}.weight' is quantised ({dtype}); see --dequantize")
    shards.copy(into, changes)
    return check_files(found, shards, Shards(into, model), task)


def check_files(found: dict[str, Delta], old: Shards, new: Shards, task: int | None) -> dict[str, float]:
    """The relative error of every layer's update in the files ``new``, against the layer itself on the weights ``old``.

    Raises AdapterError where it is more than rounding to the dtype of the file explains.
    """
    errors = {}
    for path, delta in found.items():
        bias = f"{path}.bias" if f"{path}.bias" in old.parameters else None
        before, after = ((s.read(f"{path}.weight"), s.read(bias) if bias else None) for s in (old, new))
        errors[path] = _error(delta.layer, before, after, task)
    return errors


def merge(model: Any, task: int | None = None) -> Any:
    """Merge the experts into the weights of ``model`` itself and give it back: its own class again, without experts,
    parameters frozen. ``save_pretrained`` then writes a plain transformers model.

    Raises ConfigError for a router that depends on the token, and for quantised weights.
    """
    merge_weights(model, task)
    return model


@contextmanager
def merged(model: Any, task: int | None = None) -> Iterator[Any]:
    """Inside, ``model`` is as ``merge`` leaves it, and costs what the base model does; afterwards it has its experts
    again, and weights are what they were, bit for bit (a copy of those that change is kept meanwhile).

        with moelora.merged(model):
            model.generate(...)

    Raises as ``merge`` does.
    """
    cls, record, found = type(model), adaptation(model), deltas(model, task)
    replaced = [(path, m) for path, m in model.named_modules() if isinstance(m, RoutedLinear | TrainedCopy)]
    trained = [p for p in model.parameters() if p.requires_grad]
    kept = [(p, p.detach().clone()) for delta in found.values() for p in delta.layer.base_layer.parameters()]
    try:
        merge_weights(model, task)
        yield model
    finally:
        with torch.no_grad():
            for parameter, value in kept:
                parameter.copy_(value)
        for path, module in replaced:
            _put(model, path, module)
        for parameter in trained:
            parameter.requires_grad_(True)
        model.__class__, model.moelora = cls, record


@torch.no_grad()
def merge_weights(model: Any, task: int | None) -> dict[str, float]:
    """``merge``; gives the relative error of every layer's update."""
    found = deltas(model, task)
    weights = {
        id(value): name for name, value in model.named_parameters(remove_duplicate=False)
    }  # the last of its names
    for path, delta in found.items():
        base: Any = delta.layer.base_layer
        if base.weight.dtype not in PLAIN or not isinstance(base, nn.Linear | Conv1D):
            raise ConfigError(f"'{path}' is a quantised {type(base).__name__}; call model.dequantize() first")
        if delta.shifts and base.bias is None:
            raise ConfigError(f"experts have a bias at '{path}', and the base model's layer has none to add it to")
        if not weights[id(base.weight)].startswith(f"{path}."):
            raise ConfigError(f"'{path}' is tied to '{weights[id(base.weight)]}', which would change with it")
    errors = {}
    for path, delta in found.items():
        base = delta.layer.base_layer
        before = (base.weight.clone(), None if base.bias is None else base.bias.clone())
        base.weight.copy_(delta.weight(base.weight))
        if base.bias is not None:
            base.bias.copy_(delta.bias(base.bias))
        errors[path] = _error(delta.layer, before, (base.weight, base.bias), task)
        _put(model, path, base)
    for path, module in list(model.named_modules()):
        if isinstance(module, TrainedCopy):
            _put(model, path, module.trained.requires_grad_(False))
    model.__class__ = type(model).__bases__[1]
    del model.moelora
    return errors


@torch.no_grad()
def _error(
    layer: RoutedLinear, before: tuple[Tensor, Tensor | None], after: tuple[Tensor, Tensor | None], task: int | None
) -> float:
    """||merged layer - routed layer|| / ||routed layer - base layer|| on random tokens, in float64.

    Raises AdapterError where it is more than rounding to the dtype of the weight explains.
    """
    x = random_tokens(layer)
    base, merged = (_float64(layer, *values, x.device) for values in (before, after))
    wanted = routed(layer, base, x, task)
    update, off = float((wanted - base(x)).norm()), float((merged(x) - wanted).norm())
    coarse = torch.finfo(after[0].dtype).eps * float(merged.weight.norm()) * len(x) ** 0.5
    if not off <= coarse + 1e-5 * update:
        raise AdapterError(
            f"'{layer.site.name}': the merged layer is {off:.3g} off, its update is {update:.3g}; its experts or "
            f"router do more than their factors and gates say, so they cannot be merged; {ALTERNATIVES}"
        )
    return off / update if update > 0 else off


def _float64(layer: RoutedLinear, weight: Tensor, bias: Tensor | None, device: torch.device) -> nn.Linear:
    """A plain float64 layer with these values."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias is not None, device="meta", dtype=torch.float64)
    rows = weight.t() if isinstance(layer.base_layer, Conv1D) else weight
    linear.weight = nn.Parameter(rows.to(device, torch.float64), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(device, torch.float64), requires_grad=False)
    return linear


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _instead(value: Tensor) -> Callable[[Tensor], Tensor]:
    def new(old: Tensor) -> Tensor:
        if value.shape != old.shape:
            raise MoeloraError(f"a trained module has a {tuple(value.shape)}, the base model's file {tuple(old.shape)}")
        return value.detach().cpu()

    return new
