"""LaMDA++'s rank plan: layers whose base weight has a flat spectrum get more ranks, before any training.

Paper: Azizi et al., "LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional Adaptation", arXiv
2406.12832 (EMNLP 2024 Findings), its rank allocation. With the singular values sigma of a layer's base weight W [O, D]:

    energy(q) = sum_{i <= q} sigma_i^2 / sum_i sigma_i^2

All layers start at the lowest of ``candidates``; again and again the layer that holds least of its energy at its rank
gets the next one, as long as the parameters, sum over layers of rank (O + D), are no more than with mean_r everywhere.
So of layers of one size, one that holds less at every rank never gets fewer. experts.r is room for the highest
candidate; all experts of a layer have its rank and the scale lora_alpha / rank (its root with use_rslora); the other
ranks are masked. The plan is made once, from weights alone, and saved. Defaults: mean_r is half of r, the candidates
half, once and twice that.

Differences from the paper: its rule is in no released code, and only that it goes by normalised spectra is certain;
candidates, budget and direction are a reconstruction. ``direction: concentrated`` is the opposite. LaMDA's own experts,
a square core with a frozen A, are not needed for it.

Recipe line: ``ranks: {name: spectral, direction: flat}`` with ``experts: {r: 16, lora_alpha: 16}``
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from moelora.core.errors import ConfigError
from moelora.core.start import Start
from moelora.core.tape import Site
from moelora.ranks.base import Count, Ranks, masked


class Spectral(Ranks):
    """mean_r: the budget, as a rank for all layers. candidates: the ranks that a layer can have. Raises ConfigError for
    ranks beyond experts.r, and a budget below the lowest candidate."""

    rank: Tensor

    def __init__(
        self,
        site: Site,
        num_experts: int,
        r: int,
        *,
        mean_r: Count | None = None,
        candidates: Annotated[list[Count], Field(min_length=1)] | None = None,
        direction: Literal["flat", "concentrated"] = "flat",
    ) -> None:
        super().__init__(site, num_experts, r)
        self.mean = max(1, r // 2) if mean_r is None else mean_r
        usual = [max(1, self.mean // 2), self.mean, min(r, 2 * self.mean)]
        self.candidates = sorted(set(usual if candidates is None else candidates))
        self.within("spectral", "mean_r", self.mean)
        self.within("spectral", "candidates", self.candidates[-1])
        if self.candidates[0] > self.mean:
            raise ConfigError(
                f"ranks.spectral: the lowest of candidates {self.candidates} is more than mean_r {self.mean}, so no "
                "plan is within the budget; lower it"
            )
        self.sign = 1 if direction == "flat" else -1
        self.energy: list[float] = []
        self.register_buffer("rank", torch.tensor(r))

    def begin(self, start: Start) -> None:
        squares = torch.linalg.svdvals(start.weight()).double().square()
        self.energy = (squares.cumsum(0) / squares.sum().clamp(min=1e-300)).tolist()

    def plan(self, others: Sequence[Ranks]) -> None:
        layers = [cast(Spectral, other) for other in others]
        size = [one.num_experts * (one.site.in_features + one.site.out_features) for one in layers]
        at, left = [0] * len(layers), (self.mean - self.candidates[0]) * sum(size)
        open_to = set(range(len(layers))) if len(self.candidates) > 1 else set()
        while open_to:
            place = min(open_to, key=lambda i: (self.sign * layers[i].held(at[i]), i))
            cost = size[place] * (self.candidates[at[place] + 1] - self.candidates[at[place]])
            if cost <= left:
                left, at[place] = left - cost, at[place] + 1
            if cost > left or at[place] + 1 == len(self.candidates):
                open_to.discard(place)
        for one, chosen in zip(layers, at, strict=True):
            one.rank.fill_(self.candidates[chosen])
            one.energy = []

    def held(self, candidate: int) -> float:
        """The part of its energy that a layer holds at a candidate rank."""
        return self.energy[min(self.candidates[candidate], len(self.energy)) - 1]

    def forward(self, A: Tensor, B: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keep = torch.arange(self.r, device=B.device) < self.rank
        scale = self.rescaled(scale, self.rank.expand(self.num_experts))
        return *masked(A, B, keep.repeat(self.num_experts)), scale
