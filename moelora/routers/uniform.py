"""Uniform: every expert always on, each at 1/E. A baseline without parameters: what a mixture is without its router.

Paper: none. The mean of E experts is what a dense softmax router gives when it cannot tell them apart.

    y = W x + (1/E) (lora_alpha / r) sum_e B_e A_e x

Shapes: no parameters, no buffers. It is one plain LoRA of rank E r, its update divided by E. Experts differ by their
initialisation alone.

Recipe line: ``router: {name: uniform}``
"""

from __future__ import annotations

import torch
from torch import Tensor

from moelora.core.route import Route
from moelora.core.tape import View
from moelora.routers.base import Router


class Uniform(Router):
    """Gate 1/E for each of E experts. No options."""

    def constant_gates(self, task: int | None) -> Tensor:
        return torch.full((self.num_experts,), 1 / self.num_experts)

    def forward(self, x: Tensor, view: View) -> Route:
        dtype = torch.promote_types(x.dtype, torch.float32)
        gates = torch.full((), 1 / self.num_experts, dtype=dtype, device=x.device)
        return Route(gates.expand(x.shape[0], self.num_experts), self.num_experts)
