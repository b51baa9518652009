"""DyLoRA: one training gives experts that work at every rank up to r, by truncating them to a random rank each step.

Paper: Valipour et al., "DyLoRA: Parameter-Efficient Tuning of Pretrained Models using Dynamic Search-Free Low Rank
Adaptation", arXiv 2210.07558 (EACL 2023), and its released code. Before every optimiser step:

    b ~ U{r_min, ..., r},      Delta_e = (lora_alpha / b) B_e[:, :b] A_e[:b]

Shapes: A_e [r, D], B_e [O, r]; truncated ranks are masked, nothing is resized. b is drawn from the seed and the number
of the step, so it is the same in all layers and processes, for all micro-batches, and after a resume; a buffer keeps
it. ``frozen`` (the release's default): in the forward all b ranks take part, and only the last of them, row and column
b - 1, learns; the gradients of the others are exactly zero, so the optimiser leaves them and their moments alone.
Without it all b learn. Each rank then learns in one step of r: train longer, or with a higher learning rate.

Evaluation, generation and export use all ranks, or the first ``eval_rank`` with the scale lora_alpha / eval_rank (its
square root with use_rslora). ``moelora.tools.truncate`` sets that on a trained model; ``moelora export --truncate N``
exports every expert at its first N ranks, as plain LoRAs of that rank.

Differences from the released code: it draws b in every process by itself; freezes by detaching alone, while AdamW goes
on moving what is frozen; and counts ranks from 0. ``per_expert``, a b for each expert, is ours. From the paper: the
distribution is uniform, as released; a router of single ranks may still choose a rank that is masked, and gets nothing.

Recipe line: ``ranks: {name: dylora, frozen: true}`` with ``experts: {r: 8, lora_alpha: 16}``
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from moelora.core.step import Now, Trained
from moelora.core.tape import Site
from moelora.ranks.base import Count, Ranks, learning, masked


class DyLoRA(Ranks):
    """frozen: only the last rank in use learns. r_min: the lowest rank drawn. per_expert: each expert has its own draw.

    eval_rank: evaluate truncated; None is all ranks. Raises ConfigError for ranks beyond experts.r.
    """

    b: Tensor

    def __init__(
        self,
        site: Site,
        num_experts: int,
        r: int,
        *,
        frozen: bool = True,
        r_min: Count = 1,
        per_expert: bool = False,
        eval_rank: Count | None = None,
        seed: Annotated[int, Field(ge=0)] = 0,
    ) -> None:
        super().__init__(site, num_experts, r)
        self.within("dylora", "r_min", r_min)
        self.within("dylora", "eval_rank", eval_rank)
        self.frozen, self.r_min, self.per_expert = frozen, r_min, per_expert
        self.eval_rank, self.seed = eval_rank, seed
        self.register_buffer("b", torch.full((num_experts,), r))

    def begin_step(self, layers: Sequence[Trained], now: Now) -> None:
        for layer in layers:
            own: DyLoRA = layer.experts.allocator
            random = Random(f"{self.seed} {now.step}")  # for a layer as for its neighbour: the same numbers from anew
            drawn = [random.randint(self.r_min, self.r) for _ in range(own.num_experts if self.per_expert else 1)]
            own.b.copy_(torch.tensor(drawn))

    def forward(self, A: Tensor, B: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self.training and self.eval_rank is None:
            return A, B, scale
        b = (self.b if self.training else torch.full_like(self.b, self.eval_rank or self.r)).unsqueeze(1)
        place = torch.arange(self.r, device=b.device)
        if self.training and self.frozen:
            A, B = learning(A, B, (place == b - 1).flatten())
        return *masked(A, B, (place < b).flatten()), self.rescaled(scale, b.flatten())
