"""AdaLoRA: experts start with more ranks than they may keep, and the least important of the whole model are dropped.

Paper: Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning" (AdaLoRA), arXiv 2303.10512
(ICLR 2023), and PEFT's implementation. With P_e, Q_e (lora_B, lora_A) ~ N(0, 0.02^2) and E = 0 at the start:

    Delta_e = s P_e diag(E_e) Q_e,      I(w) = |w dL/dw|
    mean <- b1 mean + (1 - b1) I,       uncertainty <- b2 uncertainty + (1 - b2) |I - mean|,     S = mean * uncertainty
    score of a rank i = S(E_i) + mean_j S(P_ji) + mean_j S(Q_ij)

Shapes: E [E * r]; all else as in LoRA, s = lora_alpha / r. Every deltaT steps E is set to zero for all but the b best
ranks of all experts and layers; they go on training, and may come back. b falls from all ranks to target_r times the
number of experts, by a cubic curve between step tinit and step T - tfinal, of T in all; what is masked then stays
masked. Keys and defaults are PEFT's; target_r is two thirds of r there (8 of 12). P and Q are held near orthogonal by
the loss ``orthogonality``, which PEFT weighs by 0.5.

Experts that few tokens use have small gradients, so I is divided by the expert's share of the layer's tokens (its mean
over experts is 1; ``per_token: false`` leaves that out), and stays as it is in a step without tokens: both are ours.

Differences from PEFT, ours as in the paper: I is of the weights that the gradient is of, not of those after the step; s
has no 1e-5 beside r; ties go by position, so that exactly b ranks are kept; E has no weight decay.

Recipe line: ``ranks: {name: adalora, deltaT: 10}`` with ``experts: {r: 12, lora_alpha: 16}``
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from moelora.core.errors import ConfigError
from moelora.core.start import Start
from moelora.core.step import Now, Trained
from moelora.core.tape import Site
from moelora.ranks.base import PARTS, Beta, Count, Ranks, smoothed


class AdaLoRA(Ranks):
    """target_r: the mean rank of an expert at the end. tinit, tfinal: steps before the first and after the last
    allocation. Raises ConfigError for a target above r, and for a run that is too short for tinit and tfinal."""

    starts = True
    mask: Tensor

    def __init__(
        self,
        site: Site,
        num_experts: int,
        r: int,
        *,
        target_r: Count | None = None,
        tinit: Annotated[int, Field(ge=0)] = 0,
        tfinal: Annotated[int, Field(ge=0)] = 0,
        deltaT: Count = 1,
        beta1: Beta = 0.85,
        beta2: Beta = 0.85,
        per_token: bool = True,
    ) -> None:
        super().__init__(site, num_experts, r)
        self.within("adalora", "target_r", target_r)
        self.target = max(1, 2 * r // 3) if target_r is None else target_r
        self.tinit, self.tfinal, self.deltaT = tinit, tfinal, deltaT
        self.betas, self.counts = (beta1, beta2), per_token
        self.E = nn.Parameter(torch.empty(num_experts * r))
        self.register_buffer("mask", torch.ones(num_experts * r, dtype=torch.bool))

    def begin(self, start: Start) -> None:
        nn.init.zeros_(self.E)

    def forward(self, A: Tensor, B: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return A, B * (self.E * self.mask).to(B.dtype), scale

    def begin_step(self, layers: Sequence[Trained], now: Now) -> None:
        if self.tinit + self.tfinal >= now.steps:
            given = f"tinit {self.tinit} and tfinal {self.tfinal}"
            raise ConfigError(f"ranks.adalora: {given} leave none of {now.steps} steps between them; lower them")

    def before_step(self, layers: Sequence[Trained], now: Now) -> None:
        for layer in layers if now.step < now.steps - self.tfinal else ():
            layer.state["live"] = layer.gradient("allocator.E") != 0
            for name in PARTS:
                layer.state[f"{name}.now"] = (layer.value(name) * layer.gradient(name)).abs()

    def after_step(self, layers: Sequence[Trained], now: Now) -> None:
        done, last = now.step + 1, now.steps - self.tfinal
        if done > last:
            return
        scores = [layer.experts.allocator._score(layer.state) for layer in layers]
        if done != last and (done <= self.tinit or done % self.deltaT):
            return
        every = torch.cat([score.to(scores[0].device) for score in scores])
        kept = torch.zeros_like(every, dtype=torch.bool)
        kept[every.argsort(descending=True, stable=True)[: self.budget(done, layers, last)]] = True
        for layer, keep in zip(layers, kept.split([len(score) for score in scores]), strict=True):
            value, mask = layer.value("allocator.E"), layer.experts.allocator.mask
            layer.set_value("allocator.E", value * keep.to(value.device))
            mask.copy_(keep if done == last else mask)

    def budget(self, done: int, layers: Sequence[Trained], last: int) -> int:
        """How many ranks all experts together have after so many steps."""
        experts = sum(layer.experts.num_experts for layer in layers)
        left = 1 - (done - self.tinit) / (last - self.tinit)
        return int(experts * (self.r - self.target) * left**3 + experts * self.target)

    def _score(self, state: dict[str, Tensor]) -> Tensor:
        """[R] the importance of every rank of a layer, from what is kept of it."""
        live, share = state.pop("live"), self.shares()
        A = smoothed(state, "lora_A", share.unsqueeze(1), live.unsqueeze(1), self.betas)
        B, E = (smoothed(state, name, share, live, self.betas) for name in PARTS[1:])
        return E + A.mean(1) + B.mean(0)
