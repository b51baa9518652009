"""Router: which experts, or ranks, each token uses. One file per router."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from moelora.core.module import ExactBuffers
from moelora.core.route import Route
from moelora.core.tape import Site, View


class Router(ExactBuffers, ABC):
    """The router of one site: pure given its parameters, the tokens and the view.

    Subclasses take ``(site, num_experts, r)`` first and pass them on; recipe keys follow as keyword-only arguments.
    What a subclass may state about itself:

    reads: ``"x"``, the projection's input, or ``"dropped"``, the same after the experts' dropout.
    gives: the optional fields of ``Route`` it fills, which losses may need.
    scale_rank: the rank that divides lora_alpha; the expert's rank r unless said otherwise.
    """

    reads: ClassVar[Literal["x", "dropped"]] = "x"
    gives: ClassVar[tuple[str, ...]] = ()

    def __init__(self, site: Site, num_experts: int, r: int) -> None:
        super().__init__()
        self.site, self.num_experts, self.r = site, num_experts, r

    @property
    def scale_rank(self) -> int:
        return self.r

    @abstractmethod
    def forward(self, x: Tensor, view: View) -> Route:
        """The route of tokens x [T, D]."""

    def after_step(self, load: Tensor) -> None:
        """Called once per optimiser step with the load [G] that ``view.count`` recorded since the last one, summed
        over processes. For balance rules that are not gradients."""


def linear_scores(weight: Tensor, x: Tensor) -> Tensor:
    """Router logits x W^T [T, G] in float32 at least, whatever the model's dtype."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.to(dtype) @ weight.to(dtype).t()


def reset_linear(weight: Tensor) -> None:
    """The default of ``torch.nn.Linear``: uniform in +-1/sqrt(D)."""
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
