"""KaSA experts: updates in the form of a singular value decomposition, on a base without its smallest directions.

Paper: Wang et al., "KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models", arXiv 2412.06071 (ICLR
2025); formulas as in PEFT. With W = U diag(S) V^T, t its trunc_rank smallest singular values, and gates g of any
router:

    y = (W - U_t diag(S_t) V_t^T) x + (lora_alpha / r) sum_e g_e B_e (sigma_e * A_e x)

Shapes: lora_A [E*r, D], lora_B [O, E*r], sigma [E*r] ~ N(0, 1), which has B = 0 at the start. All experts stand on one
base, so what is cut off does not depend on gates: it is kept beside W as a frozen LoRA of rank t, ``fixed_A`` [t, D]
and ``fixed_B`` [O, t], and W is never changed. Without experts (``moelora.disabled``) W is whole. The model does NOT
start as the base model, but as W without these directions, ||U_t diag(S_t) V_t^T||_F^2 = sum S_t^2.

trunc_rank: r unless given, as in the paper. The paper adds two losses, ``spectrum`` (its beta, sum of sigma^2) and
``orthogonality`` (its gamma, of A and B), with weights tuned per task from 1e-5 to 1.

Differences from the released code: it keeps D - r directions of W, whatever O is, so that it cuts off O + r - D where O
< D < O + r, and nothing where D is larger still; here min(O, D) - r stay, as in PEFT. PEFT changes the weights of the
model, once and for all, and refuses Conv1D layers.

Saved with the router. Exported to plain LoRA exactly, on the W there was: an expert has rank r + t, a mixture with
constant gates E r + t.

Recipe line: ``experts: {name: kasa, num_experts: 4, r: 8, lora_alpha: 16}`` with
``losses: {spectrum: 0.0001, orthogonality: 0.001}``
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from moelora.core.errors import ConfigError
from moelora.core.factors import Factors
from moelora.core.start import Start
from moelora.core.tape import Site
from moelora.experts.base import Experts


class KaSA(Experts):
    """A, B and singular values per expert. trunc_rank: how many directions of W are cut off; None is r, 0 is none.

    Raises ConfigError where W has no more directions than that.
    """

    gives = ("own_A",)
    computed = True

    def __init__(
        self, site: Site, num_experts: int, r: int, *, trunc_rank: Annotated[int, Field(ge=0)] | None = None
    ) -> None:
        super().__init__(site, num_experts, r)
        self.lora_A = nn.Parameter(torch.empty(num_experts * r, site.in_features))
        self.lora_B = nn.Parameter(torch.empty(site.out_features, num_experts * r))
        self.sigma = nn.Parameter(torch.empty(num_experts * r))
        self.trunc_rank = r if trunc_rank is None else trunc_rank
        if self.trunc_rank:
            self.fixed_A = torch.zeros(self.trunc_rank, site.in_features)
            self.fixed_B = torch.zeros(site.out_features, self.trunc_rank)

    def begin(self, start: Start) -> None:
        nn.init.normal_(self.sigma)
        if self.fixed_A is None or self.fixed_B is None:
            return
        most, t = min(self.site.in_features, self.site.out_features), self.trunc_rank
        if t >= most:
            raise ConfigError(
                f"experts.kasa: trunc_rank {t} would leave nothing of the {most} directions of '{self.site.name}'; "
                "set a smaller trunc_rank, or leave the layer out with exclude_modules"
            )
        U, S, V = torch.linalg.svd(start.weight(), full_matrices=False)
        self.fixed_A.copy_(V[-t:])
        self.fixed_B.copy_(-U[:, -t:] * S[-t:])

    def factors(self) -> Factors:
        return Factors(self.lora_A, self.lora_B * self.sigma, self.scale)
