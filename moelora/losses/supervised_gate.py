"""MeteoRA's supervised gate loss: every gate learns to name the task of the text it reads.

    L = mean over tokens t of -log softmax(logits_t)[task_{t+1}]

Source: the released code of MeteoRA (arXiv 2405.13053): cross-entropy of each projection's gate logits against the
sample's task id, the position shifted by one as in language modelling, padding ignored, averaged over projections; its
weight there is 50, with frozen adapters.

Expert i stands for task i. Over valid tokens whose next token is valid too: where several sequences share a row, the
last token of each is left out, as it is in an unpacked batch. Tokens without a task (id -1) are ignored.
``tokens: answers`` counts the tokens that predict an answer's token, the last one included.

Recipe line: ``losses: {supervised_gate: 0.1}``
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moelora.core.errors import DataError
from moelora.core.route import Route
from moelora.core.tape import View
from moelora.losses.base import Loss


class SupervisedGate(Loss):
    """Cross-entropy of the gate against task ids."""

    needs = ("logits",)
    of_tokens = "followed"
    expert_per_task = True

    def __call__(self, route: Route, view: View) -> Tensor:
        assert route.logits is not None
        task = view.tasks("losses.supervised_gate needs the task of every sequence")
        target = self._shifted(task, view)
        if target.device.type == "cpu" and (target >= route.units).any():  # on a GPU this would wait for the device
            raise DataError(
                f"losses.supervised_gate: task id {int(target.max())} at {view.site.name}, but the router has "
                f"{route.units} units; give the adapter at least as many experts as there are tasks"
            )
        total = F.cross_entropy(route.logits, target, ignore_index=-1, reduction="sum")
        return total / (target >= 0).sum().clamp(min=1)

    def _shifted(self, task: Tensor, view: View) -> Tensor:
        """[T] task of the next token, -1 where there is none, or it is padding or starts another sequence."""
        valid = task if view.mask is None else task.masked_fill(~view.mask, -1)
        if len(view.shape) != 2:
            return valid
        # A token that predicts an answer's token has a real one after it, which need not predict another.
        predicts = self.tokens == "answers" and view.answers is not None
        rows = (task if predicts else valid).view(view.shape)
        last = torch.full_like(rows[:, :1], -1)
        following = torch.cat([rows[:, 1:], last], dim=1)
        positions = view.tape.positions
        if positions is not None and positions.shape == view.shape:
            starts = torch.cat([positions[:, 1:] == 0, last.bool()], dim=1)
            following = following.masked_fill(starts, -1)
        if view.mask is not None:
            following = following.masked_fill(~view.mask.view(view.shape), -1)
        return following.reshape(-1)
