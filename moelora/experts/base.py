"""Experts: low-rank factors from parameters. One file per parameterisation; it says what ``factors`` are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from moelora.core.factors import Factors
from moelora.core.module import ExactBuffers
from moelora.core.route import Route
from moelora.core.tape import Site
from moelora.ops import routed_lora

Decide = Callable[[Factors, Tensor | None], Route]
"""From the factors, and h = A x [T, R] if it was asked for, to the route of the tokens."""


class Experts(ExactBuffers, ABC):
    """All experts of one site, stacked. Parameters belong to this module and are read only inside its forward.

    Subclasses take ``(site, num_experts, r)`` first and pass them on; recipe keys follow as keyword-only arguments.

    gives: what routers and losses may need of it: ``"own_A"`` when every expert has its own rows of A and columns of B
        (R = num_experts * r), ``"shared_A"`` when all have one A (R = r), ``"core"`` when it fills ``Factors.core``.
    """

    gives: ClassVar[tuple[str, ...]]
    scale: Tensor

    def __init__(self, site: Site, num_experts: int, r: int) -> None:
        super().__init__()
        self.site, self.num_experts, self.r = site, num_experts, r
        self.anchored: tuple[str, ...] = ()
        self.register_buffer("scale", torch.ones(num_experts * r), persistent=False)

    @abstractmethod
    def factors(self) -> Factors:
        """The stacked factors; ``self.scale`` is the per-rank scale the layer has set."""

    def forward(
        self, x: Tensor, decide: Decide, form: Literal["tokens", "rank_space", "each", "sum"] = "tokens"
    ) -> Tensor:
        """The update [T, O] of tokens x [T, D], mixed as ``decide`` says.

        form: ``"rank_space"``: decide reads h = A x, computed once for it and for the update. ``"each"``: the update of
        every chosen expert apart, [T, k, O], without its gate. ``"sum"``: x [T, k, D] holds one row per chosen expert.
        """
        factors = self.anchored_factors()
        if form == "tokens":
            return routed_lora.apply(x, factors, decide(factors, None))
        if form != "rank_space":
            apply = routed_lora.apply_each if form == "each" else routed_lora.apply_sum
            return apply(x, factors, decide(factors, None))
        assert factors.A is not None
        h = routed_lora.down(x, factors.A)
        return routed_lora.apply(h, replace(factors, A=None), decide(factors, h))

    def anchored_factors(self) -> Factors:
        """``factors()``, with the anchors that losses may read."""
        if not self.anchored:
            return self.factors()
        pairs = ((parameter, getattr(self, f"anchor_{name}")) for name, parameter in self.named_parameters())
        return replace(self.factors(), anchors=tuple(pairs))

    def keep_scale(self) -> None:
        """Make the scale part of what is saved, where experts may have one each."""
        self.register_buffer("scale", self.scale)

    def keep_anchors(self) -> None:
        """Room for a copy of every parameter as it was at the start, for losses that pull back to it."""
        parameters = dict(self.named_parameters())
        self.anchored = tuple(parameters)
        for name, parameter in parameters.items():
            self.register_buffer(f"anchor_{name}", parameter.detach().clone())

    @torch.no_grad()
    def set_anchors(self) -> None:
        """Take the parameters of this moment as the start."""
        parameters = dict(self.named_parameters())
        for name in self.anchored:
            getattr(self, f"anchor_{name}").copy_(parameters[name])
