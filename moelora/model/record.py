"""What ``adapt`` leaves on a model, and how to find it again."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch
from torch import nn

from moelora.core.errors import MoeloraError
from moelora.core.methods import Methods
from moelora.core.tape import Port, Site
from moelora.io.folder import Pin
from moelora.losses.base import Loss
from moelora.model.config import AdapterConfig
from moelora.model.layer import RoutedLinear
from moelora.routers.base import Router


@dataclass
class Adaptation:
    """What ``adapt`` did to a model; ``model.moelora``. pins: where each expert is on the hub, if it is from there."""

    config: AdapterConfig
    methods: Methods
    sites: list[Site]
    losses: dict[str, Loss]
    router: type[Router]
    fingerprint: str | None
    pins: list[Pin | None] = field(default_factory=list)
    port: Port = field(default_factory=Port)
    watched: weakref.ref[nn.Module] | None = None


def routed_layers(model: nn.Module) -> list[RoutedLinear]:
    """The layers with experts, in site order."""
    layers = [module for module in model.modules() if isinstance(module, RoutedLinear)]
    return sorted(layers, key=lambda layer: layer.site.index)


def adaptation(model: nn.Module) -> Adaptation:
    """What ``adapt`` did to ``model``. Raises MoeloraError if it did nothing."""
    found = getattr(model, "moelora", None)
    if not isinstance(found, Adaptation):
        raise MoeloraError(f"this {type(model).__name__} has no experts; call moelora.adapt or moelora.load first")
    return found


def main_process() -> bool:
    """Whether this process is the one that prints and writes."""
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not ready or torch.distributed.get_rank() == 0
