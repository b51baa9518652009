"""What stands between backward and step: no step from numbers that are not finite, and an orderly end on SIGTERM or
when a data-loader worker dies.

All processes decide together, by one small reduction per step: what one of them sees, none of them steps on.
"""

from __future__ import annotations

import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from moelora.core.errors import MoeloraError
from moelora.model.record import main_process, routed_layers
from moelora.model.routed import collect
from moelora.train.checkpoint import newest_is
from moelora.train.engine import Engine
from moelora.train.processes import any_of, together


class Guard:
    """Watches the steps of one run.

    tasks: names by task id. limit: steps in a row without a finite loss and gradient after which training ends.
    stop: what SIGTERM sets.
    """

    def __init__(self, engine: Engine, model: Any, wrapped: Any, tasks: list[str], limit: int, stop: Stop) -> None:
        self.engine, self.model, self.wrapped, self.tasks, self.limit = engine, model, wrapped, tasks, limit
        self._asked = stop
        self.skipped, self.in_a_row = 0, 0
        self.stop = False
        """Whether all processes know that the run shall end after this step."""
        self._seen: list[tuple[Tensor, dict[str, Any]]] = []

    def saw(self, loss: Tensor, inputs: dict[str, Any]) -> None:
        """A micro-batch of the step under way, and its loss."""
        self._seen.append((loss.detach(), inputs))

    def before_step(self, step: int) -> bool:
        """Whether the step may be taken. Raises MoeloraError when too many in a row may not."""
        numbers = [loss for loss, _ in self._seen] + list(self.engine.held_gradients())
        largest = torch.nn.utils.get_total_norm(numbers, float("inf"))  # one reading of all; the largest tells of each
        bad, self.stop = any_of([not bool(torch.isfinite(largest)), self._asked.asked])
        if bad:
            self._skip(step)
        else:
            self.in_a_row = 0
        self._seen.clear()
        self.engine.skip = bad
        return not bad

    def _skip(self, step: int) -> None:
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        causes = self._causes()
        self.model.moelora.port.load.clear()  # what was counted goes with the step
        if self.engine.deepspeed is not None:  # it would make something of what is not a number
            for parameter in self.engine.parameters.values():
                zeros = torch.zeros(self.engine.shape(parameter), device=parameter.device)
                self.engine.set_gradient(parameter, zeros)
        message = f"step {step} skipped ({self.in_a_row} in a row, at most {self.limit}): {'; '.join(causes)}"
        if self.in_a_row >= self.limit:
            raise MoeloraError(f"training ended: {message}; lower the learning rate, or look at these rows")
        if main_process():
            tqdm.write(message, file=sys.stderr)  # above a progress bar, not through it

    def _causes(self) -> list[str]:
        """What was not finite, in every process."""
        own = []
        rank = f"process {torch.distributed.get_rank()}: " if together() else ""
        for loss, inputs in self._seen:
            layer = self._first_layer(inputs)
            if not torch.isfinite(loss).all() or layer:
                ids = inputs["task_ids"].unique().tolist() if "task_ids" in inputs else []
                tasks = ", ".join(self.tasks[i] for i in ids if 0 <= i < len(self.tasks))
                where = f", first at {layer}" if layer else ", after finite layers"
                own.append(f"{rank}the loss{f' of {tasks}' if tasks else ''} is not finite{where}")
        if not together():
            return own or [self._gradients()]
        found: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, own)
        return [cause for causes in found for cause in causes] or [self._gradients()]

    def _gradients(self) -> str:
        if self.engine.deepspeed is not None:
            return "the loss is finite and its gradient is not"
        bad = [n for n, p in self.engine.parameters.items() if p.grad is not None and not torch.isfinite(p.grad).all()]
        return f"the loss is finite; the gradients of {len(bad)} tensors are not, {bad[0]} among them"

    @torch.no_grad()
    def _first_layer(self, inputs: dict[str, Any]) -> str:
        """The first layer whose output is not finite, by computing it again; all processes take part under ZeRO-3."""
        found: list[str] = []

        def look(layer: Any, _: Any, output: Any) -> None:
            if not found and not torch.isfinite(output).all():
                found.append(layer.site.name)

        hooks = [layer.register_forward_hook(look) for layer in routed_layers(self.model)]
        was = self.model.training
        try:
            with collect(self.model, with_terms=False):
                self.wrapped.eval()
                self.wrapped(**{k: v for k, v in inputs.items() if k != "labels"} | {"use_cache": False})
        finally:
            self.wrapped.train(was)
            for hook in hooks:
                hook.remove()
        return found[0] if found else ""


@dataclass
class Stop:
    """asked: whether this process was told to end the run."""

    asked: bool = False


@contextmanager
def heeding() -> Iterator[Stop]:
    """Inside, SIGTERM only sets what is given back."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():  # Python takes signals nowhere else
        yield stop
        return

    def asked(*_: Any) -> None:
        stop.asked = True

    before = signal.signal(signal.SIGTERM, asked)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def naming_dead_workers(out: Path) -> Iterator[None]:
    """Inside, a data-loader worker that was killed is a MoeloraError with the checkpoint to go on from."""
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        if not _of_dead_worker(error):
            raise
        raise MoeloraError(
            f"a data-loader worker was killed ({str(error).strip()}); with too little memory, set "
            f"training.dataloader_num_workers lower; --resume goes on{newest_is(out)}"
        ) from error


def _of_dead_worker(error: Exception) -> bool:
    """torch says so when it sees the end of the worker first; else a batch breaks off while it is taken over."""
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker (pid")
    return any(frame.name == "_try_get_data" for frame in traceback.extract_tb(error.__traceback__))
