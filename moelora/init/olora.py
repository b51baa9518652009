"""OLoRA: every expert starts from orthonormal columns of the base weight's QR decomposition, and the rest stays frozen.

Paper: Büyükakyüz, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", arXiv 2406.01775; formulas as in
PEFT. With W = Q R [O, D] (thin: Q [O, min(O, D)]) and the expert's r columns k:

    B = Q[:, k]  [O, r],   A = R[k, :]  [r, D],   so that B^T B = I

Expert e takes columns e r to (e + 1) r (``experts: slices``), or all take the first r (``same``). The scale is not
divided out: s B A is s times that part of W.

Differences from PEFT: the base keeps W and the update is s (B A - B0 A0), where PEFT trains s B A beside W - s B0 A0.
These are equal with one expert whose gate is 1; with gates, only ours leaves the model as it was at the start. PEFT
decomposes the stored weight, which GPT-2's Conv1D holds transposed; here it is always W [O, D].

Recipe line: ``init: {name: olora}`` with ``experts: {num_experts: 4, r: 8, lora_alpha: 8}``
"""

from __future__ import annotations

from typing import Any

import torch

from moelora.core.start import Start
from moelora.init.base import Init, Share, halves, shares


class OLoRA(Init):
    """experts: see above.

    Raises ConfigError for experts that are not just A and B, and where a layer has fewer columns of Q than its experts
    take: min(O, D).
    """

    moves = True

    def __init__(self, *, experts: Share = "slices") -> None:
        self.experts = experts

    @torch.no_grad()
    def __call__(self, experts: Any, start: Start) -> None:
        A, B = halves("olora", experts, alone=True)
        Q, R = torch.linalg.qr(start.weight())
        k = shares("olora", self.experts, experts, Q.shape[1]).flatten()
        A.copy_(R[k])
        B.copy_(Q[:, k])
