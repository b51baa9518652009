"""CoMoL: a dense soft mixture of core matrices, routed in the rank space they live in.

Paper: Zhang et al., "CoMoL", arXiv 2603.00573 (ACL 2026 Findings); formulas agree with the released code. With h = A x:

    p = softmax(h Wg^T);   y = W x + (lora_alpha / r) B (sum_e p_e M_e) h

Shapes: weight (Wg) [E, r], no bias; M_e are the experts of ``experts: core``. Nothing is dropped, renormalised or
balanced. route_on: x is the paper's ablation "without core-space routing": p = softmax(x Wg^T) with Wg [E, D], x before
dropout; it serves ``experts: lora`` too. Parameters per layer: r (D + O) + E r^2 + E r, with route_on: x E D for the
last term.

Differences from the released code: the softmax is in float32, there in the module's dtype.

Recipe line: ``router: {name: comol}`` with ``experts: {name: core, num_experts: 8, r: 16, lora_alpha: 16}``
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from moelora.core.route import Route
from moelora.core.tape import Site, View
from moelora.routers.base import Router, linear_scores, reset_linear


class CoMoL(Router):
    """Softmax over all experts. route_on: h, the rank space of experts that share one A, or x, the layer's input.

    Experts that do not share one A are refused (ConfigError) with route_on: h.
    """

    gives = ("logits", "probs")

    def __init__(self, site: Site, num_experts: int, r: int, *, route_on: Literal["h", "x"] = "h") -> None:
        super().__init__(site, num_experts, r)
        self.reads = route_on
        self.needs = ("shared_A",) if route_on == "h" else ()
        self.weight = nn.Parameter(torch.empty(num_experts, r if route_on == "h" else site.in_features))
        reset_linear(self.weight)

    def forward(self, x: Tensor, view: View) -> Route:
        logits = linear_scores(self.weight, x)
        probs = logits.softmax(-1)
        return Route(probs, self.num_experts, None, logits, probs)
