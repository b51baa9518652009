"""Routing statistics: where the tokens of each task go, per layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moelora.core.route import Route
from moelora.core.tape import View


@dataclass
class RoutingStats:
    """An observer for ``moelora.collect``: sums over tokens, a few numbers per layer and task.

    Of tasks 0 to len(tasks) - 1; tokens of no known task, and padding, are left out.
    """

    tasks: list[str]
    mass: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)
    entropy: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self, view: View, route: Route) -> None:
        if route.units == 1:
            return
        gate = route.dense().abs().float()
        share = gate / gate.sum(-1, keepdim=True).clamp(min=1e-20)
        task = torch.zeros(len(share), dtype=torch.long, device=share.device) if view.task is None else view.task
        valid = (task >= 0) & (task < len(self.tasks))
        if view.mask is not None:
            valid &= view.mask
        member = torch.nn.functional.one_hot(task.clamp(0, len(self.tasks) - 1), len(self.tasks)).float()
        member *= valid.unsqueeze(-1)
        name = view.site.name
        self._add(self.mass, name, member.t() @ share)
        self._add(self.tokens, name, member.sum(0))
        spread = -(share * share.clamp(min=1e-20).log()).sum(-1)
        self._add(self.entropy, name, member.t() @ spread)

    @staticmethod
    def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
        sums[name] = sums[name] + value if name in sums else value

    def load(self, site: str) -> Tensor:
        """[tasks, G], rows sum to 1: the share of a task's gate mass that each unit gets."""
        return self.mass[site] / self.mass[site].sum(-1, keepdim=True).clamp(min=1e-20)

    def overall(self, site: str) -> Tensor:
        """[G], sums to 1: the share of all gate mass that each unit gets."""
        total = self.mass[site].sum(0)
        return total / total.sum().clamp(min=1e-20)

    def summary(self) -> dict[str, float]:
        """Means over layers: load_entropy (1 is perfectly even), top_share of the busiest unit, dead share of units
        that get under a tenth of an even share, specialisation (how far a task's load is from all tasks', 0 to 1)."""
        if not self.mass:
            return {}
        rows = [self.layer(site) for site in self.mass]
        return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}

    def layer(self, site: str) -> dict[str, float]:
        """The figures of ``summary`` for one layer."""
        load, units = self.overall(site), self.mass[site].shape[1]
        entropy = -(load * load.clamp(min=1e-20).log()).sum() / torch.tensor(float(units)).log()
        seen = self.tokens[site] > 0
        distance = (self.load(site)[seen] - load).abs().sum(-1) / 2
        return {
            "load_entropy": float(entropy),
            "top_share": float(load.max()),
            "dead": float((load < 0.1 / units).float().mean()),
            "specialisation": float(distance.mean()) if len(distance) else 0.0,
        }

    def to_json(self) -> dict[str, Any]:
        """Everything, rounded, for a report: per site the load by task and the layer's figures."""
        return {
            "tasks": self.tasks,
            "sites": {
                site: {
                    "load": [[round(v, 5) for v in row] for row in self.load(site).tolist()],
                    **{key: round(value, 5) for key, value in self.layer(site).items()},
                }
                for site in self.mass
            },
        }
