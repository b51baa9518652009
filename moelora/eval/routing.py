"""Routing statistics: where the tokens of each task go, per layer, and an alarm for layers that collapse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from moelora.core.route import Route
from moelora.core.tape import View

TINY = 1e-20


@dataclass
class RoutingStats:
    """An observer for ``moelora.collect``: sums over tokens, a few numbers per layer and task.

    Of tasks 0 to len(tasks) - 1; tokens of no known task, and padding, are left out. What counts of a token are the
    absolute values of its gates, divided by their sum. Nothing leaves the device until a figure is asked for, and then
    the sums of all layers go together.

    experts: names of the units of routers that choose among experts, if they have some.
    sums: per site [tasks, 2 G + 3], over the tokens of a task: each unit's part; how often it was the first choice
    (equal ones in equal parts); the entropy; the number of units chosen; the number of tokens.
    """

    tasks: list[str]
    experts: list[str] = field(default_factory=list)
    sums: dict[str, Tensor] = field(default_factory=dict)
    _layers: dict[str, LayerStats] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self, view: View, route: Route) -> None:
        if route.units == 1:
            return
        gate = route.dense().abs().float()
        part = gate / gate.sum(-1, keepdim=True).clamp(min=TINY)
        chosen = part > 0
        first = ((part == part.amax(-1, keepdim=True)) & chosen).float()
        first = first / first.sum(-1, keepdim=True).clamp(min=1)
        entropy = -(part * part.clamp(min=TINY).log()).sum(-1)
        rest = torch.stack([entropy, chosen.sum(-1).float(), torch.ones_like(entropy)], dim=-1)
        counts = self._counts(view, part).t()
        found = torch.cat([counts @ part, counts @ first, counts @ rest], dim=-1)
        name = view.site.name
        self.sums[name] = self.sums[name] + found if name in self.sums else found
        self._layers.clear()

    def _counts(self, view: View, like: Tensor) -> Tensor:
        """[T, tasks] of 1 where a token counts for a task, else 0."""
        tasks = torch.arange(len(self.tasks), device=like.device)
        task = tasks.new_zeros(len(like), 1) if view.task is None else view.task.unsqueeze(-1)
        belongs = task == tasks
        return (belongs if view.mask is None else belongs & view.mask.unsqueeze(-1)).float()

    def reduce(self, add_up: Callable[[Tensor], Tensor]) -> None:
        """Replace the sums by those of all processes; add_up gives the sum of one tensor over them."""
        if self.sums:
            self.sums = self._split(add_up(self._flat()))
            self._layers.clear()

    def _flat(self) -> Tensor:
        values = list(self.sums.values())
        return torch.cat([value.to(values[0].device).flatten() for value in values])

    def _split(self, flat: Tensor) -> dict[str, Tensor]:
        parts = flat.split([value.numel() for value in self.sums.values()])
        return {site: part.view_as(old) for (site, old), part in zip(self.sums.items(), parts, strict=True)}

    @property
    def layers(self) -> dict[str, LayerStats]:
        """What each router with more than one unit did, by site."""
        if self.sums and not self._layers:
            here = self._split(self._flat().cpu().double())
            self._layers = {site: LayerStats(*_columns(value)) for site, value in here.items()}
        return self._layers

    def summary(self) -> dict[str, float]:
        """Means over layers of ``LayerStats.figures``, and how many layers have ``collapsed``."""
        rows = [layer.figures for layer in self.layers.values()]
        if not rows:
            return {}
        means = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
        return {**means, "collapsed": float(sum(layer.collapsed is True for layer in self.layers.values()))}

    def to_json(self) -> dict[str, Any]:
        """Everything, rounded, for a report: per site the load by task and the layer's figures, and their summary."""
        return {
            "tasks": self.tasks,
            **({"experts": self.experts} if self.experts else {}),
            "sites": {
                site: {
                    "load": [[round(value, 5) for value in row] for row in layer.load.tolist()],
                    "units": layer.units,
                    **_rounded(layer.figures),
                }
                for site, layer in self.layers.items()
            },
            "summary": _rounded(self.summary()),
        }


