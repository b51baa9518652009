"""AltLoRA: A and B in turns, each by its least squares, with a momentum that follows the pair as it changes.

Paper: Yu et al., "AltLoRA: Towards Better Gradient Approximation in Low-Rank Adaptation with Alternating Projections",
arXiv 2505.12455 (NeurIPS 2025), and its released code. While one factor stands still, the step of the other that is
closest to the gradient G of the update s B A is unique; with dA = s B^T G, dB = s G A^T:

    a* = (1/s^2) (B^T B + d I)^-1 dA        s B a* is G projected onto the columns of B
    b* = (1/s^2) dB (A A^T + d I)^-1        s b* A is G projected onto the rows of A

    M_A = beta1 Q M_A + (1 - beta1) a*,     Q = (B^T B + d I)^-1 B^T B_old
    M_B = beta1 M_B S + (1 - beta1) b*,     S = A_old A^T (A A^T + d I)^-1
    A -= lr (M_A / (1 - beta1^t) + decay A),   or B by M_B

B_old is B when M_A last changed, so Q M_A is the old momentum of the weight, projected onto the new columns; d = ridge
* trace / r. A pair is what one gate multiplies (under SMoRA every rank). It takes ``period`` steps with B, then as many
with A, and so on, and counts the steps in which tokens used it, so that a rare expert has both, too. B is first, since
it starts from zero, where A's step is zero. How an update is split into A and B makes no difference to its path. A and
B are taken whole steps; torch's optimiser has all else. State: M and old values, each as large as A and B.

Defaults: period 10, beta1 0.9, ridge 1e-5 as the released trainer passes them (period: its flag ``alt``).

Differences from the released code: it drops 1/s^2, so that its learning rate depends on s; its ridge is absolute, a
gain of 1e5 where B is nearly zero; without its flag it steps A and B at once from one gradient, which counts the part
that both can reach twice: left out here.

Recipe line: ``optim: {name: altlora, period: 10}``
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from moelora.core.step import Now
from moelora.optim.base import Pair, PairOptim, inverse


class AltLoRA(PairOptim):
    """period: steps in a row with one factor. beta1: of the momentum. ridge: relative to the mean of the diagonal.

    Raises ConfigError for experts that do not train both A and B, or whose update is no sum of pairs.
    """

    whole_step = True

    def __init__(
        self,
        *,
        period: Annotated[int, Field(ge=1)] = 10,
        beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9,
        ridge: Annotated[float, Field(ge=0)] = 1e-5,
    ) -> None:
        self.period, self.beta1, self.ridge = period, beta1, ridge

    def change(self, pair: Pair, now: Now) -> tuple[Tensor, Tensor]:
        turns = pair.state.get("turns", torch.zeros_like(pair.scale))
        pair.state["turns"] = turns + 1
        with_b = (turns // self.period) % 2 == 0
        a = self.turn(pair, "A", pair.dA, pair.B, ~with_b)
        return a, self.turn(pair, "B", pair.dB.mT, pair.A.mT, with_b).mT

    def turn(self, pair: Pair, key: str, gradient: Tensor, other: Tensor, on: Tensor) -> Tensor:
        """The step of one factor [E, r, n], given the other [E, m, r]; zero, and nothing kept, where it is not on."""
        on, ranks = on.view(-1, 1, 1), pair.ranks.unsqueeze(-1)
        M, old, count = (
            pair.state.get(f"{name}_{key}", torch.zeros_like(like))
            for name, like in (("M", gradient), ("old", other), ("count", on.to(other)))
        )
        solve = inverse(other.mT @ other, self.ridge)
        best = solve @ gradient / pair.scale.view(-1, 1, 1) ** 2
        aligned = solve @ (other.mT @ (old * ranks.mT)) @ M
        step, kept = self.momentum(pair, key, best, aligned, M, count + 1, on & ranks)
        pair.state[f"M_{key}"] = torch.where(on & ranks, kept, M)
        pair.state[f"old_{key}"] = torch.where(on & ranks.mT, other, old)
        pair.state[f"count_{key}"] = count + on
        return step * on

    def momentum(
        self, pair: Pair, key: str, best: Tensor, aligned: Tensor, M: Tensor, count: Tensor, mine: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(the step, the momentum to keep). mine: [E, r, 1], where it is this factor's turn."""
        new = torch.lerp(best, aligned, self.beta1)
        return new / (1 - self.beta1**count), new
