"""IncreLoRA: experts start at rank 1, and in intervals the most important of the whole model get more ranks.

Paper: Zhang et al., "IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning", arXiv
2308.12043, and its released code. With A_e, B_e ~ N(0, 0.02^2), E = 0 at the start, and rho_e ranks in use:

    Delta_e = (lora_alpha / rho_e) B_e diag(E_e) A_e,      I_e = sum_i |E_ei dL/dE_ei| / sqrt(D O)
    score_e = mean * uncertainty of I_e, running means as in AdaLoRA; I per token, also as there

Shapes: E [E * r], in memory at r ranks from the start; those not in use are masked. The next ``grow`` ranks are held in
reserve: A and B learn already, at a fixed E of ``reserve``; so the start is the base model up to that (exactly, and
without learning ahead, at 0). After ``warmup`` steps, every ``interval``, the ``top_h`` experts of the highest score
get ``grow`` ranks more, until the mean is target_r; then the reserve is masked. What is new warms up again: steps of
its A and B, and later of E, grow to their length over ``warmup`` steps. Defaults are the release's for CoLA, which
weighs the loss ``orthogonality`` by 0.1.

Differences from the released code: its I, not per token, sums |Delta * dL/dDelta| over all entries of matrices that are
never made here; new ranks there have a schedule that also decays by itself, here the run's times their warm-up; it can
overshoot the target and go on; rho + 1e-5. A larger rho makes old ranks smaller at once, as there, unless E makes up
for it (``continuous``, ours).

Recipe line: ``ranks: {name: increlora, top_h: 3}`` with ``experts: {r: 8, lora_alpha: 16}``
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from moelora.core.start import Start
from moelora.core.step import Now, Trained
from moelora.core.tape import Site
from moelora.ranks.base import PARTS, Count, Ranks, shorten, smoothed


class IncreLoRA(Ranks):
    """target_r: the mean rank of an expert in the end, half of r unless given. Raises ConfigError for more than r."""

    starts = True
    rank: Tensor
    since: Tensor
    open: Tensor

    def __init__(
        self,
        site: Site,
        num_experts: int,
        r: int,
        *,
        target_r: Count | None = None,
        grow: Count = 1,
        top_h: Count = 3,
        interval: Count = 100,
        warmup: Count = 100,
        reserve: Annotated[float, Field(ge=0)] = 1e-5,
        continuous: bool = False,
        per_token: bool = True,
    ) -> None:
        super().__init__(site, num_experts, r)
        self.within("increlora", "target_r", target_r)
        self.target, self.grow, self.top_h = target_r or max(1, r // 2), grow, top_h
        self.interval, self.warmup, self.reserve, self.continuous = interval, warmup, reserve, continuous
        self.counts = per_token
        self.E = nn.Parameter(torch.empty(num_experts * r))
        self.register_buffer("rank", torch.ones(num_experts, dtype=torch.long))
        self.register_buffer("since", torch.full((2, num_experts, r), -warmup))  # steps: when A and B, when E is new
        self.register_buffer("open", torch.tensor(self.target > 1))

    def begin(self, start: Start) -> None:
        self.E.fill_(self.reserve)
        self.E[:: self.r] = 0

    def forward(self, A: Tensor, B: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        place, rank = torch.arange(self.r, device=B.device), self.rank.unsqueeze(1)
        used, held = (place < rank).flatten(), ((place < rank + self.grow) & self.open).flatten()
        E = torch.where(used, self.E, self.E.detach() * held)
        return A, B * E.to(B.dtype), self.rescaled(scale, self.rank)

    def before_step(self, layers: Sequence[Trained], now: Now) -> None:
        for layer in layers:
            own, size = layer.experts.allocator, layer.site.in_features * layer.site.out_features
            if self.open:
                slope = layer.gradient("allocator.E").view(own.rank.shape[0], -1)
                layer.state["live"] = (slope != 0).any(1)
                layer.state["I.now"] = (layer.value("allocator.E").view_as(slope) * slope).abs().sum(1) / size**0.5
            if int(own.since.max()) + self.warmup > now.step:
                layer.state.update({f"{name}.old": layer.value(name).clone() for name in PARTS})

    def after_step(self, layers: Sequence[Trained], now: Now) -> None:
        done, scores = now.step + 1, []
        for layer in layers:
            own = layer.experts.allocator
            halves, E = ((done - own.since.flatten(1)) / self.warmup).clamp(max=1)
            shorten(layer, dict(zip(PARTS, (halves, halves, E), strict=True)))
            if self.open:
                live, share = layer.state.pop("live"), own.shares().view(own.num_experts, -1).mean(1)
                score = smoothed(layer.state, "I", share, live, (0.85, 0.85))
                scores.append(score.masked_fill(own.rank >= own.r, -1).cpu())
        if not self.open or done <= self.warmup or done % self.interval:
            return
        places = [(layer, expert) for layer in layers for expert in range(layer.experts.num_experts)]
        left = self.target * len(places) - sum(int(layer.experts.allocator.rank.sum()) for layer in layers)
        for place in torch.cat(scores).argsort(descending=True, stable=True)[: self.top_h].tolist():
            left -= places[place][0].experts.allocator._grow(*places[place], left, done)
        for layer in layers:
            layer.experts.allocator.open.fill_(left > 0)

    def _grow(self, layer: Trained, expert: int, left: int, done: int) -> int:
        """Give an expert more ranks, as many as there are left; says how many."""
        rank = int(self.rank[expert])
        more = min(self.grow, left, self.r - rank)
        self.rank[expert] += more
        self.since[0, expert, rank + self.grow :][:more] = self.since[1, expert, rank:][:more] = done
        E = layer.value("allocator.E").clone()
        E[expert * self.r :][:rank] *= ((rank + more) / rank) ** (self.power if self.continuous else 0)
        layer.set_value("allocator.E", E)
        return more
