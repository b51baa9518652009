"""RoutedLinear: a frozen base layer, its experts and its router."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moelora.core.errors import MoeloraError
from moelora.core.factors import Factors
from moelora.core.route import Route
from moelora.core.tape import Port, Site, Tape, View
from moelora.experts.base import Experts
from moelora.losses.base import Loss
from moelora.routers.base import Router


class RoutedLinear(nn.Module):
    """y = base_layer(x) + experts(x; router(x)). Stands where the base layer stood and looks like it.

    x [..., D] to y [..., O]. The base layer is only ever called, so a quantised one is as good as any.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        site: Site,
        experts: Experts,
        router: Router,
        losses: dict[str, Loss],
        port: Port,
        dropout: float,
    ) -> None:
        super().__init__()
        self.base_layer, self.experts, self.router = base_layer, experts, router
        self.dropout = nn.Dropout(dropout)
        self.site, self.losses, self.port = site, losses, port
        self.in_features, self.out_features = site.in_features, site.out_features

    @property
    def weight(self) -> Any:
        """The base layer's, for models that look at a layer's dtype or device."""
        if self.port.tape is not None:
            self.port.tape.read.add(self.site.index)
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        """The base layer's."""
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        return y + self._exact(self._update, x, y).to(y.dtype) if self.port.enabled else y

    @staticmethod
    def _exact(compute: Callable[..., Tensor], x: Tensor, *more: Tensor) -> Tensor:
        """``compute(x, ...)``; under autocast with x in autocast's dtype and routing left in float32."""
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return compute(x, *more)
        with torch.autocast(device, enabled=False):
            return compute(x.to(torch.get_autocast_dtype(device)), *more)

    def _update(self, x: Tensor, y: Tensor) -> Tensor:
        view = self._tape().view(self.site, x.shape[:-1])
        tokens = x.reshape(-1, self.site.in_features)
        dropped = self.dropout(tokens)
        routes: list[Route] = []

        def decide(factors: Factors, h: Tensor | None) -> Route:
            routes.append(self._route(tokens, dropped, h, replace(view, factors=factors)))
            return routes[0]

        update: Tensor = self.experts(dropped, decide, "rank_space" if self.router.reads == "h" else "tokens")
        beside = self.experts.beside(routes[0], y.reshape(-1, self.site.out_features))
        update = update if beside is None else update + beside.to(update.dtype)
        return update.view(*x.shape[:-1], self.site.out_features)

    def _route(self, tokens: Tensor, dropped: Tensor, h: Tensor | None, view: View) -> Route:
        seen = {"dropped": dropped, "h": h}.get(self.router.reads, tokens)
        route: Route = self.experts.admit(self.router(seen, view))
        if view.tape.with_terms:
            for name, loss in self.losses.items():
                view.add(name, loss(route, view.only(loss.tokens)))
        view.observe(route)
        return route

    def _tape(self) -> Tape:
        if self.port.tape is not None:
            return self.port.tape
        if self.losses and self.training and torch.is_grad_enabled():
            raise MoeloraError(
                f"'{self.site.name}' was called outside its model's own forward, where its auxiliary losses "
                f"({', '.join(self.losses)}) would be lost; call the whole model, or configure no losses"
            )
        return Tape()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
