"""Core experts: one pair A, B for all, and a small matrix per expert between them.

Paper: Zhang et al., CoMoL, arXiv 2603.00573 (ACL 2026 Findings), and its released code. With h = A x:

    expert_e(x) = (lora_alpha / r) B M_e h,     mixed per token:  (lora_alpha / r) B sum_e p_e (M_e h)

The products M_e h are mixed, not the cores, so no core per token is ever made. Shapes: lora_A [r, D], core [E, r, r],
lora_B [O, r]: r (D + O) + E r^2 parameters, however many experts.

Differences from the released code: it multiplies cores to a row vector (its core is our M_e transposed); it drops out
the merged core and the result besides x, here x alone, as in the paper.

Recipe line: ``experts: {name: core, num_experts: 8, r: 16, lora_alpha: 16}`` with ``router: {name: comol}``
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moelora.core.factors import Factors
from moelora.core.tape import Site
from moelora.experts.base import Experts


class Core(Experts):
    """A square core per expert in a shared low-rank space."""

    gives = ("shared_A", "core")

    def __init__(self, site: Site, num_experts: int, r: int) -> None:
        super().__init__(site, num_experts, r)
        self.lora_A = nn.Parameter(torch.empty(r, site.in_features))
        self.core = nn.Parameter(torch.empty(num_experts, r, r))
        self.lora_B = nn.Parameter(torch.empty(site.out_features, r))
        self.register_buffer("scale", torch.ones(r), persistent=False)

    def factors(self) -> Factors:
        return Factors(self.lora_A, self.lora_B, self.scale, self.core)


@torch.no_grad()
def joint_core_space(A: Tensor, B: Tensor, scale: Tensor, num_experts: int, q: int) -> tuple[Tensor, Tensor, Tensor]:
    """Trained LoRAs in one core space: (A [q, D], core [E, q, q], B [O, q]) with B core_e A ~ scale_e B_e A_e.

    A [E*r, D], B [O, E*r], scale [E*r]. The bases are the leading left singular vectors of all scaled B_e side by side
    and the right ones of all A_e on top of each other: exact once q reaches both their ranks (at most E*r), truncated
    below. In float64; not from the paper.
    """
    wide_A, wide_B = A.double(), B.double() * scale.double()
    V = torch.linalg.svd(wide_A, full_matrices=False)[2][:q]
    U = torch.linalg.svd(wide_B, full_matrices=False)[0][:, :q]
    inner_A = (wide_A @ V.t()).unflatten(0, (num_experts, -1))
    inner_B = (U.t() @ wide_B).unflatten(1, (num_experts, -1))
    core = torch.einsum("uer,erv->euv", inner_B, inner_A)
    return V.to(A.dtype), core.to(A.dtype), U.to(B.dtype)
