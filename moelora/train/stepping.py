"""Around optimiser steps: the methods that see a layer's whole gradients, factors and ranks, on any engine.

The place of ``before`` in a step: gradients are summed up over micro-batches and processes, then clipped, then changed
here, then given to the optimiser, which adds its weight decay. DeepSpeed would clip last; here it clips where the
others do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moelora.core.step import Now, Stepped, Trained
from moelora.model.layer import RoutedLinear
from moelora.model.partition import gathered, whole
from moelora.model.record import routed_layers
from moelora.model.sources import dense_weight
from moelora.optim.base import Optim
from moelora.train.engine import Engine


class Held(Trained):
    """A layer's trained tensors, as an engine holds them."""

    def __init__(self, layer: RoutedLinear, names: list[str], engine: Engine) -> None:
        super().__init__(layer.site, layer.experts, names, layer.router.units)
        self.layer, self.engine = layer, engine

    def _parameter(self, name: str) -> nn.Parameter:
        parameter: nn.Parameter = self.experts.get_parameter(name)
        return parameter

    def value(self, name: str) -> Tensor:
        return whole(self._parameter(name))

    def gradient(self, name: str) -> Tensor:
        return self.engine.gradient(self._parameter(name))

    def set_value(self, name: str, value: Tensor) -> None:
        self.engine.set_value(self._parameter(name), value)

    def set_gradient(self, name: str, value: Tensor) -> None:
        self.engine.set_gradient(self._parameter(name), value)

    def base_weight(self) -> Tensor:
        base: Any = self.layer.base_layer
        with gathered([base.weight]):
            return dense_weight(base).clone()

    def set_noise(self, deviation: Tensor | None, seed: int = 0) -> None:
        self.layer.noise = None if deviation is None else (deviation, seed)


class Stepping:
    """Everything of a model that takes part in its steps: the optim method, the allocators, the experts."""

    def __init__(self, model: nn.Module, engine: Engine, optim: Optim | None) -> None:
        layers = routed_layers(model)
        if optim is not None:
            for layer in layers:
                optim.check(layer.experts)
        first = layers[0].experts
        found: dict[str, Stepped | None] = {"optim": optim, "ranks": first.allocator, "experts": first}
        self.owners = {
            kind: owner
            for kind, owner in found.items()
            if owner is not None and owner.overrides("begin_step", "before_step", "skip_step", "after_step")
        }
        trained = {id(parameter) for parameter in engine.parameters.values()}
        named = [
            (layer, [name for name, parameter in layer.experts.named_parameters() if id(parameter) in trained])
            for layer in layers
        ]
        self.layers = {kind: [Held(layer, names, engine) for layer, names in named if names] for kind in self.owners}
        self.engine = engine
        self.changes = any(owner.overrides("before_step") for owner in self.owners.values())
        if self.changes:
            engine.clip_first()

    @torch.no_grad()
    def begin(self, now: Now) -> None:
        """Before the first micro-batch of a step. This and the others: by all processes together."""
        for kind, owner in self.owners.items():
            owner.begin_step(self.layers[kind], now)

    @torch.no_grad()
    def before(self, now: Now) -> None:
        """Between backward and step."""
        if self.changes:
            self.engine.clip()
        for kind, owner in self.owners.items():
            owner.before_step(self.layers[kind], now)

    @torch.no_grad()
    def skip(self, now: Now) -> None:
        """Between backward and a step that changes nothing."""
        for kind, owner in self.owners.items():
            owner.skip_step(self.layers[kind], now)

    @torch.no_grad()
    def after(self, now: Now) -> None:
        """After the step."""
        for kind, owner in self.owners.items():
            owner.after_step(self.layers[kind], now)

    def _held(self) -> Iterator[tuple[str, Held]]:
        for kind, layers in self.layers.items():
            yield from ((f"{kind}/{layer.site.name}", layer) for layer in layers)

    def tensors(self) -> dict[str, Tensor]:
        """What methods keep, as ``kind/site/key``."""
        return {f"{place}/{key}": value for place, layer in self._held() for key, value in layer.state.items()}

    def set_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Give back what ``tensors`` gave."""
        places = dict(self._held())
        for name, value in tensors.items():
            place, _, key = name.rpartition("/")
            layer = places[place]
            layer.state[key] = value.to(next(layer.experts.parameters()).device)
