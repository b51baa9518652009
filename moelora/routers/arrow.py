"""Arrow: routes by the direction of the input that each trained expert acts on most; nothing is learned.

Paper: Ostapenko et al., "Towards Modular LLMs by Building and Reusing a Library of LoRAs", arXiv 2405.11157 (ICML
2024); formulas as in PEFT. With v_e the first right singular vector of B_e A_e, of unit length:

    l_e = |x . v_e|;   S = k largest of l;   w = softmax(l_S / temperature)
    y = W x + sum_S w_e (lora_alpha / r) B_e A_e x

Shapes: prototypes (v) [E, D] float32, a saved buffer; x is the projection's input before dropout. Prototypes are taken
when the experts have their first values, so these must be trained ones: ``experts: {train: none, adapters: [..]}``. An
expert that is all zero has prototype zero. The largest entry of a prototype is positive; the score does not ask.

Differences from PEFT: the exact vector, in float64 from the QR factors of B_e and A_e^T; there 15 steps of power
iteration in float32 from a seeded vector, which still point elsewhere when the first two singular values are close (the
same choices in small cases, other weights). There dropout is applied to the update, here to the experts' input.

Recipe line: ``router: {name: arrow, top_k: 3}`` with ``experts: {train: none, adapters: [out/a, out/b]}``
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from moelora.core.factors import Factors
from moelora.core.route import Route, top_k
from moelora.core.tape import Site, View
from moelora.routers.base import Router, check_top_k, linear_scores


class Arrow(Router):
    """Expert-wise top-k without parameters. top_k: experts used per token. temperature: divides the chosen scores.

    Raises ConfigError when top_k exceeds num_experts.
    """

    gives = ("logits", "probs")
    needs = ("own_A",)
    prototypes: Tensor

    def __init__(
        self,
        site: Site,
        num_experts: int,
        r: int,
        *,
        top_k: Annotated[int, Field(ge=1)] = 3,
        temperature: Annotated[float, Field(gt=0)] = 1.0,
    ) -> None:
        super().__init__(site, num_experts, r)
        check_top_k("arrow", top_k, num_experts)
        self.top_k, self.temperature = top_k, temperature
        self.register_buffer("prototypes", torch.zeros(num_experts, site.in_features))

    @torch.no_grad()
    def prepare(self, factors: Factors) -> None:
        """Set the prototypes from A [R, D] and B [O, R]; on the meta device they stay zero."""
        A, B = factors.A, factors.B * factors.scale
        if A is None or A.is_meta:
            return
        down = A.double().unflatten(0, (self.num_experts, -1)).transpose(1, 2)  # [E, D, r]
        up = B.double().unflatten(1, (self.num_experts, -1)).transpose(0, 1)  # [E, O, r]
        basis, inner = torch.linalg.qr(down)
        core = torch.linalg.qr(up, mode="r").R @ inner.transpose(1, 2)  # B_e A_e between orthonormal bases
        _, strength, right = torch.linalg.svd(core, full_matrices=False)
        v = (basis @ right[:, 0].unsqueeze(-1)).squeeze(-1)
        sign = v.gather(1, v.abs().argmax(1, keepdim=True)).sign()
        self.prototypes.copy_(v * sign * (strength[:, :1] > 0))

    def forward(self, x: Tensor, view: View) -> Route:
        scores = linear_scores(self.prototypes, x).abs()
        index = view.once(lambda: top_k(scores, self.top_k))
        weight = (scores.gather(1, index) / self.temperature).softmax(-1)
        return Route(weight, self.num_experts, index, scores, (scores / self.temperature).softmax(-1))
