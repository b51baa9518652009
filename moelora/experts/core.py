"""Core experts: one pair A, B for all, and a small matrix per expert between them.

Paper: Zhang et al., CoMoL, arXiv 2603.00573 (ACL 2026 Findings), and its released code. With h = A x:

    expert_e(x) = (lora_alpha / r) B M_e h,     mixed per token:  (lora_alpha / r) B sum_e p_e (M_e h)

The products M_e h are mixed, not the cores, so no core per token is ever made. Shapes: lora_A [r, D], core [E, r, r],
lora_B [O, r]: r (D + O) + E r^2 parameters.

Differences from the released code: it multiplies cores to a row vector (its core is our M_e transposed); it drops out
the merged core and the result besides x, here x alone, as in the paper.

Trained LoRAs of any rank and scale can start it, see ``joint_core_space``: ``adapters: [out/a, out/b]``.

Recipe line: ``experts: {name: core, num_experts: 8, r: 16, lora_alpha: 16}`` with ``router: {name: comol}``
"""

from __future__ import annotations

from collections.abc import Sequence

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
def joint_core_space(loras: Sequence[tuple[Tensor, Tensor]], q: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """Trained LoRAs (A_e [r_e, D], B_e [O, r_e]), scales in B_e, in one core space of rank q; not from the paper.

    Gives (A [m, D], core [E, n, m], B [O, n], error) in float64 with B core_e A ~ B_e A_e and m, n <= q: B holds the
    leading left singular vectors of all products B_e A_e side by side, A the right ones of all on top of each other.
    Exact once q reaches both their ranks (at most the sum of r_e). error: ||B core A - B_e A_e|| / ||B_e A_e||, all
    experts together. How a product is split into its factors makes no difference.
    """
    wide = [(A.double(), B.double()) for A, B in loras]
    # U S V of [B_1 A_1, B_2 A_2, ...] is that of [B_1 R_1^T, ...], where A_e^T = Q_e R_e; likewise for the rows.
    U = torch.linalg.svd(torch.cat([B @ _triangle(A.t()).t() for A, B in wide], 1), full_matrices=False)[0][:, :q]
    V = torch.linalg.svd(torch.cat([_triangle(B) @ A for A, B in wide]), full_matrices=False)[2][:q]
    core = torch.stack([(U.t() @ B) @ (A @ V.t()) for A, B in wide])
    lost = [_norm(torch.cat([B, -U @ inner], 1), torch.cat([A, V])) for (A, B), inner in zip(wide, core, strict=True)]
    whole = torch.stack([_norm(B, A) for A, B in wide]).norm()
    return V, core, U, float(torch.stack(lost).norm() / whole) if whole > 0 else 0.0


def _triangle(wide: Tensor) -> Tensor:
    return torch.linalg.qr(wide).R


def _norm(left: Tensor, right: Tensor) -> Tensor:
    """Frobenius norm of left right, never multiplied out."""
    return (_triangle(left) @ _triangle(right.t()).t()).norm()
