"""SMoRA: every rank of one LoRA is an expert; each token uses the k ranks it scores highest.

Paper: Zhao et al., "Each Rank Could be an Expert", arXiv 2501.15103 (KDD 2026); formulas from the released code.
With q = sigmoid(x Wg^T), balance bias b and S the k largest of q + b:

    gate_i = k v_i / sum_S v,  v = q + b,  i in S          (gates sum to k)
    y = W x + (lora_alpha / k) sum_S gate_i b_i a_i x

Shapes: weight (Wg) [G, D], bias (b) [G] float32, G = R / block_size; R = num_experts * r.
b is not trained: once per optimiser step b_i += bias_update_rate * sign(mean load - load_i), counted on valid tokens.

Differences from the released code. There b also receives gradient (it is registered as an adapter parameter), is
updated in every forward (twice under activation checkpointing) and counts padding: here as the paper describes it.
There block_size > 1 repeats logits but still picks single ranks, so a block can be split: here blocks are routed whole,
top_k counts ranks, and block_size r with num_experts E is a mixture of E LoRAs.

Recipe line: ``router: {name: smora, top_k: 8}`` with ``experts: {num_experts: 1, r: 64}``
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from moelora.core.errors import ConfigError
from moelora.core.route import Route, top_k
from moelora.core.tape import Site, View
from moelora.routers.base import Router, check_top_k, level_by_sign, linear_scores, reset_linear


class SMoRA(Router):
    """Rank-wise top-k. top_k: ranks used per token. score_fn: sigmoid (the code's default) or softmax.

    bias_in_gate: b also enters the gate values, as in the released code; False uses it for the choice alone.
    Raises ConfigError when top_k exceeds the ranks or does not fit block_size.
    """

    reads = "dropped"
    scores = "weight"
    gives = ("logits", "probs")
    needs = ("own_A",)
    bias: Tensor

    def __init__(
        self,
        site: Site,
        num_experts: int,
        r: int,
        *,
        top_k: Annotated[int, Field(ge=1)] = 8,
        block_size: Annotated[int, Field(ge=1)] = 1,
        score_fn: Literal["sigmoid", "softmax"] = "sigmoid",
        bias_in_gate: bool = True,
        bias_update_rate: Annotated[float, Field(ge=0)] = 1e-5,
    ) -> None:
        super().__init__(site, num_experts, r)
        ranks = num_experts * r
        check_top_k("smora", top_k, ranks, "ranks (num_experts * r)")
        if ranks % block_size or top_k % block_size:
            raise ConfigError(f"routers.smora: block_size {block_size} must divide top_k {top_k} and the {ranks} ranks")
        self.top_k, self.block_size = top_k, block_size
        self.score_fn, self.bias_in_gate, self.bias_update_rate = score_fn, bias_in_gate, bias_update_rate
        self.units = ranks // block_size
        self.weight = nn.Parameter(torch.empty(self.units, site.in_features))
        self.register_buffer("bias", torch.zeros(self.units))
        reset_linear(self.weight)

    @property
    def scale_rank(self) -> int:
        return self.top_k

    @property
    def chosen(self) -> int:
        return self.top_k // self.block_size

    def forward(self, x: Tensor, view: View) -> Route:
        logits = linear_scores(self.weight, x, view)
        scores = logits.sigmoid() if self.score_fn == "sigmoid" else logits.softmax(-1)
        biased = scores + self.bias
        index = view.once(lambda: top_k(biased, self.top_k // self.block_size))
        chosen = (biased if self.bias_in_gate else scores).gather(1, index)
        weight = self.top_k * chosen / (self.block_size * chosen.sum(-1, keepdim=True))
        probs = scores / scores.sum(-1, keepdim=True)
        route = Route(weight, self.units, index, logits, probs)
        if self.training and self.bias_update_rate:
            view.count(route.load(view.mask))
        return route

    def after_step(self, load: Tensor) -> None:
        level_by_sign(self.bias, load, self.bias_update_rate)
