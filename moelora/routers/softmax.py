"""Softmax: a linear gate mixes all E experts of every token, or the k it scores highest.

Paper: Zadouri et al., "Pushing Mixture of Experts to the Limit" (MoLoRA), arXiv 2309.05444 (ICLR 2024); Dou et al.,
"LoRAMoE", arXiv 2312.09979 (ACL 2024); Tian et al., "HydraLoRA", arXiv 2404.19245 (NeurIPS 2024). One gate for all:

    l = x Wg^T / temperature;   p = softmax(l);   y = W x + (lora_alpha / r) sum_e g_e B_e A_e x

    top_k not given       g = p, dense
    top_k, renorm: true   g = softmax of the k largest l, which is p of these divided by its sum; gradient to these only
    top_k, renorm: false  g = p of the k largest; it sums to less than 1, and every logit gets gradient

Shapes: weight (Wg) [E, D], no bias, initialised as torch.nn.Linear; x is the projection's input before dropout. With
top_k: 1 and renorm the gate is 1 and the language-model loss gives it no gradient: add a loss, or set renorm: false.
The papers route densely. They differ in the rest: HydraLoRA's experts share one A, LoRAMoE adapts feed-forward layers
only and adds a loss that balances groups of experts.

Differences from the released code: LoRAMoE and HydraLoRA draw a dropout mask per expert, here one per layer; the
temperature, top_k and attention (from LoRAMoE as in MoE-PEFT) are additions.

Recipe line: ``router: {name: softmax}`` or ``router: {name: softmax, top_k: 2, renorm: false}``
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from moelora.core.route import Route, top_k
from moelora.core.tape import Site, View
from moelora.routers.base import Router, check_top_k, linear_scores, reset_linear


class Softmax(Router):
    """Softmax over experts. temperature: divides the logits. top_k: experts used per token, None for all; equal logits
    go to the lowest index. renorm: the gates of the chosen sum to 1; means nothing without top_k. attention: ``lora``
    gives targets in attention one expert each, always on and without terms, in place of routed ones.

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
        temperature: Annotated[float, Field(gt=0)] = 1.0,
        top_k: Annotated[int, Field(ge=1)] | None = None,
        renorm: bool = True,
        attention: Literal["experts", "lora"] = "experts",
    ) -> None:
        super().__init__(site, num_experts, r)
        check_top_k("softmax", top_k, num_experts)
        self.temperature, self.top_k, self.renorm = temperature, top_k, renorm
        self.weight = nn.Parameter(torch.empty(num_experts, site.in_features))
        reset_linear(self.weight)

    @classmethod
    def plain(cls, site: Site, options: dict[str, Any]) -> bool:
        return options["attention"] == "lora" and site.in_attention

    def forward(self, x: Tensor, view: View) -> Route:
        logits = linear_scores(self.weight, x, view) / self.temperature
        probs = logits.softmax(-1)
        if self.top_k is None:
            return Route(probs, self.num_experts, None, logits, probs)
        k = self.top_k
        index = view.once(lambda: top_k(logits, k))
        weight = logits.gather(1, index).softmax(-1) if self.renorm else probs.gather(1, index)
        return Route(weight, self.num_experts, index, logits, probs)
