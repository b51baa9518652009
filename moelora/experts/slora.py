"""SLoRA experts: LoRA with a trained square matrix between its two factors; alone trained, that is IntTune.

Paper: Guo et al., "NLoRA: Nyström-Initiated Low-Rank Adaptation for Large Language Models", arXiv 2502.14482; formulas
from the released code. With gates g of any router:

    y = W x + (lora_alpha / r) sum_e g_e B_e N_e A_e x

Shapes: lora_A (A) [E*r, D], middle (N) [E, r, r], lora_B (B) [O, E*r]; expert e owns rows (columns) e*r to (e+1)*r of A
and B. At the start N is Kaiming-uniform as A is, N ~ U(-1/sqrt(r), 1/sqrt(r)), and B = 0, so the model starts as the
base model. Initialisers of A and B leave N alone, but for those that say so.

``experts: {train: middle}`` is the paper's IntTune: N alone is trained. B = 0 would then stay zero, and N have no
gradient: A and B have to come from an initialiser that sets both, such as the paper's, ``init: nystrom``.

Recipe line: ``experts: {name: slora, num_experts: 8, r: 8, lora_alpha: 8}`` with ``router: {name: meteora}``
"""

from __future__ import annotations

import math

import torch
from torch import nn

from moelora.core.factors import Factors
from moelora.core.start import Start
from moelora.core.tape import Site
from moelora.experts.base import Experts


class SLoRA(Experts):
    """A, N and B per expert. Exported as plain LoRAs: A and B N."""

    gives = ("own_A",)
    computed = True

    def __init__(self, site: Site, num_experts: int, r: int) -> None:
        super().__init__(site, num_experts, r)
        self.lora_A = nn.Parameter(torch.empty(num_experts * r, site.in_features))
        self.middle = nn.Parameter(torch.empty(num_experts, r, r))
        self.lora_B = nn.Parameter(torch.empty(site.out_features, num_experts * r))

    def begin(self, start: Start) -> None:
        bound = 1 / math.sqrt(self.r)
        nn.init.uniform_(self.middle, -bound, bound)

    def factors(self) -> Factors:
        B = torch.einsum("oei,eij->oej", self.lora_B.unflatten(1, (self.num_experts, self.r)), self.middle)
        return Factors(self.lora_A, B.flatten(1), self.scale)
