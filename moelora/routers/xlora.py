"""X-LoRA: a head on the last hidden state of the model without experts scales every expert, token by token.

Paper: Buehler and Buehler, "X-LoRA", arXiv 2402.07148 (APL Machine Learning 2, 2024); formulas from the released code
and PEFT. Two passes: H = last hidden state of the base model (no gradient), then for layer l of L

    c = head(H);   lambda = softmax(c_l / temperature);   y = W x + w sum_e lambda_e (lora_alpha / r) B_e A_e x

head: Linear(d, n) at depth 1; else Linear(d, xlora_size), ReLU, dropout, (depth - 2) times Linear, ReLU, dropout, and
Linear(xlora_size, n); with biases; n = E, or E L with layerwise_scalings. Without enable_softmax, lambda = c_l. top_k
keeps the k largest lambdas as they are; enable_softmax_topk takes a softmax of those kept, over one token.
w is global_scaling_weight. Shapes: H [B, S, d], c [B, S, L or 1, E], lambda [T, E].

With a KV cache both passes keep their own, since keys of the two differ; the second rides in the first
(``moelora.model.cache``). Experts are trained with the head, or frozen by ``experts: {train: none}``, the paper's way.

Differences from PEFT: a cache; the router is saved; the head computes in float32; a kept score of exactly zero stays
kept; scaling_pass_value is 0, the adapter-free pass.

Recipe line: ``router: {name: xlora, xlora_depth: 2, xlora_size: 256}``, with frozen experts from a first stage
``experts: {train: none, adapters: [out/a], num_experts: 4, r: 8}``
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from moelora.core.errors import ConfigError
from moelora.core.route import Route, top_k
from moelora.core.tape import Site, View
from moelora.routers.base import Router, check_top_k, linear_scores

Size = Annotated[int, Field(ge=1)]


class _Linear(nn.Linear):
    """In float32 at least, whatever the model's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return linear_scores(self.weight, x) + self.bias


class XLoRA(Router):
    """One head for the whole model. Option names and defaults are PEFT's; ``top_k`` is its ``top_k_lora``.

    Raises ConfigError when the model does not state its hidden size, top_k exceeds num_experts, or enable_softmax_topk
    comes without top_k. Experts must be as many in every layer.
    """

    reads = "hidden"
    gives = ("logits", "probs")

    def __init__(
        self,
        site: Site,
        num_experts: int,
        r: int,
        *,
        xlora_depth: Size = 1,
        xlora_size: Size = 2048,
        xlora_dropout_p: Annotated[float, Field(ge=0, lt=1)] = 0.2,
        layerwise_scalings: bool = False,
        enable_softmax: bool = True,
        enable_softmax_topk: bool = False,
        softmax_temperature: Annotated[float, Field(gt=0)] = 1.0,
        top_k: Size | None = None,
        global_scaling_weight: float = 1.0,
    ) -> None:
        super().__init__(site, num_experts, r)
        check_top_k("xlora", top_k, num_experts)
        if enable_softmax_topk and top_k is None:
            raise ConfigError("routers.xlora: enable_softmax_topk is a softmax of the top_k scalings; set top_k")
        if site.hidden_size is None:
            raise ConfigError("routers.xlora reads the model's last hidden state, and its config has no hidden_size")
        self.layerwise, self.temperature, self.top_k = layerwise_scalings, softmax_temperature, top_k
        self.softmax, self.softmax_topk = enable_softmax, enable_softmax_topk
        self.global_scaling_weight = global_scaling_weight
        widths = [
            site.hidden_size,
            *[xlora_size] * (xlora_depth - 1),
            num_experts * (site.count if self.layerwise else 1),
        ]
        layers: list[nn.Module] = []
        for wide, out in pairwise(widths):
            layers += [_Linear(wide, out), nn.ReLU(), nn.Dropout(xlora_dropout_p)]
        self.head = nn.Sequential(*layers[:-2])

    @classmethod
    def group(cls, site: Site, options: dict[str, Any]) -> str:
        return "model"

    def plan(self, hidden: Tensor) -> Tensor:
        """Logits and, after them on the layers' axis, their softmax: made once, not again in every layer."""
        logits: Tensor = self.head(hidden).unflatten(-1, (-1, self.num_experts))
        logits = logits / self.temperature if self.softmax else logits
        return torch.cat([logits, logits.softmax(-1)], -2)

    def forward(self, x: Tensor, view: View) -> Route:
        plan = view.plan.to(x.device)
        at, count = view.site.index if self.layerwise else 0, plan.shape[1] // 2
        logits, probs = plan[:, at], plan[:, count + at]
        scalings, index = probs if self.softmax else logits, None
        if self.top_k is not None:
            k, scored = self.top_k, scalings
            index = view.once(lambda: top_k(scored, k))
            scalings = scalings.gather(1, index)
            scalings = scalings.softmax(-1) if self.softmax_topk else scalings
        weighted = scalings if self.global_scaling_weight == 1 else self.global_scaling_weight * scalings
        return Route(weighted, self.num_experts, index, logits, probs)
