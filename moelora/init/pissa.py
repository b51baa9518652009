"""PiSSA: every expert starts from leading singular directions of the base weight, and the rest of it stays frozen.

Paper: Meng et al., "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
arXiv 2404.02948 (NeurIPS 2024). With W = U S V^T [O, D], the scale s of the expert and its r directions k:

    B = U_k (S_k / s)^(1/2)  [O, r],   A = (S_k / s)^(1/2) V_k^T  [r, D],   so that s B A = U_k S_k V_k^T

Expert e takes directions e r to (e + 1) r (``experts: slices``), or all take the first r (``same``). With one expert
it is the paper's. Defaults: an exact decomposition, as the authors and PEFT have it; ``niter`` is the fast one of both
("pissa_niter_16" there).

Difference from the paper: the base keeps W and the update is s (B A - B0 A0), where the paper trains s B A beside
W - s B0 A0. These are equal with one expert whose gate is 1; with gates, only ours leaves the model as it was at the
start. It costs a second, frozen pair of factors, and a plain LoRA of rank 2r when it is exported.

Recipe line: ``init: {name: pissa}`` with ``experts: {num_experts: 4, r: 8, lora_alpha: 8}``
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field

from moelora.core.start import Start
from moelora.init.base import Init, Share, halves, shares, spectrum


class PiSSA(Init):
    """experts: see above. niter: rounds of a randomised decomposition, for large layers; None is exact.

    Raises ConfigError for experts that are not just A and B, and where a layer has fewer directions than its experts
    take: min(O, D).
    """

    moves = True

    def __init__(self, *, experts: Share = "slices", niter: Annotated[int, Field(ge=1)] | None = None) -> None:
        self.experts, self.niter = experts, niter

    @torch.no_grad()
    def __call__(self, experts: Any, start: Start) -> None:
        A, B = halves("pissa", experts, alone=True)
        weight = start.weight()
        k = shares("pissa", self.experts, experts, min(weight.shape)).flatten()
        U, S, V = spectrum(weight, int(k.max()) + 1, self.niter)
        root = (S[k] / experts.scale.to(S)).sqrt()
        A.copy_(root.unsqueeze(1) * V[k])
        B.copy_(U[:, k] * root)
