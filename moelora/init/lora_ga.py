"""LoRA-GA: every expert starts along the gradient of the base weight, so that first steps go where full training's go.

Paper: Wang et al., "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", arXiv 2407.05000 (NeurIPS 2024);
formulas from the released code. With G = dL/dW [O, D] over a few batches, G = U S V^T, and 2r of its directions split
in two halves, k for A and l for B:

    A = (O^(1/4) / gamma^(1/2)) V_k^T  [r, D],   B = (O^(1/4) / gamma^(1/2)) U_l  [O, r]     (scale: stable)

direction: ``ArB2r``: A has the first half, B the second; ``A2rBr``: the other way round; ``ArBr``: B has the even ones,
A the odd. scale: ``unit``: neither factor is scaled; ``gd``: both are divided by s; ``weight``: both are multiplied by
the mean of (sigma_i / s)^(1/2) over the leading r singular values of W. Expert e takes directions 2 e r to 2 (e + 1) r
(``experts: slices``), or all take the first 2r (``same``); G is that of the base model, whatever the gates. Defaults
are the released code's: ArB2r, stable, gamma 16, a randomised decomposition (4r directions, 4 rounds).

Differences from the released code: the base keeps W and the update is s (B A - B0 A0), as in ``init: pissa``, so that a
quantised base will do as well. It has a fourth, random direction. PEFT's LoRA-GA puts S into B, and scales B alone by
``stable`` and by ``weight`` (sigma_1 / S_l1 there): ``form: peft``.

Cost: as many forward and backward passes as there are layers, times ``batches``; one layer's G at a time.

Recipe line: ``init: {name: lora_ga, experts: same, batches: 4}`` with ``experts: {num_experts: 4, use_rslora: true}``
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from moelora.core.start import Start
from moelora.init.base import Init, Share, halves, shares, spectrum


class LoRAGA(Init):
    """direction, scale, form, experts: see above. gamma: of scale stable. niter: rounds of the randomised
    decomposition; None is exact. batches: how many are looked at, at most, of batch_size training rows each.

    Raises ConfigError for experts that are not just A and B, and where a layer has fewer directions than its experts
    take: min(O, D).
    """

    moves = True
    probes = "gradients"

    def __init__(
        self,
        *,
        direction: Literal["ArB2r", "A2rBr", "ArBr"] = "ArB2r",
        scale: Literal["stable", "unit", "gd", "weight"] = "stable",
        gamma: Annotated[float, Field(gt=0)] = 16,
        form: Literal["authors", "peft"] = "authors",
        experts: Share = "slices",
        niter: Annotated[int, Field(ge=1)] | None = 4,
        batches: Annotated[int, Field(ge=1)] = 8,
        batch_size: Annotated[int, Field(ge=1)] = 8,
    ) -> None:
        self.direction, self.scale, self.gamma, self.form = direction, scale, gamma, form
        self.experts, self.niter, self.batches, self.batch_size = experts, niter, batches, batch_size

    @torch.no_grad()
    def __call__(self, experts: Any, start: Start) -> None:
        A, B = halves("lora_ga", experts, alone=True)
        assert start.gradient is not None
        r, many = experts.r, min(experts.site.in_features, experts.site.out_features)
        of = shares("lora_ga", self.experts, experts, many, width=2)  # [E, 2r]
        G = start.gradient()
        U, S, V = spectrum(G, int(of.max()) + 1, self.niter, spare=2)
        halved = {"ArB2r": (of[:, :r], of[:, r:]), "A2rBr": (of[:, r:], of[:, :r]), "ArBr": (of[:, 1::2], of[:, ::2])}
        k, up = halved[self.direction]
        s, peft = experts.scale.to(S), self.form == "peft"
        if self.scale == "unit":
            times = torch.ones_like(s)
        elif self.scale == "stable":
            times = torch.full_like(s, G.shape[0] ** 0.25 / self.gamma**0.5)
        elif self.scale == "gd":
            times = 1 / s
        else:
            strength = spectrum(start.weight(), r, self.niter, spare=4)[1].to(S)
            first = S[up[:, 0]].repeat_interleave(r)
            times = strength[0] / first if peft else (strength / s.unsqueeze(1)).sqrt().mean(1)
        both = not peft or self.scale == "gd"
        A.copy_(V[k.flatten()] * (times.unsqueeze(1) if both else 1))
        B.copy_(U[:, up.flatten()] * times * (S[up.flatten()] if peft else 1))
