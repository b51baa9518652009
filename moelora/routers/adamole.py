"""AdaMoLE: each token uses the experts whose probability passes a threshold that is learned too.

Paper: Liu and Luo, "AdaMoLE: Fine-Tuning Large Language Models with Adaptive Mixture of Low-Rank Adaptation Experts",
arXiv 2405.00361 (COLM 2024); formulas agree with the released code.

    p = softmax(x Wg^T);   tau = max_threshold * sigmoid(x Wt^T + bt)
    S = experts with p >= tau;   v_e = p_e - tau in S;   g_e = v_e / sum_S v, and 0 outside S
    y = W x + (lora_alpha / r) sum_S g_e B_e A_e x

Shapes: weight (Wg) [E, D] without bias, threshold_weight (Wt) [1, D], threshold_bias (bt) [1], initialised as
torch.nn.Linear; x is the projection's input before dropout. The gates are dense [T, E] with zeros. max_threshold is 1/E
unless given: tau then stays below the largest p, so a token has at least one expert. Above 1/E it may have none, and
gets the base layer alone. At 0 the router is a dense softmax.

The route has p - tau as its ``margin``, so ``losses: {balance: 0.01}`` is the paper's auxiliary loss
E sum_e frac_e mean(p_e - tau), with frac_e the share of tokens that use expert e. It may be negative.

Differences from the released code: the auxiliary loss is the mean over layers, there the sum, and leaves padding out;
an expert with p = tau exactly has gate 0 and does not count in frac; one dropout mask per layer, there one per expert.

Recipe line: ``router: {name: adamole}`` with ``losses: {balance: 0.01}``
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from moelora.core.route import Route
from moelora.core.tape import Site, View
from moelora.routers.base import Router, linear_scores, reset_linear


class AdaMoLE(Router):
    """Experts above an adaptive threshold. max_threshold: the largest threshold; None is 1 / num_experts."""

    scores = "weight"
    gives = ("logits", "probs")

    def __init__(
        self,
        site: Site,
        num_experts: int,
        r: int,
        *,
        max_threshold: Annotated[float, Field(ge=0, le=1)] | None = None,
    ) -> None:
        super().__init__(site, num_experts, r)
        self.max_threshold = 1 / num_experts if max_threshold is None else max_threshold
        self.weight = nn.Parameter(torch.empty(num_experts, site.in_features))
        self.threshold_weight = nn.Parameter(torch.empty(1, site.in_features))
        self.threshold_bias = nn.Parameter(torch.empty(1))
        reset_linear(self.weight)
        reset_linear(self.threshold_weight)
        nn.init.uniform_(self.threshold_bias, -1 / math.sqrt(site.in_features), 1 / math.sqrt(site.in_features))

    def forward(self, x: Tensor, view: View) -> Route:
        logits = linear_scores(self.weight, x, view)
        threshold = self.max_threshold * (linear_scores(self.threshold_weight, x) + self.threshold_bias).sigmoid()
        probs = logits.softmax(-1)
        margin = probs - threshold
        passed = view.once(lambda: margin >= 0)
        kept = margin.where(passed, 0)
        total = kept.sum(-1, keepdim=True)
        weight = kept / total.where(total != 0, 1)
        return Route(weight, self.num_experts, None, logits, probs, margin)
