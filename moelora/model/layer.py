"""RoutedLinear: a frozen base layer, its experts and its router."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from moelora.core.errors import MoeloraError
from moelora.core.factors import Factors
from moelora.core.route import Route
from moelora.core.tape import Port, Site, Tape, View
from moelora.experts.base import Experts
from moelora.losses.base import Loss
from moelora.model.fellows import Reader, image_of
from moelora.ops.noise import noisy
from moelora.ops.project import Image
from moelora.routers.base import Router

LARGE: Final = 256.0
"""What rows are multiplied by before a half-precision product with a bias, which may be far larger than they are."""


class RoutedLinear(nn.Module):
    """y = base_layer(x) + experts(x; router(x)). Stands where the base layer stood and looks like it.

    x [..., D] to y [..., O]. The base layer is only ever called, so a quantised one is as good as any.

    noise: (deviation [O], seed) of what a method adds to the base weight in training, see ``moelora.ops.noise``, or
    None. It changes between steps alone.
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
        experts.affine = self.affine
        self.in_features, self.out_features = site.in_features, site.out_features
        self.fellows: tuple[Reader, ...] = ()
        self.noise: tuple[Tensor, int] | None = None

    @property
    def reader(self) -> Reader:
        """What it reads tokens for."""
        return Reader(self.site.index, self.experts, self.router, self.dropout)

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

    @torch.no_grad()
    def affine(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """(rows [N, D] W^T, the bias [O] or None) of the base layer, for experts that need more of it than its output.

        It is called, so that it may be quantised or partitioned.
        """
        kept = (torch.bfloat16, torch.float16, torch.float64)
        dtype: Any = self.base_layer.weight.dtype if self.base_layer.weight.dtype in kept else torch.float32
        given = torch.cat([rows * LARGE, torch.zeros_like(rows[:1])])
        out: Tensor = self.base_layer(given.to(dtype)).to(rows.dtype)
        return (out[:-1] - out[-1]) / LARGE, None if getattr(self.base_layer, "bias", None) is None else out[-1]

    def forward(self, x: Tensor) -> Tensor:
        y = self._base(x)
        return self._exact(self._updated, x, y, x) if self.port.enabled else y

    def _base(self, x: Tensor) -> Tensor:
        """The base layer's output, as the experts stand on it: with what every token gets, and by a noisy weight."""
        y: Tensor = self.base_layer(x)
        if not self.port.enabled:
            return y
        y = self.experts.under(x, y)
        return y if self.noise is None or not self.training else y + noisy(x.to(y.dtype), *self.noise)

    @staticmethod
    def _exact(compute: Callable[..., Tensor], x: Tensor, *more: Tensor) -> Tensor:
        """``compute(x, ...)``; under autocast with x in autocast's dtype and routing left in float32."""
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return compute(x, *more)
        with torch.autocast(device, enabled=False):
            return compute(x.to(torch.get_autocast_dtype(device)), *more)

    def _updated(self, x: Tensor, y: Tensor, given: Tensor) -> Tensor:
        """y and its update. given: x as the layer was called with it."""
        tape = self._tape()
        tokens, flat = x.reshape(-1, self.site.in_features), y.reshape(-1, self.site.out_features)
        dropped = self.dropout(tokens) if self.dropout.training else tokens
        seen = image_of(self.reader, self.fellows if self.port.tape is tape else (), given, dropped, tape)
        tokens = seen.x if dropped is tokens else tokens

        def decide(factors: Factors, image: Image) -> Route:
            return self._route(tokens, image, tape.view(self.site, x.shape[:-1], factors, image))

        updated: Tensor = self.experts(seen.x, decide, onto=flat, image=seen)
        return updated.view(y.shape)

    def _route(self, tokens: Tensor, image: Image, view: View) -> Route:
        """The route of tokens [T, D], from what the router reads of them; the experts see them as ``image``."""
        seen = tokens
        if self.router.reads == "dropped":
            seen = image.x
        elif self.router.reads == "h":
            assert view.factors is not None and view.factors.A is not None
            seen = image.under(view.factors.A)
        counted, allocator = view.tape.load.get(self.site.index), self.experts.allocator
        route: Route = self.experts.admit(self.router(seen, view))
        unseen = view.tape.load.get(self.site.index) is counted  # some routers count for themselves
        if self.training and allocator is not None and allocator.counts and unseen:
            view.count(route.load(view.mask))
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
