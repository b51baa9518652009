"""Experts: low-rank factors from parameters. One file per parameterisation; it says what ``factors`` are."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from moelora.core.factors import Factors
from moelora.core.module import ExactBuffers
from moelora.core.route import Route
from moelora.core.tape import Site
from moelora.ops import routed_lora


class Experts(ExactBuffers, ABC):
    """All experts of one site, stacked. Parameters belong to this module and are read only inside its forward.

    Subclasses take ``(site, num_experts, r)`` first and pass them on; recipe keys follow as keyword-only arguments.
    """

    scale: Tensor

    def __init__(self, site: Site, num_experts: int, r: int) -> None:
        super().__init__()
        self.site, self.num_experts, self.r = site, num_experts, r
        self.register_buffer("scale", torch.ones(num_experts * r), persistent=False)

    @abstractmethod
    def factors(self) -> Factors:
        """The stacked factors; ``self.scale`` is the per-rank scale the layer has set."""

    def forward(self, x: Tensor, route: Route) -> Tensor:
        """The update [T, O] of tokens x [T, D] mixed as ``route`` says."""
        return routed_lora.apply(x, self.factors(), route)
