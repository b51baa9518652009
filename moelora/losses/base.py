"""Loss: an auxiliary term of each routed layer, added to the training loss with its weight. One file per term."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from moelora.core.errors import ConfigError
from moelora.core.route import Route
from moelora.core.tape import View


class Loss(ABC):
    """A scalar per site from its route; the reported term is the mean over sites, in float32.

    needs: the optional fields of ``Route`` and ``Factors`` that the term reads; a router or experts without them are
        refused before training.
    expert_per_task: expert i stands for task i, so there must be as many experts as tasks.
    anchored: it reads ``view.factors.anchors``, the experts as they were at the start.
    of_tokens: what it is a mean over: ``"all"`` tokens that are not padding, those ``"followed"`` by another of their
        sequence, or ``"none"``: a term about the experts alone, which refuses ``tokens: answers``.
    Recipe keys are keyword-only arguments; ``weight`` and ``tokens`` are common to all.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    expert_per_task: ClassVar[bool] = False
    anchored: ClassVar[bool] = False
    of_tokens: ClassVar[Literal["all", "followed", "none"]] = "all"

    def __init__(self, weight: float, tokens: Literal["all", "answers"] = "all") -> None:
        """tokens: count every token that is not padding, or only those whose prediction carries loss."""
        if weight < 0:
            raise ConfigError(f"losses: a weight must not be negative, found {weight}")
        if tokens != "all" and self.of_tokens == "none":
            name = type(self).__module__.rpartition(".")[2]
            raise ConfigError(f"losses.{name} is about the experts and counts no tokens; leave out tokens: {tokens}")
        self.weight, self.tokens = weight, tokens

    @abstractmethod
    def __call__(self, route: Route, view: View) -> Tensor:
        """The term of one site, over the tokens of ``view.mask``; zero (with a graph) when there are none."""


def token_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of values [T, ...] over valid tokens; zero when none is valid. mask: [T] bool or None."""
    if mask is None:
        return values.sum(0) / max(1, values.shape[0])
    weight = mask.to(values.dtype)
    return (values * weight.view(-1, *[1] * (values.dim() - 1))).sum(0) / weight.sum().clamp(min=1)


def token_entropy(probs: Tensor) -> Tensor:
    """Entropy [T] of probabilities [T, G] in nats; 0 log 0 is 0, and its gradient is finite."""
    return -(probs * probs.clamp(min=torch.finfo(probs.dtype).tiny).log()).sum(-1)


def global_mean(values: Tensor, view: View) -> Tensor:
    """``token_mean`` without gradient, over the tokens of all processes while training.

    The other factor of a product of two means may stay local: with gradients averaged over processes, the sum is the
    product over the global batch. A recomputed (checkpointed) region reuses what the first pass found.
    """
    together = torch.is_grad_enabled() and torch.distributed.is_available() and torch.distributed.is_initialized()

    def mean() -> Tensor:
        if not together:
            return token_mean(values, view.mask)
        count = values.new_full((1,), len(values)) if view.mask is None else view.mask.sum().to(values.dtype).view(1)
        kept = values if view.mask is None else values * view.mask.to(values.dtype).unsqueeze(-1)
        total = torch.cat([kept.sum(0), count])
        torch.distributed.all_reduce(total)
        return total[:-1] / total[-1].clamp(min=1)

    return view.once(mean)
