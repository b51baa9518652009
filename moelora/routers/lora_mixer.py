"""LoRA-Mixer: experts on attention (or state-space) projections, one router for q, k and v, hard or soft routing.

Paper: Li et al., "LoRA-Mixer: Coordinate Modular LoRA Experts Through Serial Attention Routing", arXiv 2507.00029 (ICLR
2026). There is no released code; what the paper leaves open is an option here. With p = softmax(x Wg^T):

    soft              training: gates p, dense;   inference: the top_k of p, renormalised (renorm) or not
    hard              gate 1 for the expert of the token's task, no gradient to the router: experts learn apart
    straight_through  forward: the top_k gates, also in training; backward: the gradient of the dense softmax

Shapes: weight (Wg) [E, D], no bias. share: layers of one attention module with these names have one router between
them (they read the same tokens); [] gives every projection its own. In hard mode expert i stands for task i, and tokens
of no task (id -1) get the base model alone.

Stages as in the paper: hard (experts and labels), then soft with ``experts: {train: none, adapters: [...]}``, or joint
training with ``losses: {l2_preservation: ...}``; balance in the second is ``losses: {specialisation_balance: ...}``.

Recipe line: ``router: {name: lora_mixer, routing: soft, top_k: 3}``
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from moelora.core.errors import DataError
from moelora.core.route import Route, dense_gates, top_k
from moelora.core.tape import Site, View
from moelora.routers.base import Router, check_top_k, linear_scores, reset_linear, task_experts

SHARE = ["q_proj", "k_proj", "v_proj", "query", "key", "value", "q", "k", "v"]


class LoRAMixer(Router):
    """Routing by softmax or by task label. top_k: experts per token at inference; None: all.

    Raises ConfigError when top_k exceeds num_experts; DataError in hard mode for a batch without task ids.
    """

    scores = "weight"
    gives = ("logits", "probs")

    def __init__(
        self,
        site: Site,
        num_experts: int,
        r: int,
        *,
        routing: Literal["soft", "hard", "straight_through"] = "soft",
        top_k: Annotated[int, Field(ge=1)] | None = 3,
        renorm: bool = True,
        share: list[str] = SHARE,
    ) -> None:
        super().__init__(site, num_experts, r)
        check_top_k("lora_mixer", top_k, num_experts)
        self.routing, self.top_k, self.renorm = routing, top_k or num_experts, renorm
        self.weight = nn.Parameter(torch.empty(num_experts, site.in_features))
        reset_linear(self.weight)

    @classmethod
    def group(cls, site: Site, options: dict[str, Any]) -> str | None:
        shared = site.name.rpartition(".")[2] in options["share"]
        return f"{site.parent} {site.stream} {site.in_features}" if shared else None

    def constant_gates(self, task: int | None) -> Tensor | None:
        if self.routing != "hard" or task is None:
            return None
        if task >= self.num_experts:
            raise DataError(f"routers.lora_mixer: expected a task id of -1 to {self.num_experts - 1}, found {task}")
        return (torch.arange(self.num_experts) == task).float()

    def forward(self, x: Tensor, view: View) -> Route:
        logits = linear_scores(self.weight, x, view)
        probs = logits.softmax(-1)
        if self.routing == "hard":
            gate = task_experts(view, "lora_mixer", self.num_experts) + 0 * probs  # DDP wants a gradient, if of zero
            return Route(gate, self.num_experts, None, logits, probs)
        if self.top_k == self.num_experts or (self.routing == "soft" and self.training):
            return Route(probs, self.num_experts, None, logits, probs)
        index = view.once(lambda: top_k(probs, self.top_k))
        weight = probs.gather(1, index)
        if self.renorm:
            weight = weight / weight.sum(-1, keepdim=True)
        if self.training:
            sparse = dense_gates(weight.detach(), index, self.num_experts)
            return Route(sparse + (probs - probs.detach()), self.num_experts, None, logits, probs)
        return Route(weight, self.num_experts, index, logits, probs)
