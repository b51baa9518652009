"""LoRA-Pro: gradients of A and B whose step in the weight is as close as can be to that of full fine-tuning.

Paper: Wang et al., "LoRA-Pro: Are Low-Rank Adapters Properly Optimized?", arXiv 2407.18242 (ICLR 2025), and its
released code. A step (a, b) moves s B A by s B a + s b A. Of all steps, those closest to the gradient G of the update
are, with dA = s B^T G, dB = s G A^T, P the projector B (B^T B)^-1 B^T, and any X [r, r]:

    a = (1/s^2) (B^T B)^-1 dA + X A
    b = (1/s^2) (I - P) dB (A A^T)^-1 - B X

    x: sylvester   B^T B X + X A A^T = -(1/s^2) (B^T B)^-1 dA A^T       (a, b) closest to (dA, dB); by eigh
       balanced    X = -(1/(2 s^2)) (B^T B)^-1 B^T dB (A A^T)^-1        half of P G P_A by either factor
       zero        X = 0                                                 all of it by A
       symmetry    as balanced, with A A^T in place of its inverse: the released code's, which is not balanced

moments: lora (the released "efficient" mode): torch's optimiser takes a and b for gradients; its moments are as large
as A and B, and with training.optim: sgd there are none. moments: full (the paper's AdamW): with M, V [O, D] a pair,

    G~ = s B a + s b A;  M, V as Adam's, of G~;  N = M^ / (sqrt(V^) + eps);  a, b anew from dA = s B^T N, dB = s N A^T
    A -= lr a,  B -= lr b,  both times sqrt(1 - lr decay), so that s B A decays as a weight would

and torch's optimiser has all but A and B. Every inverse is of a matrix plus ridge times the mean of its diagonal. A
pair is what one gate multiplies (under SMoRA every rank); base weights are neither decayed nor touched. Learning rates
are those of full fine-tuning: 1e-5 to 5e-5, not LoRA's 2e-4.

Defaults: moments lora, since full takes 2 O D numbers for each pair of each layer; x sylvester, betas and eps the
code's; ridge 1e-6, relative (1e-8 there, absolute). Where B is zero the formula gives a = 0,
b = dB (A A^T)^-1 / s^2; where B is small a is as much longer, so that A may move far in the first steps after that.

Differences from the released code: it has a rule for the first step (first: rule: a = dA and that b) that never runs,
and corrects moments by t + 1 (late: true); its M and V are bfloat16; it clips last, by the norm from before; here that
comes first.

Recipe line: ``optim: {name: lora_pro, x: sylvester}``
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from moelora.core.step import Now
from moelora.optim.base import Pair, PairOptim, inverse


class LoRAPro(PairOptim):
    """x, moments, first, late, ridge: see the module. beta1, beta2, eps: of moments: full; others are torch's.

    Raises ConfigError for experts that do not train both A and B, or whose update is no sum of pairs.
    """

    def __init__(
        self,
        *,
        x: Literal["sylvester", "zero", "balanced", "symmetry"] = "sylvester",
        moments: Literal["lora", "full"] = "lora",
        first: Literal["formula", "rule"] = "formula",
        late: bool = False,
        ridge: Annotated[float, Field(ge=0)] = 1e-6,
        beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9,
        beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999,
        eps: Annotated[float, Field(ge=0)] = 1e-8,
    ) -> None:
        self.x, self.whole_step, self.ruled, self.late, self.ridge = x, moments == "full", first == "rule", late, ridge
        self.beta1, self.beta2, self.eps = beta1, beta2, eps

    def shrink(self, now: Now) -> float:
        return float((1 - now.lr * now.decay) ** 0.5)

    def change(self, pair: Pair, now: Now) -> tuple[Tensor, Tensor]:
        count = pair.state["count"] = pair.state.get("count", torch.zeros_like(pair.scale)) + 1
        count, scale = count.view(-1, 1, 1), pair.scale.view(-1, 1, 1)
        if not self.whole_step:
            return self.closest(pair, pair.dA, pair.dB, self.x, count)
        a, b = self.closest(pair, pair.dA, pair.dB, "zero", count)
        full = scale * (pair.B @ a + b @ pair.A)
        zeros = torch.zeros_like(full)
        M = pair.state["M"] = torch.lerp(full, pair.state.get("M", zeros), self.beta1)
        V = pair.state["V"] = torch.lerp(full * full, pair.state.get("V", zeros), self.beta2)
        power = count + self.late
        step = M / (1 - self.beta1**power) / ((V / (1 - self.beta2**power)).sqrt() + self.eps)
        return self.closest(pair, scale * pair.B.mT @ step, scale * step @ pair.A.mT, self.x, count)

    def closest(self, pair: Pair, dA: Tensor, dB: Tensor, x: str, count: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) for given gradients, in the ``count``th step of each pair."""
        A, B, square = pair.A, pair.B, pair.scale.view(-1, 1, 1) ** 2
        BB, AA = B.mT @ B, A @ A.mT
        iB, iA = inverse(BB, self.ridge), inverse(AA, self.ridge)
        inner = B.mT @ dB
        a, b = iB @ dA / square, (dB - B @ (iB @ inner)) @ iA / square
        if x == "sylvester":
            X = sylvester(BB, AA, -iB @ dA @ A.mT / square)
        else:
            half = {"balanced": iA, "symmetry": AA, "zero": torch.zeros_like(AA)}[x]
            X = -iB @ inner @ half / (2 * square)
        ruled = (count == 1) & self.ruled
        return torch.where(ruled, dA, a + X @ A), torch.where(ruled, dB @ iA / square, b - B @ X)


def sylvester(P: Tensor, Q: Tensor, C: Tensor) -> Tensor:
    """X of P X + X Q = C for symmetric P, Q >= 0 [E, r, r], in float64; zero where both are."""
    (p, U), (q, V) = torch.linalg.eigh(P.double()), torch.linalg.eigh(Q.double())
    sums = p.unsqueeze(-1) + q.unsqueeze(-2)
    inner = U.mT @ C.double() @ V
    least = torch.finfo(P.dtype).eps * sums.amax((-2, -1), keepdim=True)
    return (U @ torch.where(sums > least, inner / sums, 0.0) @ V.mT).to(C.dtype)
