"""DurableTrainer: TRL's SFTTrainer that loses nothing, on one process or many, on plain PyTorch, DDP or DeepSpeed.

What it adds: checkpoints that are there whole or not at all and that any engine and number of processes resumes; no
step from numbers that are not finite; an orderly end on SIGTERM; a place between backward and step.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import ExportableState
from trl import SFTTrainer

from moelora.core.step import Now
from moelora.model.partition import wholes
from moelora.model.routed import RoutedModel, after_step
from moelora.model.save import restore
from moelora.model.write import adapter_tensors, write
from moelora.optim.base import Optim
from moelora.train.checkpoint import (
    OPTIMIZER,
    PAIRS,
    Training,
    checkpoint_folder,
    random_states,
    read_tensors,
    read_training,
    rotate,
    set_random_state,
    write_checkpoint,
)
from moelora.train.engine import Engine, set_rates
from moelora.train.guard import Guard, Stop, heeding, naming_dead_workers
from moelora.train.processes import agreed
from moelora.train.stepping import Stepping


class _AroundStep(TrainerCallback):
    """What has to happen around an optimiser step."""

    def __init__(self, trainer: DurableTrainer) -> None:
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.begin_step()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.trainer.is_deepspeed_enabled:  # which has stepped already
            self.trainer.before_step()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if isinstance(model, RoutedModel):  # under DeepSpeed, whose optimiser does not hold the model's parameters
            after_step(model)
        self.trainer.after_step()
        if self.trainer.guard is not None and self.trainer.guard.stop:
            control.should_save = control.should_training_stop = True


class DurableTrainer(SFTTrainer):
    """See the module.

    tasks: names by task id, for messages. max_skipped_steps: see ``Recipe``. optim: what takes part
    in steps beside the optimiser.
    """

    model: Any
    optimizer: Any
    lr_scheduler: Any
    tasks: list[str]
    max_skipped_steps: int
    optim: Optim | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.engine: Engine | None = None
        self.guard: Guard | None = None
        self.stepping: Stepping | None = None
        self.now = Now(0, 0, 0.0)
        self.stop = Stop()
        super().__init__(*args, **kwargs)
        self.add_callback(_AroundStep(self))

    @property
    def out(self) -> Path:
        """Where the run writes."""
        return Path(str(self.args.output_dir))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, with the learning rates that the method gives."""
        rates = {id(p): self.optim.rate(name) for name, p in self.model.named_parameters()} if self.optim else {}
        anew = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if anew and set(rates.values()) - {1.0}:
            set_rates(optimizer, rates)
        return optimizer

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """transformers' own, without what allocators of ranks train: gates decay by their own rule."""
        return [name for name in super().get_decay_parameter_names(model) if ".allocator." not in name]

    def train_guarded(self, checkpoint: str | None) -> None:
        """``train``; after SIGTERM it ends with the step under way, a checkpoint, and SystemExit 143."""
        with heeding() as stop, naming_dead_workers(self.out):
            self.stop = stop
            self.train(resume_from_checkpoint=checkpoint)
        if self.guard is not None and self.guard.stop:
            if self.is_world_process_zero():
                folder = checkpoint_folder(self.out, self.state.global_step)
                print(f"ended by SIGTERM; {folder} is complete, and --resume goes on from it", file=sys.stderr)
            raise SystemExit(128 + signal.SIGTERM)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        """transformers looks whether it is done after a step, so a run killed after its last one would take another."""
        if self.state.global_step < self.state.max_steps:
            return super()._run_epoch(*args, **kwargs)
        self.control.should_training_stop = True

    def begin_step(self) -> None:
        """Before the first micro-batch of a step."""
        assert self.stepping is not None
        rate, decay = float(self.lr_scheduler.get_last_lr()[0]), float(self.args.weight_decay)
        self.now = Now(self.state.global_step, self.state.max_steps, rate, decay)
        self.stepping.begin(self.now)

    def before_step(self) -> None:
        """Between backward and step, when gradients are summed up over micro-batches and processes."""
        assert self.guard is not None and self.stepping is not None
        taken = False
        try:
            taken = self.guard.before_step(self.state.global_step + 1)
        finally:  # also when too many were skipped: what was done to weights for this step is undone
            (self.stepping.before if taken else self.stepping.skip)(self.now)

    def after_step(self) -> None:
        """After a step, unless it was skipped."""
        assert self.engine is not None and self.stepping is not None
        if not self.engine.skip:
            self.stepping.after(self.now)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """transformers' preparation of engine, optimiser and schedule; then what a checkpoint holds of them."""
        folder = None if resume_from_checkpoint is None else Path(resume_from_checkpoint)
        values = {}
        if folder is not None:
            restore(self.model, folder)  # before an engine takes the parameters apart
            values = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self.engine = Engine(self.model, self.model_wrapped, self.optimizer)
        self.guard = Guard(self.engine, self.model, self.model_wrapped, self.tasks, self.max_skipped_steps, self.stop)
        self.stepping = Stepping(self.model, self.engine, self.optim)
        if self.engine.deepspeed is not None:
            self.engine.before_step(self.before_step)
        if folder is not None:
            for name, parameter in self.engine.parameters.items():
                self.engine.set_value(parameter, values[name])
            self.engine.set_states(read_tensors(folder, OPTIMIZER))
            self.stepping.set_tensors(read_tensors(folder, PAIRS))
            training = read_training(folder)
            there, here = training.global_batch, self._global_batch()
            if there != here and self.is_world_process_zero():
                order = "rows will be seen in another order (per device x accumulated x processes is a step's rows)"
                print(f"{folder}: {there} rows to a step there, {here} here: {order}", file=sys.stderr)
            self._resume_schedule(training.scheduler)
            self.state.compute_steps(self.args, max_steps)  # save, evaluate and log as often as is asked for now
        return prepared

    def _global_batch(self) -> int:
        rows: int = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return rows

    def _resume_schedule(self, saved: dict[str, Any]) -> None:
        """Engines differ in whether they keep empty groups of parameters, so what is per group goes by the rate that
        the group began with; by position where that was changed."""
        numbers = {key: value for key, value in saved.items() if not isinstance(value, list)}
        self.lr_scheduler.load_state_dict({**self.lr_scheduler.state_dict(), **numbers})
        rates = saved["_last_lr"]
        begun = dict(zip(saved.get("base_lrs", []), rates, strict=False))
        for place, group in enumerate(self.optimizer.param_groups):
            group["lr"] = begun.get(group.get("initial_lr"), rates[min(place, len(rates) - 1)])
        self.lr_scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """It is read in ``_prepare_for_training``, by every engine in the same way."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Of the same number of processes; of another, each goes on from the seed and the step."""
        if checkpoint is None:
            return
        training, rank, world = read_training(Path(checkpoint)), self.args.process_index, self.args.world_size
        if len(training.random) == world:
            set_random_state(training.random[rank])
        else:
            set_seed(self.args.seed + training.step * world + rank)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A checkpoint that is there whole or not at all; see ``moelora.train.checkpoint``."""
        assert self.engine is not None
        step, main = self.state.global_step, self.is_world_process_zero()
        best = self.state.best_global_step
        if best and (best == step or checkpoint_folder(self.out, best).is_dir()):
            self.state.best_model_checkpoint = str(checkpoint_folder(self.out, best))
        exportable: list[Any] = [*self.callback_handler.callbacks, self.control]
        callbacks: Any = self.state.stateful_callbacks
        callbacks.update({type(c).__name__: c.state() for c in exportable if isinstance(c, ExportableState)})
        adapter = wholes(adapter_tensors(self.model), keep=main)
        states = {name: value.cpu() for name, value in self.engine.states().items() if main}
        assert self.stepping is not None
        pairs = self.stepping.tensors()
        training = Training(step, self._global_batch(), self.lr_scheduler.state_dict(), random_states())

        def write_all() -> None:
            state = json.dumps(dataclasses.asdict(self.state), indent=2, sort_keys=True) + "\n"
            write_checkpoint(self.out, self.model, adapter, states, pairs, training, state)
            rotate(self.out, self.args.save_total_limit, self.state.best_model_checkpoint)

        agreed(write_all)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapter, and the tokenizer beside it. Called by all processes together."""
        out = self.out if output_dir is None else Path(output_dir)
        write(self.model, out)
        tokenizer: Any = self.processing_class
        if self.is_world_process_zero() and tokenizer is not None:
            tokenizer.save_pretrained(out)

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint is not None:
            restore(self.accelerator.unwrap_model(self.model), self.state.best_model_checkpoint)
