"""Task: the gates of all experts are learned per task; a token's task decides, its content does not.

Paper: Liu et al., "When MOE Meets LLMs: Parameter Efficient Fine-tuning for Multi-task Medical Applications" (MOELoRA),
arXiv 2310.18339 (SIGIR 2024); formulas from the released code. For a token of task j:

    gate: embedding   omega = softmax(V e_j)        e_j row j of embedding, V weight
    gate: table       omega = softmax(table_j)      not in the paper: the gate without its factors
    y = W x + (lora_alpha / r) sum_e omega_e B_e A_e x

Shapes: embedding [num_tasks, task_dim] from N(0, 1) and weight [E, task_dim] without bias, initialised as
torch.nn.Linear; or table [num_tasks, E], zero. One gate per layer, or with shared: true one for the whole model, which
then needs as many experts in every layer. Tokens of no known task (id -1) and padding get 1/E each.
A task's gates are constants, so a layer merges exactly for that task: W + (lora_alpha / r) sum_e omega_e B_e A_e, with
omega = ``gates_of(task)``. In generation too, the caller says the task: ``task_ids``.

Differences from the released code. It has one gate for the whole model: ``shared: true``. Its rank is that of all
experts together, r / E for each, and its scale lora_alpha over that rank: here both are per expert, so lora_alpha is
the paper's divided by E. Its A starts normal with standard deviation 0.01: here ``init`` says. It reserves a row of the
embedding for padding and may average embeddings of several tasks: here a token has one task.

Recipe line: ``router: {name: task, num_tasks: 8, shared: true}``
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from moelora.core.errors import DataError
from moelora.core.route import Route
from moelora.core.tape import Site, View
from moelora.routers.base import Router, reset_linear, tasks_of


class Task(Router):
    """Gates by task. num_tasks: task ids are 0 to num_tasks - 1. gate: an embedding of each task and a linear map, or a
    table of logits. task_dim: width of the embedding. shared: one gate for the whole model.

    Raises DataError for a batch without task ids, and on CPU for an id of num_tasks or more (elsewhere, where the check
    would wait for the device, such a task counts as unknown).
    """

    def __init__(
        self,
        site: Site,
        num_experts: int,
        r: int,
        *,
        num_tasks: Annotated[int, Field(ge=1)] = 8,
        gate: Literal["embedding", "table"] = "embedding",
        task_dim: Annotated[int, Field(ge=1)] = 64,
        shared: bool = False,
    ) -> None:
        super().__init__(site, num_experts, r)
        self.num_tasks, self.gate = num_tasks, gate
        if gate == "table":
            self.table = nn.Parameter(torch.zeros(num_tasks, num_experts))
        else:
            self.embedding = nn.Parameter(torch.randn(num_tasks, task_dim))
            self.weight = nn.Parameter(torch.empty(num_experts, task_dim))
            reset_linear(self.weight)

    @classmethod
    def group(cls, site: Site, options: dict[str, Any]) -> str | None:
        return "model" if options["shared"] else None

    @torch.no_grad()
    def gates_of(self, task: int) -> Tensor:
        """[E] the gates of every token of a task; 1/E for -1. float32, float64 in a float64 model. Raises DataError."""
        if not -1 <= task < self.num_tasks:
            raise DataError(f"routers.task: expected a task id of -1 to {self.num_tasks - 1}, found {task}")
        return self._gates()[task]

    def constant_gates(self, task: int | None) -> Tensor | None:
        return None if task is None else self.gates_of(task)

    def forward(self, x: Tensor, view: View) -> Route:
        task = tasks_of(view, "task")
        if task.device.type == "cpu" and (task >= self.num_tasks).any():
            raise DataError(
                f"routers.task: task id {int(task.max())} at '{view.site.name}', but num_tasks is {self.num_tasks}; "
                "set num_tasks to the number of tasks in the data"
            )
        known = (task >= 0) & (task < self.num_tasks)
        if view.mask is not None:
            known &= view.mask
        gates = self._gates().to(x.device, torch.promote_types(x.dtype, torch.float32))
        return Route(gates[task.where(known, -1)], self.num_experts)

    def _gates(self) -> Tensor:
        """[num_tasks + 1, E] of every task; the last row, which index -1 also finds, of tokens of none."""
        used = self.table if self.gate == "table" else self.weight
        dtype = torch.promote_types(used.dtype, torch.float32)
        logits = used.to(dtype) if self.gate == "table" else self.embedding.to(dtype) @ used.to(dtype).t()
        return torch.cat([logits.softmax(-1), logits.new_full((1, self.num_experts), 1 / self.num_experts)])
