"""What is trained, whatever engine holds it: whole parameters, gradients and optimiser states.

Plain PyTorch and DDP hold them whole; DeepSpeed ZeRO-1 to ZeRO-3 in parts, with a copy in float32 that the optimiser
steps. Every method is called by all processes together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moelora.core.errors import MoeloraError


class Engine:
    """The trained parameters of a model while it is trained.

    model: as adapted. wrapped: as the trainer calls it. optimizer: the trainer's.
    """

    def __init__(self, model: nn.Module, wrapped: Any, optimizer: Any) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.deepspeed = wrapped if hasattr(wrapped, "zero_optimization_stage") else None
        self.stage: int = self.deepspeed.zero_optimization_stage() if self.deepspeed is not None else 0
        if self.deepspeed is not None and not 1 <= self.stage <= 3:
            raise MoeloraError(f"deepspeed: zero_optimization.stage is {self.stage}; expected 1, 2 or 3")
        while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        self.optimizer: torch.optim.Optimizer = optimizer
        """The one that steps, on parameters or on their parts."""
        self._clip_at = 0.0
        self.skip = False
        """Whether the next step leaves everything as it is."""
        self._resting: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []
        self.optimizer.register_step_pre_hook(self._leave_out)
        self.optimizer.register_step_post_hook(self._put_back)

    def _leave_out(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Parameters without a gradient are not stepped: neither moments, nor decay, nor counts. Of the others, what is
        about to change where the gradient is exactly zero is kept: there nothing was learned, as in experts that no
        token used."""
        stepped = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self.skip:
            for held in stepped:
                held.grad = None
        elif stepped:
            resting = torch.stack([(held.grad == 0).any().to(stepped[0].device) for held in stepped]).tolist()
            for held in (held for held, rests in zip(stepped, resting, strict=True) if rests):
                at_rest = held.grad == 0
                kept = {key: value[at_rest] for key, value in optimizer.state[held].items() if _alike(value, held)}
                self._resting.append((held, at_rest, {"": held.detach()[at_rest], **kept}))

    @torch.no_grad()
    def _put_back(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for held, at_rest, kept in self._resting:
            for key, value in {"": held, **optimizer.state[held]}.items():
                if _alike(value, held):
                    value[at_rest] = kept.get(key, 0)  # moments that came with this step start from zero
        self._resting.clear()

    def before_step(self, call: Callable[[], None]) -> None:
        """Call ``call`` before every optimiser step of DeepSpeed, when gradients are summed up and not yet clipped."""
        assert self.deepspeed is not None
        step, engine = self.deepspeed.step, self.deepspeed

        def stepped(*args: Any, **kwargs: Any) -> Any:
            if engine.is_gradient_accumulation_boundary():
                call()
            return step(*args, **kwargs)

        engine.step = stepped

    def clip_first(self) -> None:
        """From now on DeepSpeed clips in ``clip`` and not in its step."""
        if self.deepspeed is not None:
            self._clip_at, self.deepspeed.optimizer.clip_grad = self.deepspeed.optimizer.clip_grad, 0.0

    def clip(self) -> None:
        """Scale all gradients down to the largest norm allowed, where the trainer has not done it already."""
        if not self._clip_at:
            return
        parts = list(self.held_gradients())
        square = torch.stack([part.float().square().sum() for part in parts]).sum()
        torch.distributed.all_reduce(square)
        factor = (self._clip_at / (square.sqrt() / self._loss_scale + 1e-6)).clamp(max=1.0)
        for part in parts:
            part.mul_(factor)

    @property
    def _loss_scale(self) -> float:
        """What DeepSpeed's float16 multiplies the loss by, and so the gradients that it holds until its step."""
        return 1.0 if self.deepspeed is None else float(getattr(self.deepspeed.optimizer, "loss_scale", 1.0))

    def held_gradients(self) -> Iterator[Tensor]:
        """The gradients that this process holds, or their parts."""
        if self.deepspeed is None:
            yield from (p.grad for p in self.parameters.values() if p.grad is not None)
            return
        parts = self.deepspeed.optimizer.averaged_gradients
        yield from (part for group in parts.values() if group is not None for part in group if part is not None)
        yield from (held.grad for held in self._held() if held.grad is not None)  # where they are offloaded

    def gradient(self, parameter: Tensor) -> Tensor:
        """The whole gradient, float32 under DeepSpeed."""
        if self.deepspeed is None:
            assert parameter.grad is not None
            return parameter.grad
        from deepspeed.utils import safe_get_full_grad

        value: Tensor = safe_get_full_grad(parameter)
        return value.view(self.shape(parameter)) / self._loss_scale

    def set_gradient(self, parameter: Tensor, value: Tensor) -> None:
        """Replace the whole gradient."""
        if self.deepspeed is None:
            assert parameter.grad is not None
            parameter.grad.copy_(value)
            return
        from deepspeed.utils import safe_set_full_grad

        safe_set_full_grad(parameter, value * self._loss_scale)

    def set_value(self, parameter: Tensor, value: Tensor) -> None:
        """Replace the whole parameter, as forwards see it and as the optimiser steps it."""
        if self.stage < 3:
            parameter.data.copy_(value)
        else:
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(value)
        if self.deepspeed is not None:
            from deepspeed.utils import safe_set_full_fp32_param

            safe_set_full_fp32_param(parameter, value.to(parameter.device, torch.float32))

    @staticmethod
    def shape(parameter: Tensor) -> torch.Size:
        """The whole parameter's."""
        found: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
        return found

    def states(self) -> dict[str, Tensor]:
        """The optimiser's state of every parameter, whole, as ``parameter/key``; numbers as tensors of no dimension."""
        found: dict[str, Tensor] = {}
        if self.deepspeed is None:
            for name, parameter in self.parameters.items():
                for key, value in self.optimizer.state.get(parameter, {}).items():
                    found[f"{name}/{key}"] = torch.as_tensor(value).detach()
            return found
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link()
        for held, names in self._owners():
            state = self.optimizer.state.get(held, {})
            for name in names:
                for key, value in state.items():
                    if isinstance(value, Tensor) and value.shape == held.shape:
                        full: Tensor = safe_get_full_optimizer_state(self.parameters[name], key)
                        found[f"{name}/{key}"] = full.view(self.shape(self.parameters[name]))
                    else:
                        found[f"{name}/{key}"] = torch.as_tensor(value).detach().clone()  # each has its own in a file
        return found

    def set_states(self, states: dict[str, Tensor]) -> None:
        """Give the optimiser the states that ``states`` once gave, perhaps in another engine."""
        own: dict[str, dict[str, Tensor]] = {}
        for name, value in states.items():
            parameter, _, key = name.rpartition("/")
            own.setdefault(parameter, {})[key] = value
        if self.deepspeed is None:
            params = [p for group in self.optimizer.param_groups for p in group["params"]]
            names = {id(p): name for name, p in self.parameters.items()}
            numbered = {i: own[names[id(p)]] for i, p in enumerate(params) if names.get(id(p)) in own}
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": numbered, "param_groups": groups})
            return
        from deepspeed.utils import safe_set_full_optimizer_state

        for held, of in self._owners():
            for key, value in own.get(of[0], {}).items():
                split = value.shape == self.shape(self.parameters[of[0]])
                self.optimizer.state[held][key] = torch.zeros_like(held) if split else value.clone()
        self._link()
        for name, values in own.items():
            whole_one = self.parameters[name]
            for key, value in values.items():
                if value.shape == self.shape(whole_one):
                    safe_set_full_optimizer_state(whole_one, value.to(whole_one.device), key)

    def _held(self) -> list[Tensor]:
        """The float32 parts that DeepSpeed's optimiser steps."""
        zero = self.deepspeed.optimizer  # type: ignore[union-attr]
        parts: list[Tensor] = (
            zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        )
        return parts

    def _link(self) -> None:
        """Tell parameters where their states are: of several groups, ZeRO-1 and ZeRO-2 do it for the first alone."""
        if self.stage < 3:
            from deepspeed.utils import lazy_init_hp_params_optimizer_state

            zero = self.deepspeed.optimizer  # type: ignore[union-attr]
            for held, group in zip(self._held(), zero.bit16_groups, strict=True):
                lazy_init_hp_params_optimizer_state(group, held, self.optimizer.state)

    def _owners(self) -> Iterator[tuple[Tensor, list[str]]]:
        """Every part with the names of the parameters that lie in it, in some process."""
        zero = self.deepspeed.optimizer  # type: ignore[union-attr]
        names = {id(p): name for name, p in self.parameters.items()}
        groups = zero.fp16_groups if self.stage == 3 else zero.bit16_groups
        for held, group in zip(self._held(), groups, strict=True):
            yield held, [names[id(parameter)] for parameter in group]


def set_rates(optimizer: torch.optim.Optimizer, rates: dict[int, float]) -> None:
    """Give parameters learning rates of their own. rates: by ``id``, what each one's is multiplied by.

    Groups are split, the slowest come first and empty ones go, since DeepSpeed drops these and a schedule counts them.
    """
    split: dict[tuple[float, int], dict[str, Any]] = {}
    for place, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            rate = rates[id(parameter)]
            own = split.setdefault((rate, place), {**group, "params": [], "lr": group["lr"] * rate})
            own["params"].append(parameter)
    optimizer.param_groups[:] = [split[key] for key in sorted(split)]


def _alike(value: Any, held: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == held.shape
