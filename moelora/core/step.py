"""Stepped: what takes part in the steps of a training run, on any engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moelora.core.tape import Site


@dataclass(frozen=True, slots=True)
class Now:
    """An optimiser step. step: its number, from 0, of ``steps``. lr, decay: its learning rate and weight decay."""

    step: int
    steps: int
    lr: float
    decay: float = 0.0


class Trained(ABC):
    """What is trained of one layer's experts: whole tensors, the same in all processes, float32 under DeepSpeed.

    experts: the module. names: of its trained tensors, as the module has them. units: how many gates a token has here:
    one per expert, or per block of ranks that the router chooses between; the ranks are cut into as many equal blocks.
    state: what the method keeps from step to step; checkpoints hold it. Every method is called by all processes
    together, in the same order.
    """

    def __init__(self, site: Site, experts: Any, names: Sequence[str], units: int) -> None:
        self.site, self.experts, self.names, self.units = site, experts, tuple(names), units
        self.state: dict[str, Tensor] = {}

    @abstractmethod
    def value(self, name: str) -> Tensor:
        """A tensor."""

    @abstractmethod
    def gradient(self, name: str) -> Tensor:
        """Its gradient: summed up over micro-batches and processes, and clipped. Only between backward and step."""

    @abstractmethod
    def set_value(self, name: str, value: Tensor) -> None:
        """Replace a tensor."""

    @abstractmethod
    def set_gradient(self, name: str, value: Tensor) -> None:
        """Replace a gradient. Where it is exactly zero the optimiser changes nothing: no value, no moment."""

    @abstractmethod
    def base_weight(self) -> Tensor:
        """W [O, D] of the base layer, float32 at least, dequantised; not to be changed."""

    @abstractmethod
    def set_noise(self, deviation: Tensor | None, seed: int = 0) -> None:
        """From now on forwards in training are those of W + E, E_ij ~ N(0, deviation_i^2) by a seed; None ends it."""


class Stepped:
    """Takes part in steps by overriding one of these. Nothing in them may depend on the process.

    Of objects that stand in every layer, the first one is asked, for all layers. A step from numbers that are not
    finite is skipped: then ``skip_step`` is called in place of ``before_step`` and ``after_step``.
    """

    def begin_step(self, layers: Sequence[Trained], now: Now) -> None:
        """Before the first micro-batch of a step."""

    def before_step(self, layers: Sequence[Trained], now: Now) -> None:
        """Between backward and step."""

    def skip_step(self, layers: Sequence[Trained], now: Now) -> None:
        """Between backward and a step that changes nothing."""

    def after_step(self, layers: Sequence[Trained], now: Now) -> None:
        """After the step."""

    @classmethod
    def overrides(cls, *names: str) -> bool:
        """Whether a subclass has one of these methods of its own."""
        return any(getattr(cls, name) is not getattr(Stepped, name) for name in names)
