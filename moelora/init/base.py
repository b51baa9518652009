"""Init: the experts' starting point. One file per initialiser."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn


class Init(ABC):
    """Called once per site after the experts exist; recipe keys are keyword-only arguments of ``__init__``."""

    @abstractmethod
    def __call__(self, experts: nn.Module) -> None:
        """Set the parameters of ``experts`` in place, under no_grad."""
