"""Loss: an auxiliary term of each routed layer, added to the training loss with its weight. One file per term."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from moelora.core.errors import ConfigError
from moelora.core.route import Route
from moelora.core.tape import View


class Loss(ABC):
    """A scalar per site from its route; the reported term is the mean over sites, in float32.

    needs: the optional fields of ``Route`` the term reads; a router without them is refused before training.
    expert_per_task: expert i stands for task i, so there must be as many experts as tasks.
    Recipe keys are keyword-only arguments; ``weight`` is common to all.
    """

    needs: tuple[str, ...] = ()
    expert_per_task: bool = False

    def __init__(self, weight: float) -> None:
        if weight < 0:
            raise ConfigError(f"losses: a weight must not be negative, found {weight}")
        self.weight = weight

    @abstractmethod
    def __call__(self, route: Route, view: View) -> Tensor:
        """The term of one site, over valid tokens only; zero (with a graph) when there are none."""


def token_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of values [T, ...] over valid tokens; zero when none is valid. mask: [T] bool or None."""
    if mask is None:
        return values.sum(0) / max(1, values.shape[0])
    weight = mask.to(values.dtype)
    return (values * weight.view(-1, *[1] * (values.dim() - 1))).sum(0) / weight.sum().clamp(min=1)
