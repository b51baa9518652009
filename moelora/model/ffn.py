"""Layers of a routed feed-forward block: experts around its frozen weights, whose products are computed once.

A block ``down(act(gate(x)) * up(x))`` stays the base model's own code. What its first projections give is one copy per
chosen expert, side by side on the feature axis, where activation and product act elementwise; the last projection puts
the copies together again. With weights w_e and copies a_e of the intermediate state:

    gate, up:  [G x + s B_e A_e x  for e in S]                         G x once
    down:      D (sum_S w_e a_e) + sum_S w_e s B_e A_e a_e             D once, since it is linear and the w_e sum to 1
"""

from __future__ import annotations

from torch import Tensor, nn

from moelora.core.errors import MoeloraError, TargetError
from moelora.core.factors import Factors
from moelora.core.route import Route
from moelora.core.tape import Site
from moelora.model.layer import RoutedLinear
from moelora.ops.project import Image

FIRST = ("gate_proj", "up_proj", "c_fc", "fc1", "fc_in", "w1", "w3", "wi", "wi_0", "wi_1", "dense_h_to_4h")
LAST = ("down_proj", "c_proj", "fc2", "fc_out", "w2", "wo", "dense_4h_to_h")


def block_layers(model: nn.Module, sites: list[Site]) -> dict[str, type[RoutedLinear]]:
    """Which kind of layer each site becomes, by name. Raises TargetError unless the sites are whole blocks."""
    names = {site.name for site in sites}
    kinds: dict[str, type[RoutedLinear]] = {}
    for site in sites:
        own = {child: f"{site.parent}.{child}" for child, _ in model.get_submodule(site.parent).named_children()}
        inside = {child: path for child, path in own.items() if child in FIRST + LAST}
        if not any(child in FIRST for child in inside) or sum(child in LAST for child in inside) != 1:
            lora = "; attention may have a LoRA beside them: router: {name: mixlora, attention: lora}"
            raise TargetError(
                f"'{site.name}' is not part of a feed-forward block that experts can be put around; target its "
                f"projections alone (known names: {', '.join(FIRST + LAST)}){lora if site.in_attention else ''}"
            )
        absent = [path for path in inside.values() if path not in names]
        if absent or site.name not in inside.values():
            raise TargetError(f"experts around '{site.parent}' need all its projections as targets; missing: {absent}")
        kinds[site.name] = LastLinear if site.name.rpartition(".")[2] in LAST else FirstLinear
    return kinds


class FirstLinear(RoutedLinear):
    """x [..., D] to [..., k * O]: one copy per chosen expert. The first such layer of a block routes for all."""

    def forward(self, x: Tensor) -> Tensor:
        y = self._base(x)
        if not self.port.enabled:
            return y
        update = self._exact(self._each, x)
        return (y.unsqueeze(-2) + update.view(*y.shape[:-1], *update.shape[1:]).to(y.dtype)).flatten(-2)

    def _each(self, x: Tensor) -> Tensor:
        tape = self._tape()
        tokens = x.reshape(-1, self.site.in_features)
        dropped = self.dropout(tokens)
        shared = tape.shared

        def decide(factors: Factors, image: Image) -> Route:
            view = tape.view(self.site, x.shape[:-1], factors, image)
            if self.site.parent not in shared:
                shared[self.site.parent] = self._route(tokens, image, view)
            return shared[self.site.parent]

        update: Tensor = self.experts(dropped, decide, "each")
        return update


class LastLinear(RoutedLinear):
    """[..., k * D], one copy per chosen expert, to y [..., O]."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.port.enabled:
            return self._base(x)
        tape = self._tape()
        tape.called.add(self.site.index)
        route = tape.shared.pop(self.site.parent, None)
        if route is None:
            raise MoeloraError(
                f"'{self.site.name}' was called without the layers before it in its block, or outside its model's own "
                "forward, where they cannot leave it their route; call the whole model"
            )
        copies = x.unflatten(-1, (-1, self.site.in_features))
        rows = copies.reshape(-1, *copies.shape[-2:])
        whole = (rows * route.weight.unsqueeze(-1).to(rows.dtype)).sum(1)
        y = self._base(whole.view(*x.shape[:-1], self.site.in_features))
        dropped = self.dropout(rows)
        update = self._exact(lambda given: self.experts(given, lambda *_: route, "sum"), dropped)
        return y + update.view(y.shape).to(y.dtype)
