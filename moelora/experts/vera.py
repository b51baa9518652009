"""VeRA experts: one frozen random pair A, B for the whole model, and two trained vectors per expert and layer.

Paper: Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation", arXiv 2310.11454 (ICLR 2024); the random pair as
in PEFT. With gates g of any router, and * element by element:

    y = W x + (lora_alpha / r) sum_e g_e b_e * (B (d_e * (A x)))

Shapes: A [r, widest D], B [widest O, r], of which a layer takes its first columns and rows; lambda_b (b) [E, O],
lambda_d (d) [E, r]: E (r + O) parameters per layer. A x is computed once for all experts. A and B are Kaiming-uniform,
A ~ U(-sqrt(6 / D), sqrt(6 / D)) and B with r for D, drawn on the CPU from ``seed`` and never saved. b = 0, so the model
starts as the base model; d = d_initial.

Differences from the paper: it has no scale; lora_alpha: r is the same. PEFT's pair of ``projection_prng_key`` is ours
of that seed. Its bases are those of the widest adapted layer, so other target_modules are other bases.

Recipe line: ``experts: {name: vera, num_experts: 8, r: 256, lora_alpha: 256}`` with ``router: {name: meteora}``
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from moelora.core.factors import Factors
from moelora.core.module import ExactBuffers
from moelora.core.start import Start
from moelora.core.tape import Site
from moelora.experts.base import Experts


class VeRA(Experts):
    """d_initial: what every d starts at. seed: of the random pair."""

    gives = ("shared_A",)
    computed = True
    bases: Bases

    def __init__(
        self, site: Site, num_experts: int, r: int, *, d_initial: float = 0.1, seed: Annotated[int, Field(ge=0)] = 0
    ) -> None:
        super().__init__(site, num_experts, r)
        self.d_initial, self.seed = d_initial, seed
        self.lambda_b = nn.Parameter(torch.empty(num_experts, site.out_features))
        self.lambda_d = nn.Parameter(torch.empty(num_experts, r))

    def meet(self, others: Sequence[Experts]) -> None:
        wide = max(other.site.in_features for other in others)
        out = max(other.site.out_features for other in others)
        bases: dict[torch.device, Bases] = {}  # a model may lie on several
        for other in others:
            device = other.scale.device
            if device not in bases:
                bases[device] = Bases(self.r, wide, out, self.seed, device)
            other.bases = bases[device]

    def begin(self, start: Start) -> None:
        nn.init.zeros_(self.lambda_b)
        nn.init.constant_(self.lambda_d, self.d_initial)

    def factors(self) -> Factors:
        A, B = self.bases.A[:, : self.site.in_features], self.bases.B[: self.site.out_features]
        each = B.unsqueeze(1) * self.lambda_d * self.lambda_b.t().unsqueeze(-1)  # [O, E, r]
        return Factors(A, each.flatten(1), self.scale)


class Bases(ExactBuffers):
    """The frozen pair, once for all layers of a device. Not saved: it comes from its seed."""

    A: Tensor
    B: Tensor

    def __init__(self, r: int, wide: int, out: int, seed: int, device: torch.device) -> None:
        super().__init__()
        made = torch.Generator("cpu").manual_seed(seed)
        for name, shape in (("A", (r, wide)), ("B", (out, r))):
            value = torch.empty(shape, device="meta" if device.type == "meta" else "cpu")
            bound = math.sqrt(6 / shape[1])
            if value.device.type != "meta":
                value.uniform_(-bound, bound, generator=made)
            self.register_buffer(name, value.to(device), persistent=False)
