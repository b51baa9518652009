"""Between backward and step: methods that see the whole gradients of a layer's A and B together, on any engine.

Their place in a step: gradients are summed up over micro-batches and processes, then clipped, then changed here, then
given to the optimiser, which adds its weight decay. DeepSpeed would clip last; here it clips where the others do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moelora.model.partition import whole
from moelora.model.record import routed_layers
from moelora.train.engine import Engine


@dataclass
class Pair:
    """The factors of one layer's experts, whole, the same in all processes, float32 under DeepSpeed.

    site: the layer's path. A [R, D], B [O, R]; scale [R], what B's columns are multiplied by. num_experts: experts have
    equal blocks of R. gradients: of A and of B. state: what a method keeps from step to step; checkpoints hold it.
    """

    site: str
    num_experts: int
    A: Tensor
    B: Tensor
    scale: Tensor
    gradients: tuple[Tensor, Tensor]
    state: dict[str, Tensor] = field(default_factory=dict)


class PairTransform(ABC):
    """A method that replaces the gradients of A and B."""

    @abstractmethod
    def __call__(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """The gradients of A and B that the optimiser gets. Computed in every process; nothing may depend on which."""


class Pairs:
    """Applies a transform to all layers of a model whose A and B are both trained."""

    def __init__(self, model: nn.Module, engine: Engine, transform: PairTransform) -> None:
        self.engine, self.transform = engine, transform
        self.layers = [
            layer
            for layer in routed_layers(model)
            if all(f"{layer.site.name}.experts.lora_{half}" in engine.parameters for half in "AB")
        ]
        self.states: dict[str, dict[str, Tensor]] = {}
        engine.clip_first()

    @torch.no_grad()
    def __call__(self) -> None:
        """Change the gradients. By all processes together."""
        self.engine.clip()
        for layer in self.layers:
            site = layer.site.name
            halves = [self.engine.parameters[f"{site}.experts.lora_{half}"] for half in "AB"]
            A, B = (whole(half) for half in halves)
            gradients = self.engine.gradient(halves[0]), self.engine.gradient(halves[1])
            state = self.states.setdefault(site, {})
            pair = Pair(site, layer.experts.num_experts, A, B, layer.experts.scale, gradients, state)
            for half, value in zip(halves, self.transform(pair), strict=True):
                self.engine.set_gradient(half, value)

    def tensors(self) -> dict[str, Tensor]:
        """What the transform keeps, as ``site/key``."""
        return {f"{site}/{key}": value for site, state in self.states.items() for key, value in state.items()}

    def set_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Give back what ``tensors`` gave."""
        for name, value in tensors.items():
            site, _, key = name.rpartition("/")
            self.states.setdefault(site, {})[key] = value
