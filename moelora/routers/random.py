"""Random: k experts per token by chance, each at 1/k. A baseline without trained parameters: sparsity alone.

Paper: none of its own; the fixed form is close to hash layers (Roller et al., arXiv 2106.04426).

    fixed: true    S = k largest of x R^T, R drawn once and never trained
    fixed: false   S = k experts drawn anew for every token in every forward
    y = W x + (1/k) (lora_alpha / r) sum_S B_e A_e x

Shapes: weight (R) [E, D] float32, N(0, 1), a buffer that is saved with the adapter; none with fixed: false.
With fixed: true the choice is a function of x alone: a token's experts are the same in training, in any batch, and when
decoding with or without a cache. Inputs share a common direction, so the experts' loads are not equal.
With fixed: false every expert has the same expected load, but a forward cannot be repeated: a token's output depends on
its place in the batch, and decoding with a cache differs from one long forward, also in eval mode. Draws come from
torch's generator. A checkpointed region draws as many numbers when it is recomputed, and uses the first choice.

Recipe line: ``router: {name: random, top_k: 2}``
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from moelora.core.route import Route, top_k
from moelora.core.tape import Site, View
from moelora.routers.base import Router, check_top_k, linear_scores


class Random(Router):
    """Chance as a router. top_k: experts used per token. fixed: by a frozen random projection of the token, or by a
    fresh draw.

    Raises ConfigError when top_k exceeds num_experts.
    """

    weight: Tensor

    def __init__(
        self,
        site: Site,
        num_experts: int,
        r: int,
        *,
        top_k: Annotated[int, Field(ge=1)] = 2,
        fixed: bool = True,
    ) -> None:
        super().__init__(site, num_experts, r)
        check_top_k("random", top_k, num_experts)
        self.top_k, self.fixed = top_k, fixed
        if fixed:
            self.register_buffer("weight", torch.randn(num_experts, site.in_features))

    def constant_gates(self, task: int | None) -> Tensor | None:
        return torch.full((self.num_experts,), 1 / self.top_k) if self.top_k == self.num_experts else None

    @torch.no_grad()
    def forward(self, x: Tensor, view: View) -> Route:
        # Drawn outside of view.once: a recomputed region must leave the generator where the first pass left it.
        drawn = (x.shape[0], self.num_experts)
        scores = linear_scores(self.weight, x) if self.fixed else torch.rand(drawn, device=x.device)
        index = view.once(lambda: top_k(scores, self.top_k))
        dtype = torch.promote_types(x.dtype, torch.float32)
        gates = torch.full((), 1 / self.top_k, dtype=dtype, device=x.device)
        return Route(gates.expand(index.shape), self.num_experts, index)
