"""One expert, always on: plain LoRA, the baseline every mixture is compared with.

Paper: Hu et al., LoRA, arXiv 2106.09685. Recipe line: ``router: {name: single}`` with ``num_experts: 1``
"""

from __future__ import annotations

import torch
from torch import Tensor

from moelora.core.errors import ConfigError
from moelora.core.route import Route
from moelora.core.tape import Site, View
from moelora.routers.base import Router


class Single(Router):
    """Gate 1 for the only expert. Raises ConfigError for more than one expert."""

    def __init__(self, site: Site, num_experts: int, r: int) -> None:
        super().__init__(site, num_experts, r)
        if num_experts != 1:
            raise ConfigError(f"routers.single is plain LoRA and takes num_experts: 1, found {num_experts}")

    def constant_gates(self, task: int | None) -> Tensor:
        return torch.ones(1)

    def forward(self, x: Tensor, view: View) -> Route:
        dtype = torch.promote_types(x.dtype, torch.float32)
        return Route(weight=x.new_ones(x.shape[0], 1, dtype=dtype), units=1)
