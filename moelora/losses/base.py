"""Loss: an auxiliary term of each routed layer, or of the model's output, added to the training loss with its weight.
One file per term."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor

from moelora.core.errors import ConfigError
from moelora.core.route import Route
from moelora.core.tape import View
from moelora.core.term import Product


class Loss:
    """A scalar per site from its route; the reported term is the mean over sites, in float32. Or one of the logits.

    reads: ``"layers"``: the term is that of ``__call__``, or ``"logits"``: that of ``of_logits``.
    needs: the optional fields of ``Route`` and ``Factors`` that the term reads, what it needs of experts
        (``Experts.gives``), and their parameters (``Factors.parts``) by name; a router or experts without them are
        refused before training.
    expert_per_task: expert i stands for task i, so there must be as many experts as tasks.
    anchored: it reads ``view.factors.anchors``, the experts as they were at the start.
    of_tokens: what it is a mean over: ``"all"`` tokens that are not padding, those ``"followed"`` by another of their
        sequence, or ``"none"``: a term about the experts alone, which refuses ``tokens: answers``.
    Recipe keys are keyword-only arguments; ``weight`` and ``tokens`` are common to all.
    """

    reads: ClassVar[Literal["layers", "logits"]] = "layers"
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
        wanted = "__call__" if self.reads == "layers" else "of_logits"
        if getattr(type(self), wanted) is getattr(Loss, wanted):
            raise TypeError(f"{type(self).__name__} reads {self.reads} and has no {wanted}")
        self.weight, self.tokens = weight, tokens

    def admit(self, units: int) -> None:
        """Raise ConfigError for routers of so many units, if the term is not for them. Most are for all."""

    def __call__(self, route: Route, view: View) -> Tensor | Product:
        """The term of one site, over the tokens of ``view.mask``; zero (with a graph) when there are none.

        A product of two means over tokens is given as a ``Product`` (``product`` makes one).
        """
        raise NotImplementedError

    def of_logits(self, logits: Tensor, base: Callable[[], Tensor]) -> Tensor:
        """The term of the model, of the logits [M, V] of the M tokens that count, float32; zero with a graph for M = 0.

        base(): those of the base model [M, V], without gradient, from a pass that is made when it is first asked for.
        """
        raise NotImplementedError


def token_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of values [T, ...] over valid tokens; zero when none is valid. mask: [T] bool or None."""
    if mask is None:
        return values.sum(0) / max(1, values.shape[0])
    weight = mask.to(values.dtype)
    return (values * weight.view(-1, *[1] * (values.dim() - 1))).sum(0) / weight.sum().clamp(min=1)


def token_entropy(probs: Tensor) -> Tensor:
    """Entropy [T] of probabilities [T, G] in nats; 0 log 0 is 0, and its gradient is finite."""
    return -(probs * probs.clamp(min=torch.finfo(probs.dtype).tiny).log()).sum(-1)


def product(values: Tensor, P: Tensor, view: View, rest: Tensor | None = None) -> Product:
    """``sum_u f_u P_u + rest``, f the mean of values [T, G] over the valid tokens of all processes; P [G]."""
    values = values.detach()
    if view.mask is None:
        return Product(values.sum(0), values.new_full((1,), len(values)), P, rest)
    weight = view.mask.to(values.dtype)
    return Product((values * weight.unsqueeze(-1)).sum(0), weight.sum().view(1), P, rest)
