"""MeteoRA: a linear gate in every adapted projection picks the top-k of E LoRA experts per token.

Paper: Xu et al., "MeteoRA: Multiple-tasks Embedded LoRA", arXiv 2405.13053 (ICLR 2025); formulas from the released
code.

    l = x Wg^T;   S = k largest of l;   w = softmax(l_S / temperature);   y = W x + sum_S w_e (lora_alpha / r) B_e A_e x

Shapes: weight (Wg) [E, D], no bias; x is the projection's input before dropout. Softmax over the chosen logits equals
softmax over all, top-k, renormalised (at temperature 1). With top_k: 1 the gate is 1 and the language-model loss
gives it no gradient: pair it with the supervised gate loss, as the authors do.

Differences from the released code: the temperature there exists only in the accelerated path; the gate loss is
``losses: {supervised_gate: ...}`` (weight 50 there, with frozen adapters).

Recipe line: ``router: {name: meteora, top_k: 2}`` with ``losses: {supervised_gate: 0.1}``
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from moelora.core.route import Route, top_k
from moelora.core.tape import Site, View
from moelora.routers.base import Router, check_top_k, linear_scores, reset_linear


class MeteoRA(Router):
    """Expert-wise top-k. top_k: experts used per token. temperature: divides the chosen logits; large is uniform.

    Raises ConfigError when top_k exceeds num_experts.
    """

    scores = "weight"
    gives = ("logits", "probs")

    def __init__(
        self,
        site: Site,
        num_experts: int,
        r: int,
        *,
        top_k: Annotated[int, Field(ge=1)] = 2,
        temperature: Annotated[float, Field(gt=0)] = 1.0,
    ) -> None:
        super().__init__(site, num_experts, r)
        check_top_k("meteora", top_k, num_experts)
        self.top_k, self.temperature = top_k, temperature
        self.weight = nn.Parameter(torch.empty(num_experts, site.in_features))
        reset_linear(self.weight)

    def forward(self, x: Tensor, view: View) -> Route:
        logits = linear_scores(self.weight, x, view)
        index = view.once(lambda: top_k(logits, self.top_k))
        weight = (logits.gather(1, index) / self.temperature).softmax(-1)
        return Route(weight, self.num_experts, index, logits, logits.softmax(-1))
