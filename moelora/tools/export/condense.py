"""Condensing a mixture that routes token by token into one LoRA that comes near it, and measuring how near.

With h = A x, and u what the routed layer makes of it (its update is B u, scales inside B), two LoRAs are candidates:

    average         the layer with the mean of every gate over the probe tokens
    least_squares   one constant gate c per rank, such that  sum_t ||B (c * h_t) - B u_t||^2  is least

The second solves (B^T B * sum_t h_t h_t^T) c = diag(B^T B sum_t u_t h_t^T) in float64. Only these sums are kept of the
tokens, [R, R] each. Directions that no token tells stay at the average gates. Experts with cores have one gate per core
instead, merged experts one per pair of experts, whose A and B meet there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moelora.core.errors import DataError
from moelora.core.factors import Factors
from moelora.core.route import Route
from moelora.experts.base import Decide
from moelora.experts.merged import Merged
from moelora.model.inputs import masks_of, two_streams
from moelora.model.layer import RoutedLinear
from moelora.model.record import routed_layers
from moelora.ops import reference
from moelora.ops.project import Image
from moelora.tools.export.plain import PlainLoRA, fold, with_fixed

Batches = Iterable[Mapping[str, Any]]
Own = Callable[..., Tensor]
"""The forward of a layer's experts."""
FITS = ("least_squares", "average")


@dataclass(frozen=True)
class Seen:
    """One call of a layer's experts, valid tokens only. x: [T, D] what a single LoRA would be given. given: [T, k, D]
    where every chosen expert had a token of its own, else x. update: [T, O], what the base layer's output got."""

    x: Tensor
    given: Tensor
    route: Route
    update: Tensor


class Sums:
    """What is kept of a site's probe tokens. H: sum of h h^T [R, R]; K: of u h^T [C, R]; gates: of the gates [G]."""

    def __init__(self, layer: RoutedLinear) -> None:
        self.layer, self.tokens = layer, 0
        self.H = self.K = self.gates = torch.zeros((), dtype=torch.float64)

    def add(self, seen: Seen) -> None:
        """Take a call's tokens in."""
        factors = self.layer.experts.composed()
        A = _wide(factors.A)
        h, gate = seen.x.double() @ A.t(), seen.route.dense().double()
        u = self._mixed(seen, h, gate, factors, A)
        self.H = self.H.to(h.device) + h.t() @ h
        self.K = self.K.to(h.device) + u.t() @ h
        self.gates = self.gates.to(h.device) + gate.sum(0)
        self.tokens += len(h)

    def average(self) -> PlainLoRA:
        """The layer with the mean gates."""
        return fold(self.layer.experts, self.gates / self.tokens)

    def least_squares(self) -> PlainLoRA:
        """The layer with the constant gates that come nearest."""
        experts, factors = self.layer.experts, self.layer.experts.composed()
        A, B, mean = _wide(factors.A), _wide(factors.B) * factors.scale.double(), self.gates / self.tokens
        gram = B.t() @ B
        if factors.core is not None:
            core = factors.core.double()
            normal = torch.einsum("qij,ik,pkl,lj->qp", core, gram, core, self.H)
            c = _solve(normal, torch.einsum("qij,ik,kj->q", core, gram, self.K), mean)
            return _float32(torch.einsum("q,qij->ij", c, core) @ A, B)
        units, width = len(mean), B.shape[1] // len(mean)
        if isinstance(experts, Merged):
            square = (units, width, units, width)
            normal = torch.einsum("ejak,fjbk->efab", gram.view(square), self.H.view(square)).reshape(units**2, units**2)
            right = torch.einsum("ejfj->ef", (gram @ self.K).view(square)).flatten()
            c = _solve(normal, right, torch.outer(mean, mean).flatten()).view(units, units)
            return _float32(A, torch.einsum("oej,ef->ofj", B.unflatten(1, (units, -1)), c).flatten(1))
        copies = B.shape[1] // A.shape[0]  # of h: one where A is not shared
        H, K = self.H.repeat(copies, copies), self.K.repeat(1, copies)
        c = _solve(gram * H, (gram @ K).diagonal(), mean.repeat_interleave(width))
        return _float32(A, (B * c).unflatten(1, (copies, -1)).sum(1))

    def _mixed(self, seen: Seen, h: Tensor, gate: Tensor, factors: Factors, A: Tensor) -> Tensor:
        """u [T, C]."""
        core, columns = factors.core, factors.B.shape[1]
        if seen.given.dim() == 3:
            each = (seen.given.double() @ A.t()).unflatten(2, (seen.route.units, -1))  # [T, k, G, width]
            index = seen.route.index
            assert index is not None
            own = torch.zeros_like(each[..., 0]).scatter(2, index.unsqueeze(2), seen.route.weight.double().unsqueeze(2))
            return (each * own.unsqueeze(-1)).sum(1).flatten(1)
        if isinstance(self.layer.experts, Merged):
            h = (h.unflatten(1, (gate.shape[1], -1)) * gate.unsqueeze(-1)).sum(1)
        return reference.mix(h, gate, None if core is None else core.double(), columns)


