"""AltLoRA+: AltLoRA whose aligned momentum is divided by the size of its steps, as Adam does.

Paper: Yu et al., arXiv 2505.12455 (NeurIPS 2025), and its released code. With a*, Q and M_A of ``altlora``:

    v_A = beta2 v_A + (1 - beta2) a*^2                           elementwise
    M_A = beta1 Q M_A + (1 - beta1) a*
    A -= lr ((M_A / (1 - beta1^t)) / (sqrt(v_A) + eps) + decay A),   and B likewise

v is not corrected for its start from zero, as in the released code: the first steps are 1 / sqrt(1 - beta2) times
Adam's. Unlike AltLoRA's, its path depends on how the update is split into A and B. State: as AltLoRA's, and v.

Defaults: betas, eps 1e-4 and ridge 1e-5 as the released trainer passes them.

Differences from the released code: it keeps beta1 M + (1 - beta1) a*, not aligned, for the next step (compat: true
does, too); 1/s^2, ridge and turns are as in ``altlora``.

Recipe line: ``optim: {name: altlora_plus, period: 10}``
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from moelora.optim.altlora import AltLoRA
from moelora.optim.base import Pair


class AltLoRAPlus(AltLoRA):
    """period, beta1, ridge: see AltLoRA. beta2, eps: of the division. compat: the released code's memory.

    Raises ConfigError for experts that do not train both A and B, or whose update is no sum of pairs.
    """

    def __init__(
        self,
        *,
        period: Annotated[int, Field(ge=1)] = 10,
        beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9,
        beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999,
        eps: Annotated[float, Field(gt=0)] = 1e-4,
        ridge: Annotated[float, Field(ge=0)] = 1e-5,
        compat: bool = False,
    ) -> None:
        super().__init__(period=period, beta1=beta1, ridge=ridge)
        self.beta2, self.eps, self.compat = beta2, eps, compat

    def momentum(
        self, pair: Pair, key: str, best: Tensor, aligned: Tensor, M: Tensor, count: Tensor, mine: Tensor
    ) -> tuple[Tensor, Tensor]:
        first, kept = super().momentum(pair, key, best, aligned, M, count, mine)
        v = pair.state.get(f"v_{key}", torch.zeros_like(best))
        v = pair.state[f"v_{key}"] = torch.where(mine, torch.lerp(best * best, v, self.beta2), v)
        return first / (v.sqrt() + self.eps), torch.lerp(best, M, self.beta1) if self.compat else kept
