"""LoRA experts: free factors A and B per expert.

Paper: Hu et al., LoRA, arXiv 2106.09685; the mixture of E of them is one LoRA of rank E*r with gated ranks.
Shapes: lora_A [E*r, D], lora_B [O, E*r]; expert e owns rows (columns) e*r to (e+1)*r.

Experts read from DoRA adapters (Liu et al., arXiv 2402.09353) stretch the rows of B by m / ||W + s B A||, as they do
the base layer's output.

Recipe line: ``experts: {name: lora, num_experts: 8, r: 8, lora_alpha: 16}``
"""

from __future__ import annotations

import torch
from torch import nn

from moelora.core.factors import Factors
from moelora.core.tape import Site
from moelora.experts.base import Experts


class LoRA(Experts):
    """Both factors trained."""

    gives = ("own_A",)
    pairs = True

    def __init__(self, site: Site, num_experts: int, r: int) -> None:
        super().__init__(site, num_experts, r)
        self.lora_A = nn.Parameter(torch.empty(num_experts * r, site.in_features))
        self.lora_B = nn.Parameter(torch.empty(site.out_features, num_experts * r))

    def factors(self) -> Factors:
        return Factors(self.lora_A, self.lora_B, self.scale)