@torch.no_grad()
def candidates(model: nn.Module, batches: Batches) -> dict[str, dict[str, PlainLoRA]]:
    """The candidates from probe batches: by name of the fit and module path. Raises DataError without tokens."""
    sums = {layer.site.name: Sums(layer) for layer in routed_layers(model)}
    for batch in batches:
        with watching(model, batch, lambda layer, seen: sums[layer.site.name].add(seen)):
            predictions(model, batch)
    unseen = [path for path, found in sums.items() if not found.tokens]
    if unseen:
        raise DataError(f"no probe token reached '{unseen[0]}'; give other probe data (--probe FILE)")
    return {
        "least_squares": {path: with_fixed(found.layer.experts, found.least_squares()) for path, found in sums.items()},
        "average": {path: found.average() for path, found in sums.items()},
    }


@torch.no_grad()
def predictions(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """[N, V] log-probabilities of every real token's next token (of every row's class, for a classifier)."""
    given = {key: value for key, value in batch.items() if key != "labels" or two_streams(model)}
    device = next(model.parameters()).device
    given = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in given.items()}
    logits: Tensor = model(**given).logits
    mask = masks_of(given).get("decoder" if two_streams(model) else "input")
    if mask is not None and mask.shape == logits.shape[:-1]:
        logits = logits[mask]
    return logits.reshape(-1, logits.shape[-1]).float().log_softmax(-1)


@contextmanager
def watching(model: nn.Module, batch: Mapping[str, Any], see: Callable[[RoutedLinear, Seen], None]) -> Iterator[None]:
    """Show every call of a layer's experts inside to ``see``: of a forward of ``batch``, its real tokens."""
    masks = masks_of(dict(batch))

    def watch(
        layer: RoutedLinear, own: Own, x: Tensor, decide: Decide, rest: tuple[Any, ...], image: Image | None
    ) -> Tensor:
        routes: list[Route] = []

        def remembered(factors: Factors, image: Image) -> Route:
            routes.append(decide(factors, image))
            return routes[0]

        whole = own(x, remembered, *rest, image=image)
        given, update, route = x, whole, routes[0]
        mask = masks.get(layer.site.stream)
        if mask is not None and mask.numel() == len(given):
            valid = mask.reshape(-1).to(given.device)
            given, update = given[valid], update[valid]
            index = None if route.index is None else route.index[valid]
            route = Route(route.weight[valid], route.units, index)
        weight = route.weight.unsqueeze(-1)
        mean = given if given.dim() == 2 else (given * weight.to(given)).sum(1)
        summed = update if update.dim() == 2 else (update * weight.to(update)).sum(1)
        see(layer, Seen(mean, given, route, layer.experts.under(mean, summed)))
        return whole

    with _in_place_of_experts(model, watch):
        yield


@contextmanager
def replaced(model: nn.Module, loras: Mapping[str, PlainLoRA]) -> Iterator[None]:
    """The model with one plain LoRA per layer in the place of its experts, whatever its router says."""

    def alone(
        layer: RoutedLinear, _: Own, x: Tensor, decide: Decide, rest: tuple[Any, ...], image: Image | None
    ) -> Tensor:
        route = decide(layer.experts.composed(), image or Image(x))
        token = x if x.dim() == 2 else x[:, 0]  # the copies of a feed-forward block are all the same
        update = loras[layer.site.name](token)
        update = update - layer.experts.under(token, torch.zeros_like(update))  # the layer adds that itself
        if rest == ("each",):
            assert route.index is not None
            return update.unsqueeze(1).expand(-1, route.index.shape[1], -1)
        return update

    with _in_place_of_experts(model, alone):
        yield


@contextmanager
def _in_place_of_experts(model: nn.Module, compute: Callable[..., Tensor]) -> Iterator[None]:
    """``compute`` gives every layer's update inside; what it is added to is not its business."""
    own = {layer: layer.experts.forward for layer in routed_layers(model)}

    def forward(
        layer: RoutedLinear, x: Tensor, decide: Decide, *rest: Any, onto: Tensor | None = None, image: Any = None
    ) -> Tensor:
        update = compute(layer, own[layer], x, decide, rest, image)
        return update if onto is None else onto + update.to(onto.dtype)

    for layer in own:
        layer.experts.forward = partial(forward, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in own:
            del layer.experts.forward


def _solve(normal: Tensor, right: Tensor, start: Tensor) -> Tensor:
    """The solution of a positive semi-definite system that is nearest to ``start``."""
    return start + torch.linalg.pinv(normal, rtol=1e-10, hermitian=True) @ (right - normal @ start)


def _wide(half: Tensor | None) -> Tensor:
    assert half is not None
    return half.detach().double()


def _float32(A: Tensor, B: Tensor) -> PlainLoRA:
    return PlainLoRA(A.float(), B.float())