@dataclass(frozen=True)
class LayerStats:
    """Sums of one layer, on the host. mass, first: [tasks, G]; entropy, chosen, tokens: [tasks]; see RoutingStats."""

    mass: Tensor
    first: Tensor
    entropy: Tensor
    chosen: Tensor
    tokens: Tensor

    @property
    def units(self) -> int:
        """G."""
        return self.mass.shape[1]

    @property
    def load(self) -> Tensor:
        """[tasks, G], rows sum to 1: the share of a task's gate mass that each unit gets."""
        return self.mass / self.mass.sum(-1, keepdim=True).clamp(min=TINY)

    @property
    def overall(self) -> Tensor:
        """[G], sums to 1: the share of all gate mass that each unit gets."""
        total = self.mass.sum(0)
        return total / total.sum().clamp(min=TINY)

    @cached_property
    def figures(self) -> dict[str, float]:
        """The layer in numbers from 0 to 1.

        load_entropy: of ``overall``, 1 is even. top_share: of the busiest unit in it. dead: share of units with less
        than a tenth of an even load. specialisation: how far a task's load is from all tasks'. top1: the largest share
        of tokens that have one unit as their first choice. token_entropy: of the gates of a token, 1 is even over all
        units. agreement: what a token's first choice tells of its task, their mutual information by the entropy of the
        task; 0 when only one task was seen, and too high from few tokens.
        """
        overall, seen, even = self.overall, self.tokens > 0, torch.tensor(float(self.units)).log().item()
        tokens = max(1.0, self.tokens.sum().item())
        distance = (self.load[seen] - overall).abs().sum(-1) / 2
        return {
            "load_entropy": _entropy(overall) / even,
            "top_share": overall.max().item(),
            "dead": (overall < 0.1 / self.units).double().mean().item(),
            "specialisation": distance.mean().item() if len(distance) else 0.0,
            "top1": self.first.sum(0).max().item() / tokens,
            "token_entropy": self.entropy.sum().item() / tokens / even,
            "agreement": _agreement(self.first),
        }

    @property
    def collapsed(self) -> bool | None:
        """Whether one unit is the first choice of over 95 % of the tokens, or over half of the units are dead.

        None where that says nothing: fewer than ten choices per unit, or one task of several, which may well have a
        unit to itself. A first choice does not count where all units are always chosen and gates are rather even.
        """
        tokens, chosen = self.tokens.sum().item(), self.chosen.sum().item()
        if chosen < 10 * self.units or (self.tokens > 0).sum() < min(2, len(self.tokens)):
            return None
        figures = self.figures
        soft = chosen >= self.units * tokens and figures["token_entropy"] > 0.5
        return figures["dead"] > 0.5 or (figures["top1"] > 0.95 and not soft)


class CollapseAlarm:
    """Speaks up when layers have collapsed in two updates in a row; once, and again when there are more of them."""

    def __init__(self) -> None:
        self.before: set[str] = set()
        self.reported = 0

    def update(self, stats: RoutingStats) -> str | None:
        """A warning of one line, or None."""
        state = {site: layer.collapsed for site, layer in stats.layers.items()}
        lasting = [site for site, collapsed in state.items() if collapsed and site in self.before]
        self.before = {site for site, now in state.items() if now or (now is None and site in self.before)}
        if len(lasting) <= self.reported:
            return None
        self.reported = len(lasting)
        figures = {site: stats.layers[site].figures for site in lasting}
        worst = max(lasting, key=lambda site: max(figures[site]["top_share"], figures[site]["dead"]))
        layer, units = figures[worst], stats.layers[worst].units
        return (
            f"warning: routing has collapsed in {len(lasting)} of {len(state)} layers; worst is {worst}: one of its "
            f"{units} units is the first choice of {100 * layer['top1']:.0f} % of the tokens, "
            f"{layer['dead'] * units:.0f} are dead, load entropy {layer['load_entropy']:.2f} (1 is even); "
            "try losses: {balance: 0.01} or a lower learning rate"
        )


def _columns(sums: Tensor) -> tuple[Tensor, ...]:
    """[tasks, 2 G + 3] as mass, first, entropy, chosen and tokens."""
    units = (sums.shape[1] - 3) // 2
    return (sums[:, :units], sums[:, units:-3], *sums[:, -3:].unbind(-1))


def _entropy(shares: Tensor) -> float:
    """Entropy in nats of shares that sum to 1."""
    return max(0.0, -torch.xlogy(shares, shares).sum().item())


def _agreement(counts: Tensor) -> float:
    """I(unit; task) / H(task) from how often they occurred together [tasks, G]."""
    together = counts / counts.sum().clamp(min=TINY)
    task = _entropy(together.sum(1))
    if task < 1e-9:
        return 0.0
    return min(1.0, max(0.0, (task + _entropy(together.sum(0)) - _entropy(together)) / task))


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 5) for key, value in figures.items()}
