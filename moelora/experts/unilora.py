"""Uni-LoRA experts: one trained vector for the whole model, of whose numbers all factors are made.

Paper: Li et al., "Uni-LoRA: One Vector is All You Need", arXiv 2506.00799 (NeurIPS 2025), and PEFT's implementation.
With theta_D all numbers of all A and B, one after the other, and gates g of any router:

    theta_D = P theta,   P[i, j] = 1 / sqrt(n_j) where number i goes by entry j, else 0,   n_j: how many go by entry j
    y = W x + (lora_alpha / r) sum_e g_e B_e A_e x

Every number goes by one entry, and entries have as many numbers each, or one more, assigned at random from ``seed``:
so P^T P = I. Shapes: theta [theta_d_length], trained and saved once, whatever the layers, experts and ranks; A
[E*r, D], B [O, E*r] as plain LoRA has them, layer after layer, A before B. The assignment takes 4 bytes a number; it is
not saved, but made anew from the seed. theta ~ U(-0.02, 0.02): B A is small at the start and not zero, so the model
starts next to the base model, not on it.

Differences from the paper: it has no scale; lora_alpha: r is the same. It draws the entry of every number by itself;
equal shares are those of the released code and PEFT. Defaults are PEFT's, whose assignment for a seed is another; the
authors have 23,040 entries for RoBERTa-large and 524,288 for Gemma-7B.

Recipe line: ``experts: {name: unilora, num_experts: 8, r: 4, lora_alpha: 4, theta_d_length: 1024}``
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from moelora.core.errors import ConfigError
from moelora.core.factors import Factors
from moelora.core.module import ExactBuffers
from moelora.core.start import Start
from moelora.core.tape import Site
from moelora.experts.base import Experts


class UniLoRA(Experts):
    """theta_d_length: entries of the vector. init_theta_d_bound: of their first values. seed: of the assignment.

    Raises ConfigError for more entries than numbers, and with losses that need every layer's start.
    """

    gives = ("own_A",)
    computed = True
    index_A: Tensor
    index_B: Tensor

    def __init__(
        self,
        site: Site,
        num_experts: int,
        r: int,
        *,
        theta_d_length: Annotated[int, Field(ge=1)] = 256,
        init_theta_d_bound: Annotated[float, Field(gt=0)] = 0.02,
        seed: Annotated[int, Field(ge=0)] = 42,
    ) -> None:
        super().__init__(site, num_experts, r)
        self.length, self.bound, self.seed, self.first = theta_d_length, init_theta_d_bound, seed, False
        self.store = Vector(theta_d_length if site.index == 0 else 0)  # the others take the first one's

    def meet(self, others: Sequence[Experts]) -> None:
        self.first, at = True, self.scale.device
        shapes = [(other.num_experts * self.r, other.site.in_features, other.site.out_features) for other in others]
        total = sum(ranks * (wide + out) for ranks, wide, out in shapes)
        index = torch.empty(total, dtype=torch.int32, device=at)
        if at.type != "meta":
            if total < self.length:
                raise ConfigError(
                    f"experts.unilora: theta_d_length {self.length} is more than all factors have numbers ({total}), "
                    "so part of the vector would have no use; lower it"
                )
            made = torch.Generator("cpu").manual_seed(self.seed)
            index = torch.randperm(total, generator=made, device="cpu").remainder_(self.length).int()
        self.store.share(total)
        for other, (ranks, wide, out) in zip(others, shapes, strict=True):
            A, B, index = index.split([ranks * wide, out * ranks, len(index) - ranks * (wide + out)])
            other.store = self.store
            other.register_buffer("index_A", A.view(ranks, wide).to(other.scale.device), persistent=False)
            other.register_buffer("index_B", B.view(out, ranks).to(other.scale.device), persistent=False)

    def begin(self, start: Start) -> None:
        if self.first:
            nn.init.uniform_(self.store.theta, -self.bound, self.bound)

    def factors(self) -> Factors:
        return Factors(self.store(self.index_A), self.store(self.index_B), self.scale)

    def keep_anchors(self) -> None:
        raise ConfigError(
            "experts 'unilora' are one vector for all layers, and a loss that holds every layer's experts near their "
            "start (l2_preservation) would count it once for each; leave the loss out, or use experts: lora"
        )


class Vector(ExactBuffers):
    """The vector, and how many numbers go by each entry. Called, since ZeRO-3 has it whole only then."""

    count: Tensor

    def __init__(self, length: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.empty(length))
        self.register_buffer("count", torch.ones(length, dtype=torch.int32), persistent=False)

    def share(self, total: int) -> None:
        """Share out so many numbers."""
        entries = torch.arange(len(self.count), device=self.count.device)
        self.count.copy_((total - 1 - entries) // len(self.count) + 1)

    def forward(self, index: Tensor) -> Tensor:
        """P theta of some numbers, in index's shape, float32 at least."""
        wide = torch.promote_types(self.theta.dtype, torch.float32)
        values = (self.theta.to(wide) * self.count.to(wide).rsqrt()).to(index.device)
        # Of these two, each adds its gradient up in the same order every time on the one kind of device alone.
        return values.index_select(0, index.flatten()).view_as(index) if index.device.type == "cpu" else values[index]
