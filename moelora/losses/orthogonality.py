"""Orthogonality: keeps the rows of every expert's A, and the columns of its B, orthonormal.

    L = sum over experts e of ||A_e A_e^T - I||_F + ||B_e^T B_e - I||_F        I [r, r]

Paper: Wang et al., KaSA, arXiv 2412.06071 (ICLR 2025), eq. 11: its gamma is ``weight``, 1e-3 in the released code; as
PEFT has it. With ``squared`` the norms are squared: Zhang et al., AdaLoRA, arXiv 2303.10512 (ICLR 2023), eq. 4, with P
= B and Q = A.

Shapes: lora_A [E*r, D], lora_B [O, E*r], as they are trained, without scale or singular values; for all experts that
have such of their own. Summed over experts, so each is held as it would be alone; mean over layers. A factor that does
not train adds a constant. B = 0 at the start is sqrt(r) away; the gradient is zero there, and drives B on once the task
has moved it.

Differences: KaSA's released code takes the [D, D] and [O, O] products, which no A or B of rank r can bring to the
identity. It has the mean over layers, PEFT's KaSA the sum, PEFT's AdaLoRA the mean over all matrices, two to a layer,
of the norms that are not squared: our weight is half of its orth_reg_weight (0.5).

Recipe line: ``losses: {orthogonality: 0.001}`` or ``losses: {orthogonality: {weight: 0.1, squared: true}}``
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moelora.core.route import Route
from moelora.core.tape import View
from moelora.losses.base import Loss


class Orthogonality(Loss):
    """squared: square the norms. Raises ConfigError for ``tokens: answers`` and for experts that share an A or have
    none that is trained.
    """

    needs = ("own_A", "lora_A", "lora_B")
    of_tokens = "none"

    def __init__(self, weight: float, tokens: Literal["all", "answers"] = "all", *, squared: bool = False) -> None:
        super().__init__(weight, tokens)
        self.squared = squared

    def __call__(self, route: Route, view: View) -> Tensor:
        assert view.factors is not None
        parts, experts = view.factors.parts, view.factors.num_experts
        return self._distance(parts["lora_A"], experts) + self._distance(parts["lora_B"].t(), experts)

    def _distance(self, rows: Tensor, experts: int) -> Tensor:
        each = rows.to(torch.promote_types(rows.dtype, torch.float32)).unflatten(0, (experts, -1))
        gram = each @ each.mT
        off = gram - torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
        return (off.square() if self.squared else torch.linalg.vector_norm(off, dim=(1, 2))).sum()
