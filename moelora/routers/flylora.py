"""FlyLoRA: a frozen sparse random A is the router; each token uses the ranks that answer it most strongly.

Paper: Zou et al., "FlyLoRA: Boosting Task Decoupling and Parameter Efficiency via Implicit Rank-Wise
Mixture-of-Experts", arXiv 2510.08396 (NeurIPS 2025); formulas from the released code. With h = A x, balance bias d and
S the top_k largest of |h + d|:

    y = W x + (lora_alpha / r) sum_S b_i h_i

Gates are one, so the choice has no gradient and there is nothing to train here. Shapes: bias (d) [R] float32,
R = num_experts * r; with num_experts: 1, r is the paper's. A is frozen by ``experts: {train: B}`` and drawn by
``init: {name: sparse}``, whose density is top_k / r in the paper. Once per optimiser step
d_i += bias_update_rate * sign(mean load - load_i), counted on valid tokens; d enters the choice, not the values.

select: abs chooses by |h + d|, signed by h + d. bias_update_rate: 0 turns balancing off.

Differences from the released code, of which there are two: one file chooses by |h + d| with a rate of 1e-3 and an
update that the caller runs (the defaults here); a patch of PEFT chooses by h + d with 1e-2, updates in every forward,
in evaluation too, and passes no gradient through A to x. Here x always gets its gradient.

Recipe line: ``router: {name: flylora, top_k: 8}`` with ``experts: {r: 32, train: B}`` and ``init: {name: sparse}``
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from moelora.core.route import Route, top_k
from moelora.core.tape import Site, View
from moelora.routers.base import Router, check_top_k, level_by_sign


class FlyLoRA(Router):
    """Rank-wise top-k of the rank space itself. top_k: ranks used per token. select, bias_update_rate: see above.

    Raises ConfigError when top_k exceeds the ranks.
    """

    reads = "h"
    needs = ("own_A",)
    bias: Tensor

    def __init__(
        self,
        site: Site,
        num_experts: int,
        r: int,
        *,
        top_k: Annotated[int, Field(ge=1)] = 8,
        select: Literal["abs", "signed"] = "abs",
        bias_update_rate: Annotated[float, Field(ge=0)] = 1e-3,
    ) -> None:
        super().__init__(site, num_experts, r)
        self.units = num_experts * r
        check_top_k("flylora", top_k, self.units, "ranks (num_experts * r)")
        self.top_k, self.select, self.bias_update_rate = top_k, select, bias_update_rate
        self.register_buffer("bias", torch.zeros(self.units))

    def constant_gates(self, task: int | None) -> Tensor | None:
        return torch.ones(self.units) if self.top_k == self.units else None

    def forward(self, x: Tensor, view: View) -> Route:
        wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        biased = wide + self.bias.to(wide.dtype)
        index = view.once(lambda: top_k(biased.abs() if self.select == "abs" else biased, self.top_k))
        route = Route(torch.ones_like(index, dtype=wide.dtype), self.units, index)
        if self.training and self.bias_update_rate:
            view.count(route.load(view.mask))
        return route

    def after_step(self, load: Tensor) -> None:
        level_by_sign(self.bias, load, self.bias_update_rate)
