"""SoRA: a gate on every rank, which the optimiser shrinks until those that are not needed are exactly zero.

Paper: Ding et al., "Sparse Low-rank Adaptation of Pre-trained Language Models", arXiv 2311.11696 (EMNLP 2023), and its
released code. After every optimiser step, which moves the gates g like any parameter:

    Delta_e = s B_e diag(g_e) A_e,      g <- sign(g) max(|g| - xi_t, 0),      xi_t = lr_t xi

Shapes: g [E * r], in float32 (under DeepSpeed in its optimiser), from N(0, 1); A and B as in LoRA; s = lora_alpha / r
whatever is left. That is the proximal step of xi |g|_1 (of SGD exactly; AdamW's own scaling is not in it, as in the
release). A gate may come back from zero, where A and B of its rank rest. xi = 0.4 is the release's threshold of 3e-4 at
its learning rate of 8e-4 (STS-B). ``stages`` of equal length raise xi from ``first``: evenly (``linear``), evenly in
exp (``log_linear``) or by equal factors (``exp_linear``).

A gate whose gradient is exactly zero in a step is not shrunk: it belongs to an expert that no token of the global batch
used (or to the first step, when B is zero). So ranks go where the data says, not where tokens are rare. An expert
without a rank adds nothing; its router may still choose it. Exports leave out what is zero and keep s.

Differences from the released code: there the threshold does not follow the learning rate (``times_lr: false``); it
zeroes |g| < 2 xi, which is no proximal step (``official: true``); the loss has an L1 term of the gates beside it, which
is left out here; the first stage is longer than the others. Gates have no weight decay, here as there.

Recipe line: ``ranks: {name: sora, xi: 0.4}`` with ``experts: {r: 8, lora_alpha: 16}``
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from moelora.core.errors import ConfigError
from moelora.core.start import Start
from moelora.core.step import Now, Trained
from moelora.core.tape import Site
from moelora.ranks.base import Count, Ranks

GATE = "allocator.gate"


class SoRA(Ranks):
    """xi: what gates shrink by, times_lr: per unit of learning rate. official: the release's rule in place of the
    proximal step. stages, first, schedule: xi rises from ``first`` in so many stages.

    Raises ConfigError for exp_linear from zero.
    """

    def __init__(
        self,
        site: Site,
        num_experts: int,
        r: int,
        *,
        xi: Annotated[float, Field(ge=0)] = 0.4,
        times_lr: bool = True,
        official: bool = False,
        stages: Count = 1,
        first: Annotated[float, Field(ge=0)] = 0.0,
        schedule: Literal["linear", "log_linear", "exp_linear"] = "linear",
    ) -> None:
        super().__init__(site, num_experts, r)
        if schedule == "exp_linear" and stages > 1 and not (first > 0 and xi > 0):
            raise ConfigError(f"ranks.sora: exp_linear multiplies: first {first} and xi {xi} have to be more than 0")
        self.xi, self.times_lr, self.official = xi, times_lr, official
        self.stages, self.first, self.schedule = stages, first, schedule
        self.gate = nn.Parameter(torch.empty(num_experts * r))

    def begin(self, start: Start) -> None:
        nn.init.normal_(self.gate)

    def forward(self, A: Tensor, B: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return A, B * self.gate.to(B.dtype), scale

    def before_step(self, layers: Sequence[Trained], now: Now) -> None:
        for layer in layers:
            layer.state["live"] = layer.gradient(GATE) != 0

    def after_step(self, layers: Sequence[Trained], now: Now) -> None:
        xi = self.threshold(now)
        for layer in layers:
            gate = layer.value(GATE)
            shrunk = dead_zone(gate, xi) if self.official else soft_threshold(gate, xi)
            layer.set_value(GATE, torch.where(layer.state.pop("live"), shrunk, gate))

    def threshold(self, now: Now) -> float:
        """xi of a step."""
        stage = min(now.step * self.stages // max(1, now.steps), self.stages - 1)
        part, low, high = stage / max(1, self.stages - 1), self.first, self.xi
        if self.stages == 1:
            xi = high
        elif self.schedule == "linear":
            xi = low + part * (high - low)
        elif self.schedule == "log_linear":
            xi = math.log(math.exp(low) + part * (math.exp(high) - math.exp(low)))
        else:
            xi = low * (high / low) ** part
        return xi * now.lr if self.times_lr else xi


def soft_threshold(gate: Tensor, xi: float) -> Tensor:
    """sign(g) max(|g| - xi, 0)."""
    return gate.sign() * (gate.abs() - xi).clamp(min=0)


def dead_zone(gate: Tensor, xi: float) -> Tensor:
    """The release's rule: |g| > xi loses xi, then what is below xi is zero; |g| = xi stays."""
    moved = torch.where(gate.abs() > xi, gate - xi * gate.sign(), gate)
    return moved.masked_fill(moved.abs() < xi, 0)
