"""LoRA-XS experts: a small trained matrix per expert between frozen factors that hold the layer's singular directions.

Paper: Bałazy et al., "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters", arXiv 2405.17604;
formulas from the released code. With W ~ U S V^T, its r largest singular values, and gates g of any router:

    A = S V^T,   B = U,   y = W x + (lora_alpha / r) B (sum_e g_e (M_e - M0_e)) A x

Shapes: basis_A (A) [r, D], basis_B (B) [O, r], one pair for all experts of a layer, zero beyond min(O, D) directions;
middle (M) [E, r, r], all that is trained: E r^2 parameters. M ~ N(0, 1e-5^2) and M0 = 0: the model starts next to the
base model, not on it. A, B and M0 (start_middle) are saved with the adapter, as large as one LoRA: loading needs no
SVD, and an initialiser may put others in their place (``init: lora_sb``).

The SVD is randomised, as in the released code: 10 power iterations, 10 directions more than r, always the same seed.

Differences from the released code: experts; and the SVD is of the float32 weights, whatever the model's dtype.

Recipe line: ``experts: {name: loraxs, num_experts: 8, r: 32, lora_alpha: 64}`` with ``router: {name: meteora}``
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moelora.core.directions import top_directions
from moelora.core.factors import Factors
from moelora.core.start import Start
from moelora.core.tape import Site
from moelora.experts.base import Experts


class LoRAXS(Experts):
    """Frozen A and B from the SVD of the base weight, a matrix M per expert. Exported as plain LoRAs: M A and B."""

    gives = ("shared_A", "core")
    computed = True
    basis_A: Tensor
    basis_B: Tensor
    start_middle: Tensor

    def __init__(self, site: Site, num_experts: int, r: int) -> None:
        super().__init__(site, num_experts, r)
        self.middle = nn.Parameter(torch.empty(num_experts, r, r))
        self.register_buffer("basis_A", torch.zeros(r, site.in_features))
        self.register_buffer("basis_B", torch.zeros(site.out_features, r))
        self.register_buffer("start_middle", torch.zeros(num_experts, r, r))
        self.register_buffer("scale", torch.ones(r), persistent=False)

    def begin(self, start: Start) -> None:
        nn.init.normal_(self.middle, std=1e-5)
        A, B = top_directions(start.weight(), self.r)
        self.basis_A[: len(A)], self.basis_B[:, : len(A)] = A, B

    def factors(self) -> Factors:
        return Factors(self.basis_A, self.basis_B, self.scale, self.middle - self.start_middle)
