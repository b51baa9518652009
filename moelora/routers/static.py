"""Static: one learned weight per expert and layer, the same for every token.

Paper: Prabhakar et al., "LoRA Soups: Merging LoRAs for Practical Skill Composition Tasks", arXiv 2410.13025 (COLING
2025 industry track); the learnable concatenation (CAT), formulas from the released code.

    y = W x + (lora_alpha / r) sum_e w_e B_e A_e x

    weights_fn: softmax   w = softmax(theta)   theta starts at 0, w at 1/E
                free      w = theta            theta starts at 1/E, and so does w
                sigmoid   w = sigmoid(theta)   theta starts at 0, w at 1/2, so they sum to E/2

Shapes: theta [E], one per adapted layer. No token is read, so a trained layer is one plain LoRA of rank E r: the rows
of all A_e, and the columns of all w_e B_e. The paper's second stage trains theta alone, on experts that are trained
already: ``experts: {train: none, adapters: [out/a, out/b]}``.

Differences from the released code: theta starts there as a draw from N(0, 1). With Adam a weight moves by about the
learning rate a step (0.1 in 1000 steps at 1e-4), so such a start is where it ends. Zero favours no expert. Choose a
learning rate near 1e-2 when theta alone is trained. The code has softmax only.

Recipe line: ``router: {name: static}`` or ``router: {name: static, weights_fn: free}``
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from moelora.core.route import Route
from moelora.core.tape import Site, View
from moelora.routers.base import Router


class Static(Router):
    """Gates that do not depend on the token. weights_fn: from theta to the gates."""

    def __init__(
        self,
        site: Site,
        num_experts: int,
        r: int,
        *,
        weights_fn: Literal["softmax", "free", "sigmoid"] = "softmax",
    ) -> None:
        super().__init__(site, num_experts, r)
        self.weights_fn = weights_fn
        self.theta = nn.Parameter(torch.full((num_experts,), 1 / num_experts if weights_fn == "free" else 0.0))

    @torch.no_grad()
    def constant_gates(self, task: int | None) -> Tensor:
        return self._gates(torch.promote_types(self.theta.dtype, torch.float32))

    def forward(self, x: Tensor, view: View) -> Route:
        gates = self._gates(torch.promote_types(x.dtype, torch.float32))
        return Route(gates.expand(x.shape[0], -1), self.num_experts)

    def _gates(self, dtype: torch.dtype) -> Tensor:
        theta = self.theta.to(dtype)
        return {"softmax": theta.softmax(-1), "free": theta, "sigmoid": theta.sigmoid()}[self.weights_fn]
