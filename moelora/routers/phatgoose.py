"""PHATGOOSE: every expert learns alone which tokens it wants; afterwards each token picks among all of them.

Paper: Muqeeth et al., "Learning to Route Among Specialized Experts for Zero-Shot Generalization", arXiv 2402.05859
(ICML 2024); formulas agree with the released code. v_e is the gate vector of expert e.

    training (module.training), token of task e:
        y = W x + sigmoid(v_e . x) (lora_alpha / r) B_e A_e x
    eval, with a_e = norm(v_e) . norm(x),  norm(z) = (z - mean(z)) / sqrt(var(z) + 1e-5),  S = k largest a:
        y = W x + (lora_alpha / r) sum_S w_e B_e A_e x,   w = softmax(a_S / sqrt(D))

Shapes: weight (v) [E, D], zero; mean and variance are over D, as in torch.nn.LayerNorm; x is the projection's input
before dropout. Expert i stands for task i. A token trains its own expert and gate and nothing else, so one run trains
all of them as separate runs would; a token of no task (id -1) has no expert.

Training and eval differ by design: eval asks for no task, and its gates sum to 1. The training loss says nothing about
the routing, so judge by evaluation. A gate that was never trained is zero and has affinity 0 with every token.

The paper trains the experts first, at gate 1, and then for 100 steps the gates alone, experts frozen: that is
``experts: {train: none, adapters: [out/a, out/b]}``, where expert i must be the one of task i. Otherwise both train
together here, an expert at gate 1/2 at first.

Differences from the released code: there the softmax is over all experts, then cut to k and divided by its sum plus
1e-6.

Recipe line: ``router: {name: phatgoose, top_k: 2}``
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from moelora.core.route import Route, top_k
from moelora.core.tape import Site, View
from moelora.routers.base import Router, check_top_k, linear_scores, task_experts


class PHATGOOSE(Router):
    """Gates trained one by one, compared at inference. top_k: experts used per token in eval.

    Raises ConfigError when top_k exceeds num_experts. While training, raises DataError for a batch without task ids,
    and on CPU for an id of num_experts or more (elsewhere such a token has no expert).
    """

    def __init__(
        self,
        site: Site,
        num_experts: int,
        r: int,
        *,
        top_k: Annotated[int, Field(ge=1)] = 2,
    ) -> None:
        super().__init__(site, num_experts, r)
        check_top_k("phatgoose", top_k, num_experts)
        self.top_k = top_k
        self.weight = nn.Parameter(torch.zeros(num_experts, site.in_features))

    def forward(self, x: Tensor, view: View) -> Route:
        if self.training:
            own = task_experts(view, "phatgoose", self.num_experts)
            return Route(linear_scores(self.weight, x).sigmoid().where(own, 0), self.num_experts)
        dtype = torch.promote_types(x.dtype, torch.float32)
        width = (self.site.in_features,)
        gates, tokens = (F.layer_norm(z.to(dtype), width) for z in (self.weight, x))
        affinity = linear_scores(gates, tokens) / width[0] ** 0.5
        index = view.once(lambda: top_k(affinity, self.top_k))
        return Route(affinity.gather(1, index).softmax(-1), self.num_experts, index)
