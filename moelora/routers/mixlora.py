"""MixLoRA: every token passes a feed-forward block as its top-k experts adapt it, each with its own LoRAs inside.

Paper: Li et al., "MixLoRA", arXiv 2404.15159; formulas from the released code. With l = x Wg^T, S the k largest,
w = softmax(l_S), and frozen projections G, U, D of the block with activation act:

    y = sum_S w_e (D + s B_e A_e) [act((G + s B_e A_e) x) * ((U + s B_e A_e) x)]

each projection having LoRA factors of its own. G x, U x and D(...) are computed once per token, not once per expert: D
is linear and the w_e sum to 1 (``moelora.model.ffn``). Blocks without a gate (GPT-2, T5) work alike.

Shapes: weight (Wg) [E, D], from N(0, 0.02), one router per block; no bias. jitter: in training the router's input is
scaled by U(1 - jitter, 1 + jitter). The authors add ``losses: {balance: 0.001}``, over all layers together; here it is
the mean over layers.

attention: ``lora`` gives targets in attention one LoRA each, of rank r and always on, as the authors do; they have no
gates and no terms, are saved with expert 0, and of several adapters only the first may bring them. ``refuse``: targets
are blocks alone. Others are refused either way.

Differences from the released code: experts' dropout is off in evaluation (there it stays on); frozen products are not
repeated, also in the last projection.

Recipe line: ``router: {name: mixlora, top_k: 2, attention: lora}`` with ``target_modules: all-linear``
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from moelora.core.route import Route, top_k
from moelora.core.tape import Site, View
from moelora.routers.base import Router, check_top_k, linear_scores


class MixLoRA(Router):
    """Top-k experts around a feed-forward block. Raises ConfigError when top_k exceeds num_experts."""

    gives = ("logits", "probs")
    needs = ("own_A",)
    around = "ffn"

    def __init__(
        self,
        site: Site,
        num_experts: int,
        r: int,
        *,
        top_k: Annotated[int, Field(ge=1)] = 2,
        jitter: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        attention: Literal["refuse", "lora"] = "refuse",
    ) -> None:
        super().__init__(site, num_experts, r)
        check_top_k("mixlora", top_k, num_experts)
        self.top_k, self.jitter = top_k, jitter
        self.weight = nn.Parameter(torch.empty(num_experts, site.in_features))
        nn.init.normal_(self.weight, std=0.02)

    @classmethod
    def group(cls, site: Site, options: dict[str, Any]) -> str:
        return site.parent

    @classmethod
    def plain(cls, site: Site, options: dict[str, Any]) -> bool:
        return options["attention"] == "lora" and site.in_attention

    def forward(self, x: Tensor, view: View) -> Route:
        if self.training and self.jitter:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        logits = linear_scores(self.weight, x, view)
        index = view.once(lambda: top_k(logits, self.top_k))
        return Route(logits.gather(1, index).softmax(-1), self.num_experts, index, logits, logits.softmax(-1))
