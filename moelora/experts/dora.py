"""DoRA experts: a magnitude per output beside the low-rank update, which then turns the weight's rows alone.

Paper: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353 (ICML 2024); formulas as in PEFT.
With V_e = W + (lora_alpha / r) B_e A_e, row i of it v_ei, and gates g of any router over whole experts:

    W_e = diag(m_e / |v_e|) V_e,     y = W x + b + sum_e g_e (W_e - W) x

|v_e| [O] is a number without gradient (the paper's section 4.3), so that A and B learn as in LoRA, but for a factor
m_ei / |v_ei| at output i. Each expert has its own norm, and what is gated is its difference to the base. The bias b is
not scaled. Shapes: lora_A [E*r, D], lora_B [O, E*r], magnitude [E, O]; m starts as the norms of W's rows, so with any
start the model starts as the base model, bit for bit in float32.

The norms come without ever making V, with s = lora_alpha / r and W A^T from one more call of the base layer, on the
rows of A: 2 E r O D operations a step and layer, besides which a partitioned base (ZeRO-3) is gathered once more.

    |v_i|^2 = |w_i|^2 + 2 s <(W A^T)_i, b_i> + s^2 b_i (A A^T) b_i^T

Differences from PEFT: it makes V, in the dtype of the activations, at every call. Under dropout it scales W dropout(x),
and here W x, which has no noise of its own. A row of W that is zero stays zero; there it is not a number.

An initialiser with a start of its own (PiSSA) is subtracted inside V. Saved with the router; ``moelora export --to
peft`` writes PEFT's DoRA, ``--to merged`` is exact where gates are constant, and as a plain LoRA it cannot be written.

Recipe line: ``experts: {name: dora, num_experts: 4, r: 8, lora_alpha: 16}`` with ``router: {name: meteora}``
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from moelora.core.factors import Factors
from moelora.core.start import Start
from moelora.core.tape import Site
from moelora.experts.base import Experts


class DoRA(Experts):
    """A and B per expert, and a trained magnitude. Raises ConfigError for gates of anything but whole experts, and for
    routers around feed-forward blocks.
    """

    gives = ("own_A",)
    whole = True
    squares: Tensor

    def __init__(self, site: Site, num_experts: int, r: int) -> None:
        super().__init__(site, num_experts, r)
        self.lora_A = nn.Parameter(torch.empty(num_experts * r, site.in_features))
        self.lora_B = nn.Parameter(torch.empty(site.out_features, num_experts * r))
        self.magnitude = nn.Parameter(torch.empty(num_experts, site.out_features))
        self.register_buffer("squares", torch.zeros(site.out_features))

    def begin(self, start: Start) -> None:
        self.squares.copy_(start.weight().square().sum(1))
        self.magnitude.copy_(self.squares.sqrt().expand_as(self.magnitude))

    def factors(self) -> Factors:
        return Factors(self.lora_A, self.lora_B, self.scale)

    def finished(self, factors: Factors) -> Factors:
        norm, bias = self._norm(factors)
        grown = self.magnitude / norm
        B = factors.B * grown.t().repeat_interleave(factors.B.shape[1] // self.num_experts, 1)
        stretch = grown - 1
        return replace(factors, B=B, stretch=stretch, shift=None if bias is None else -stretch * bias)

    def own_vectors(self, index: int) -> dict[str, Tensor]:
        return {"magnitude": self.magnitude[index].detach()}

    @torch.no_grad()
    def _norm(self, factors: Factors) -> tuple[Tensor, Tensor | None]:
        """([E, O] the norms of the rows of V, the base layer's bias [O])."""
        assert factors.A is not None
        own = self.squares.dtype
        A, B = factors.A.to(own), factors.B.to(own) * factors.scale.to(own)
        WA, bias = self.affine(A)
        WA, A, B = (part.unflatten(0, (self.num_experts, -1)) for part in (WA, A, B.t()))  # [E, R / E, ...]
        square = self.squares + 2 * (WA * B).sum(1) + (B * ((A @ A.mT) @ B)).sum(1)
        return square.clamp(min=torch.finfo(own).tiny).sqrt(), bias
