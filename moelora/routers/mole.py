"""MoLE: a gate that looks at what the experts would say about the sequence.

Paper: Wu, Huang and Wei, "Mixture of LoRA Experts", arXiv 2404.13628 (ICLR 2024). With the mean over the sequence of
every expert's output, each brought to unit length, side by side:

    o_e = (lora_alpha / r) B_e mean_t(A_e x_t);   l = Wg [o_1/|o_1|; ..; o_E/|o_E|] / tau;   g = softmax(l)
    y = W x + sum_e g_e (lora_alpha / r) B_e A_e x

Shapes: weight (Wg) [E, E*O], log_tau [1] (tau = exp(log_tau), 1 at the start); Wg starts as a linear layer does, which
on unit vectors is close to uniform gates. x is the input after dropout. Everything is computed in rank space from
Wg B_e and B_e^T B_e; no output of an expert is ever made. An output shorter than 1e-12 counts as zero.

pool: prefix takes the mean over the tokens up to each, which a causal model may see and a cache can carry; sequence
takes the whole sequence, for encoders only (in a causal language model tokens would see what they are to predict).

The gate reads the experts, so its gradient reaches A and B where they train. In the paper the experts are trained LoRAs
that stay frozen: ``experts: {train: none, adapters: [out/a, out/b]}``.

Differences from the paper: outputs are averaged over tokens, where it flattens them and learns a weight per position;
one gate per adapted layer, where it has one per block; its balance loss (-log of the product of mean gates) is left
out, ``losses: {balance: ..}`` can stand in for it.

Recipe line: ``router: {name: mole}`` with ``experts: {num_experts: 4, r: 8, lora_alpha: 16}``
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from moelora.core.route import Route
from moelora.core.tape import Site, View
from moelora.routers.base import Router, reset_linear, running_mean

SHORTEST = 1e-12
"""Length of an output that still has a direction."""


class MoLE(Router):
    """Softmax over all experts of a projection of their pooled outputs. pool: prefix, or sequence for encoders.

    Raises ConfigError when pool: sequence meets a cache or the decoder of an encoder-decoder.
    """

    reads = "h"
    gives = ("logits", "probs")
    needs = ("own_A",)
    remembers = True

    def __init__(self, site: Site, num_experts: int, r: int, *, pool: Literal["prefix", "sequence"] = "prefix") -> None:
        super().__init__(site, num_experts, r)
        self.pool = pool
        self.weight = nn.Parameter(torch.empty(num_experts, num_experts * site.out_features))
        self.log_tau = nn.Parameter(torch.zeros(1))
        reset_linear(self.weight)

    def forward(self, x: Tensor, view: View) -> Route:
        assert view.factors is not None
        E, B, scale = self.num_experts, view.factors.B, view.factors.scale
        mean = running_mean(x, view, self.pool).unflatten(1, (E, -1))
        up = (B.to(mean.dtype) * scale.to(mean.dtype)).unflatten(1, (E, -1))
        seen = torch.einsum("geo,oer->ger", self.weight.to(mean.dtype).unflatten(1, (E, -1)), up)
        gram = torch.einsum("oei,oej->eij", up, up)
        square = (torch.einsum("tei,eij->tej", mean, gram) * mean).sum(-1)  # [T, E], |o_e|^2
        there = square > SHORTEST**2
        direction = mean * (square.where(there, 1).rsqrt() * there).unsqueeze(-1)
        logits = torch.einsum("ger,ter->tg", seen, direction) / self.log_tau.to(mean.dtype).exp()
        probs = logits.softmax(-1)
        return Route(probs, E, None, logits, probs)
