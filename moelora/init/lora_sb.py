"""LoRA-SB: the frozen factors of LoRA-XS experts and what is trained between them start as full training's first step.

Paper: Ponkshe et al., "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank
Fine-Tuning", arXiv 2411.19557; formulas from the released code. For experts with one frozen A and B for all and a
matrix M each between them (``experts: loraxs``), with G = dL/dW [O, D] over a few batches, and lr its first step's:

    D = -lr sign(G)  (update: sign_lr, what AdamW does first)   or   -lr G  (raw_grad, what SGD does)
    D ~ U S V^T:   B = U  [O, r],   A = V^T  [r, D],   M = diag(S) / s  for all experts

so B^T B = A A^T = I, and a gradient of M is s B^T G A^T: of all that these factors can do, the nearest to G. With gates
that add up to one the model starts as if that first step (its best rank-r part) had been taken, as the authors mean it;
``residual: true`` subtracts it, M0 = M, and the model starts as the base model.

Defaults: update sign_lr, 10 rounds of a randomised decomposition, and lr 3.2e-6 are the authors' for MetaMathQA: its
peak 1e-4 divided by the steps of its warm-up (2 % of 1562). The authors look at 50 rows; here they are 8 batches of 8.

Differences from the released code: it has M = diag(S) whatever s, which is 1 there; ours is divided by s, so that the
start is D for any lora_alpha. LoRAFactory's raw gradient is +G, uphill.

Cost: as many forward and backward passes as there are layers, times ``batches``; one layer's G at a time.

Recipe line: ``init: {name: lora_sb, batches: 4}`` with ``experts: {name: loraxs, num_experts: 4, r: 16}``
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from moelora.core.errors import ConfigError
from moelora.core.start import Start
from moelora.init.base import Init, named, spectrum


class LoRASB(Init):
    """update, lr, residual: see above. niter: rounds of the randomised decomposition; None is exact. batches: how many
    are looked at, at most, of batch_size training rows each.

    Raises ConfigError for experts without a frozen pair and a trained matrix between, and for more ranks than a layer
    has directions: min(O, D).
    """

    probes = "gradients"

    def __init__(
        self,
        *,
        update: Literal["sign_lr", "raw_grad"] = "sign_lr",
        lr: Annotated[float, Field(gt=0)] = 3.2e-6,
        residual: bool = False,
        niter: Annotated[int, Field(ge=1)] | None = 10,
        batches: Annotated[int, Field(ge=1)] = 8,
        batch_size: Annotated[int, Field(ge=1)] = 8,
    ) -> None:
        self.update, self.lr, self.residual, self.niter = update, lr, residual, niter
        self.batches, self.batch_size = batches, batch_size

    @torch.no_grad()
    def __call__(self, experts: Any, start: Start) -> None:
        held = dict(experts.named_buffers(recurse=False))
        if not {"basis_A", "basis_B", "start_middle"} <= held.keys():
            raise ConfigError(
                f"init lora_sb sets the frozen factors of experts and the matrix between them; experts "
                f"'{named(experts)}' have no such; use experts: loraxs"
            )
        assert start.gradient is not None
        r, many = experts.r, min(experts.site.in_features, experts.site.out_features)
        if r > many:
            raise ConfigError(
                f"init lora_sb takes {r} directions and '{experts.site.name}' has {many}; lower experts.r"
            )
        G = start.gradient()
        U, S, V = spectrum(-self.lr * (G.sign() if self.update == "sign_lr" else G), r, self.niter)
        held["basis_A"].copy_(V)
        held["basis_B"].copy_(U)
        experts.middle.copy_((S / experts.scale.to(S)).diag().expand_as(experts.middle))
        held["start_middle"].copy_(experts.middle if self.residual else torch.zeros_like(experts.middle))
