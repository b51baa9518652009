"""Localised balance: a level load among experts of one type, and another level for experts of the sample's own type.

    Z[n, e] = sum over tokens t of sample n of c[t, e] g[t, e],   L = var(Z) / (mean(Z)^2 + 1e-10)

Paper: Dou et al., LoRAMoE, arXiv 2312.09979 (ACL 2024); formula from the released code, whose types are world knowledge
and other tasks, with one half of the experts each, and whose script has delta 0.

c is 1 + delta where the expert's type is that of the token's task, else 1 - delta; var (unbiased) and mean are over all
entries of Z [N, E]. Mind the sign: L is 0 where c g is level, so with delta > 0 experts of the sample's type get
(1 - delta) / (1 + delta) times the load of the others; delta < 0 turns it round. Hence delta has no default. g are the
gates that mix: a router whose gates are always 1 (top-1, renormalised) learns nothing from it.

Over valid tokens, mean over layers. A sample is a row of the batch. c applies per token, so a packed row may hold tasks
of several types; with one task per row this is the formula above. Tokens of no known task (id -1) have c = 1; rows
without a valid token are no samples. Z counts tokens: long samples weigh more, and unequal lengths alone make L
positive, as in the released code. Every process has the variance of its own rows, nothing is summed over processes.

Recipe line: ``losses: {localised_balance: {weight: 0.01, expert_types: [0, 1], task_types: [0, 1], delta: 0.1}}`` with
``experts: {num_experts: 2}``
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from moelora.core.errors import ConfigError, DataError
from moelora.core.route import Route
from moelora.core.tape import View
from moelora.losses.base import Loss


class LocalisedBalance(Loss):
    """expert_types: type of each unit. task_types: type of each task, by task id. delta: see above.

    Raises ConfigError when a task's type has no expert, or the router has another number of units than expert_types;
    DataError for a batch without task ids, or with one beyond task_types.
    """

    def __init__(
        self,
        weight: float,
        tokens: Literal["all", "answers"] = "all",
        *,
        expert_types: Annotated[list[int], Field(min_length=1)],
        task_types: Annotated[list[int], Field(min_length=1)],
        delta: Annotated[float, Field(ge=-1, le=1)],
    ) -> None:
        super().__init__(weight, tokens)
        absent = sorted(set(task_types) - set(expert_types))
        if absent:
            raise ConfigError(
                f"losses.localised_balance: task_types has {absent}, a type that no expert has; "
                f"expert_types is {expert_types}"
            )
        self.expert_types, self.task_types, self.delta = expert_types, task_types, delta
        self._table: Tensor | None = None

    def admit(self, units: int) -> None:
        if units != len(self.expert_types):
            raise ConfigError(
                f"losses.localised_balance: expert_types has {len(self.expert_types)} entries, but the router chooses "
                f"between {units} units; give one type to each"
            )

    def __call__(self, route: Route, view: View) -> Tensor:
        gates = route.dense() * self._factor(view, route.weight)
        valid = gates.new_ones(len(gates)) if view.mask is None else view.mask.to(gates.dtype)
        samples = view.shape[0] if view.shape else 1
        z = (gates * valid.unsqueeze(-1)).view(samples, -1, route.units).sum(1)
        real = valid.view(samples, -1).amax(1, keepdim=True)
        count = real.sum() * route.units
        mean = z.sum() / count.clamp(min=1)
        var = (real * (z - mean).square()).sum() / (count - 1).clamp(min=1)
        return var / (mean.square() + 1e-10)

    def _factor(self, view: View, like: Tensor) -> Tensor:
        """[T, E] of 1 + delta or 1 - delta."""
        task = view.tasks("losses.localised_balance needs the task of every sequence")
        if task.device.type == "cpu" and (task >= len(self.task_types)).any():  # a GPU would have to wait
            raise DataError(
                f"losses.localised_balance: task id {int(task.max())}, but task_types has "
                f"{len(self.task_types)} entries; give one type to each task"
            )
        if self._table is None or self._table.device != like.device:
            rows = [[1 + self.delta * (1 if e == t else -1) for e in self.expert_types] for t in self.task_types]
            self._table = torch.tensor([*rows, [1.0] * len(self.expert_types)], device=like.device, dtype=torch.float64)
        return self._table.to(like.dtype)[task]  # -1, no known task, finds the last row
