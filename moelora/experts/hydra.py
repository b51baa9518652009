"""HydraLoRA experts: one down factor for all, and an up factor (a head) per expert.

Paper: Tian et al., "HydraLoRA: An Asymmetric LoRA Architecture for Efficient Fine-Tuning", arXiv 2404.19245 (NeurIPS
2024); formulas from the released code. With gates g of any router:

    y = W x + (lora_alpha / r) sum_e g_e B_e A x

Shapes: lora_A [r, D], lora_B [O, E*r]; head e owns columns e*r to (e+1)*r. A x is computed once, so parameters are
r D + E r O per layer. The paper's gate is a softmax over all heads, ``router: softmax``.

Differences from the released code: it multiplies by A anew for every head, each time with another dropout mask; here
all heads see one masked input. The paper finds the number of heads by clustering the data; here it is num_experts.

Recipe line: ``experts: {name: hydra, num_experts: 4, r: 4, lora_alpha: 32}`` with ``router: {name: softmax}``
"""

from __future__ import annotations

import torch
from torch import nn

from moelora.core.factors import Factors
from moelora.core.tape import Site
from moelora.experts.base import Experts


class Hydra(Experts):
    """A shared A, num_experts heads B_e. Saved with the router, not as LoRAs of their own."""

    gives = ("shared_A",)

    def __init__(self, site: Site, num_experts: int, r: int) -> None:
        super().__init__(site, num_experts, r)
        self.lora_A = nn.Parameter(torch.empty(r, site.in_features))
        self.lora_B = nn.Parameter(torch.empty(site.out_features, num_experts * r))

    def factors(self) -> Factors:
        return Factors(self.lora_A, self.lora_B, self.scale)
