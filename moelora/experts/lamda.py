"""LaMDA experts: frozen A, a square matrix per expert, and one B that is trained early and frozen column by column.

Paper: Azizi et al., "LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional Adaptation", arXiv
2406.12832 (EMNLP 2024 Findings). With W ~ U diag(S) V^T, its r largest singular values, s = lora_alpha / r and gates g
of any router:

    A = V^T,     y = W x + s B (sum_e g_e M_e) A x

    start: zero_core    B = U, M_e = 0                      the base model, bit for bit; M learns first
    start: spectral     B = U, M_e = diag(S) / s            and U diag(S) V^T is subtracted with each gate
    start: code         A as in LoRA, B = 0, M_e ~ U(+-1 / sqrt(r))

Shapes: basis_A (A) [r, D] is frozen, up (B) [O, r], middle (M) [E, r, r]. A and B are one for all experts of a layer.

At step t of T the first k = floor(r t / (freeze T)) columns of B, those of the largest singular values, rest for good,
and from freeze T on all do: then E r^2 parameters are trained. W is never changed, so start: spectral computes with
2 r ranks.

Defaults: freeze 0.3 as released. How the paper starts M is open to us; zero_core is ours, and the base model whatever
the gates.

Differences from the released code: it starts as ``code``; its k lacks the factor r, so that no more than three columns
are ever frozen; and it zeroes their gradients, while momentum and weight decay go on moving them.

The SVD is that of ``loraxs``. A is saved with the adapter. Exported to plain LoRA exactly, of rank r (spectral: 2 r).

Recipe line: ``experts: {name: lamda, num_experts: 8, r: 32, lora_alpha: 32}`` with ``router: {name: comol}``
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from moelora.core.directions import top_directions
from moelora.core.errors import ConfigError
from moelora.core.factors import Factors
from moelora.core.start import Start
from moelora.core.step import Now, Trained
from moelora.core.tape import Site
from moelora.experts.base import Experts


class LaMDA(Experts):
    """start: see above. freeze: the part of training after which B rests; 0 never trains it.

    Raises ConfigError for start: code where B does not train, and, with spectral, for routers that read A x.
    """

    gives: tuple[str, ...] = ("shared_A", "core")
    computed = True
    basis_A: Tensor
    start_up: Tensor
    start_middle: Tensor

    def __init__(
        self,
        site: Site,
        num_experts: int,
        r: int,
        *,
        start: Literal["zero_core", "spectral", "code"] = "zero_core",
        freeze: Annotated[float, Field(ge=0, le=1)] = 0.3,
    ) -> None:
        super().__init__(site, num_experts, r)
        self.start, self.freeze = start, freeze
        self.up = nn.Parameter(torch.empty(site.out_features, r))
        self.middle = nn.Parameter(torch.empty(num_experts, r, r))
        self.register_buffer("basis_A", torch.zeros(r, site.in_features))
        self.register_buffer("scale", torch.ones(r), persistent=False)
        if start == "spectral":
            self.gives = ()  # twice the ranks, half of which are the start's
            self.register_buffer("start_up", torch.zeros(site.out_features, r))
            self.register_buffer("start_middle", torch.zeros(r, r))

    def begin(self, start: Start) -> None:
        nn.init.zeros_(self.up)
        nn.init.zeros_(self.middle)
        if self.start == "code":
            if not self.up.requires_grad:
                raise ConfigError("experts.train: B starts at zero with experts.start: code, and has to be trained")
            nn.init.kaiming_uniform_(self.basis_A, a=math.sqrt(5))
            nn.init.uniform_(self.middle, -1, 1).div_(math.sqrt(self.r))
            return
        A, B = top_directions(start.weight(), self.r)
        self.basis_A[: len(A)], self.up[:, : len(A)] = F.normalize(A), B
        if self.start == "spectral":
            self.middle[:, range(len(A)), range(len(A))] = A.norm(dim=1) / self.scale[0]
            self.start_up.copy_(self.up)
            self.start_middle.copy_(self.middle[0])

    def factors(self) -> Factors:
        factors = Factors(self.basis_A, self.up, self.scale, self.middle)
        if self.start != "spectral":
            return factors
        both = torch.cat([self.middle, self.start_middle.to(self.middle).expand_as(self.middle)], 1)
        return replace(
            factors,
            A=F.pad(self.basis_A, (0, 0, 0, self.r)),  # M and its start see the same A x
            B=torch.cat([self.up, -self.start_up.to(self.up)], 1),
            scale=self.scale.repeat(2),
            core=F.pad(both, (0, self.r)),
        )

    def before_step(self, layers: Sequence[Trained], now: Now) -> None:
        end = self.freeze * now.steps
        resting = self.r if now.step >= end else int(self.r * now.step / end + 1e-9)
        for layer in layers:
            if resting and "up" in layer.names:
                gradient = layer.gradient("up").clone()
                gradient[:, :resting] = 0
                layer.set_gradient("up", gradient)
