"""Ranks: how many ranks each expert really uses, layer by layer. One file per way of allocating them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from moelora.core.factors import Factors
from moelora.core.module import ExactBuffers
from moelora.core.start import Start
from moelora.core.step import Stepped
from moelora.core.tape import Site


class Ranks(ExactBuffers, Stepped, ABC):
    """Stands between the factors of one site's experts and their use. It masks; nothing is ever resized.

    Subclasses take ``(site, num_experts, r)`` first and pass them on; recipe keys follow as keyword-only arguments. A
    rank is left out where its column of B is zero, and export drops it. State that decides which (masks, budgets) are
    persistent buffers, gates are parameters: both are saved with the router. What it changes from step to step it does
    in ``begin_step``, ``before_step`` and ``after_step`` of ``Stepped``, called on the first site's for all of them; a
    layer's own is ``layer.experts.allocator``, and its parameters are named ``allocator.NAME`` there.

    needs: what it needs of the experts, see ``Experts.gives``.
    """

    needs: ClassVar[tuple[str, ...]] = ("own_A",)

    def __init__(self, site: Site, num_experts: int, r: int) -> None:
        super().__init__()
        self.site, self.num_experts, self.r = site, num_experts, r

    def begin(self, start: Start) -> None:
        """Set own parameters and buffers, under no_grad, and before the initialiser sets the experts' factors."""

    @abstractmethod
    def forward(self, factors: Factors) -> Factors:
        """The factors with the ranks that are in use: A [R, D], B [O, R], scale [R]."""
