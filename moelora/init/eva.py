"""EVA: the rows of A start as the directions in which the layer's inputs vary most; B is zero.

Paper: Paischer et al., "Parameter Efficient Fine-tuning via Explained Variance Adaptation", arXiv 2410.07170 (NeurIPS
2025); as PEFT has it. With the inputs X [T, D] of the base layer, tokens of all batches, and their mean m:

    X - m = U S V^T,   A = V_k^T  [r, D] (whiten: V_k^T / S_k^(1/2)),   B = 0

by incremental PCA: batch after batch, S V^T so far, the batch less its mean, and the shift of the means are stacked and
decomposed anew (randomised, 4 rounds). A layer stops when each component has a cosine of at least tau with the one
before; a batch of fewer tokens than components is skipped. Padding never counts, and with ``tokens: answers`` only
tokens with a label do, as in PEFT. Expert e takes components e r to (e + 1) r (``experts: slices``), or all take the
first r (``same``). One A for all experts (hydra) takes the first r. Defaults are PEFT's, but batches.

Differences from PEFT: every layer keeps its rank r (PEFT's ``rho: 1``): PEFT takes ranks from layers that explain
little, by rho 2, and masks and kernels here know one r. It goes through its data again and again until all layers have
converged; here it ends with the last batch. PEFT whitens twice where two layers have the same inputs.

Cost: one forward pass for each batch.

Recipe line: ``init: {name: eva, batches: 16}`` with ``experts: {num_experts: 4, r: 8}``
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from moelora.core.errors import ConfigError
from moelora.core.start import Start
from moelora.init.base import Init, Share, halves, shares, spectrum


class EVA(Init):
    """experts, tokens, tau, whiten: see above. batches: how many are looked at, at most, of batch_size training rows.

    Raises ConfigError for experts without lora_A and lora_B, for more components than the layer has inputs, and where
    no batch has as many tokens.
    """

    probes = "inputs"

    def __init__(
        self,
        *,
        experts: Share = "slices",
        tokens: Literal["all", "answers"] = "answers",
        tau: Annotated[float, Field(gt=0, le=1)] = 0.99,
        whiten: bool = False,
        batches: Annotated[int, Field(ge=1)] = 64,
        batch_size: Annotated[int, Field(ge=1)] = 8,
    ) -> None:
        self.experts, self.tokens, self.tau, self.whiten = experts, tokens, tau, whiten
        self.batches, self.batch_size = batches, batch_size

    def watch(self, experts: Any) -> tuple[Any, Callable[[Tensor], bool]]:
        seen = _Components(int(self._rows(experts).max()) + 1, self.tau)
        return seen, seen.take

    @torch.no_grad()
    def __call__(self, experts: Any, start: Start) -> None:
        A, B = halves("eva", experts)
        rows, seen = self._rows(experts), start.seen
        if not seen.count:
            raise ConfigError(
                f"init eva: no batch has the {seen.many} tokens that '{experts.site.name}' takes components from; take "
                f"larger batches{', init.tokens: all' if self.tokens == 'answers' else ''} or a lower experts.r"
            )
        length = seen.S[rows].sqrt().unsqueeze(1) if self.whiten else 1
        A.copy_(seen.V[rows] / length)
        B.zero_()

    def _rows(self, experts: Any) -> Tensor:
        """[rows of A] which component each is."""
        rows: int = halves("eva", experts)[0].shape[0]
        share = self.experts if rows == experts.num_experts * experts.r else "same"
        return shares("eva", share, experts, experts.site.in_features).flatten()[:rows]


class _Components:
    """Incremental PCA: ``many`` components V [many, D] of all tokens so far, with S [many]."""

    V: Tensor
    S: Tensor
    mean: Tensor

    def __init__(self, many: int, tau: float) -> None:
        self.many, self.tau, self.count = many, tau, 0

    def take(self, x: Tensor) -> bool:
        """Take in tokens [T, D]. Whether the components still move."""
        if len(x) < self.many:
            return True
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, old, total = x.double().mean(0), self.count, self.count + len(x)
        stacked = x - mean.to(x.dtype)
        if old:  # from here on in float64
            shift = (old * len(x) / total) ** 0.5 * (self.mean - mean)
            stacked = torch.cat([self.S.unsqueeze(1) * self.V, stacked, shift.unsqueeze(0)])
            mean = (old * self.mean + len(x) * mean) / total
        _, S, V = spectrum(stacked, self.many, niter=4, spare=2)
        V = V * V.gather(1, V.abs().argmax(1, keepdim=True)).sign()
        moves = not old or bool((torch.cosine_similarity(V, self.V.to(V)) < self.tau).any())
        self.V, self.S, self.mean, self.count = V, S, mean, total
        return moves
