"""SMEAR: one gate per sequence, from the mean of its tokens.

Paper: Muqeeth et al., "Soft Merging of Experts with Adaptive Routing", arXiv 2306.03745:

    g = softmax(Wg mean_t x_t)

to be used with ``experts: merged``, which averages the experts' parameters by g. Shapes: weight (Wg) [E, D], no bias; x
is the projection's input before dropout. The mean is over valid tokens; a gate is linear, so the logits are averaged.

pool: prefix gives every token the mean over the tokens up to it, which a causal model may see and a cache can carry
(sum and count per row). sequence is the paper's mean over the whole sequence, the same gate for all its tokens: for
encoders only, since in a causal language model tokens would see what they are trained to predict.

Differences from the paper: the prefix mean, for decoders; no layer normalisation in the router.

Recipe line: ``router: {name: smear}`` with ``experts: {name: merged, num_experts: 8, r: 8, lora_alpha: 16}``
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from moelora.core.route import Route
from moelora.core.tape import Site, View
from moelora.routers.base import Router, linear_scores, reset_linear, running_mean


class Smear(Router):
    """Softmax over all experts of mean logits. pool: prefix, or sequence for encoders.

    Raises ConfigError when pool: sequence meets a cache or the decoder of an encoder-decoder.
    """

    scores = "weight"
    gives = ("logits", "probs")
    remembers = True

    def __init__(self, site: Site, num_experts: int, r: int, *, pool: Literal["prefix", "sequence"] = "prefix") -> None:
        super().__init__(site, num_experts, r)
        self.pool = pool
        self.weight = nn.Parameter(torch.empty(num_experts, site.in_features))
        reset_linear(self.weight)

    def forward(self, x: Tensor, view: View) -> Route:
        logits = running_mean(linear_scores(self.weight, x, view), view, self.pool)
        probs = logits.softmax(-1)
        return Route(probs, self.num_experts, None, logits, probs)
