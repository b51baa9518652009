"""What an engine holds through the whole of a training step, per process, and what of it ZeRO divides. In bytes.

Reckoned from the sizes of parameters, so a model may lie on the meta device.

Precision. Plain PyTorch and DDP with bf16 are autocast: every parameter keeps its dtype, products are in half
precision. DeepSpeed with bf16 casts all parameters to half precision, and its optimiser keeps float32 copies of the
trained ones. Buffers keep their dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from moelora.model.quantised import constants, size_of
from moelora.model.record import routed_layers
from moelora.model.saved import saved_modules


@dataclass(frozen=True)
class Held:
    """A parameter or buffer. part: base, experts, router or modules_to_save. owner: the module that has it. packed: how
    many numbers one of its own stands for."""

    part: str
    numel: int
    itemsize: int
    owner: int
    trains: bool = False
    buffer: bool = False
    packed: int = 1

    @property
    def numbers(self) -> int:
        """How many numbers it keeps."""
        return self.numel * self.packed


@dataclass(frozen=True)
class Engine:
    """What a run is trained by.

    stage: of ZeRO; 0 is plain PyTorch, and DDP where processes are several. half: training in half precision. offload:
    whether the optimiser, and the parameters, lie in the host's memory (ZeRO-2 and 3; 3). states: numbers that the
    optimiser keeps per trained one, each of state_size bytes, None: of the parameter's. bucket: elements that ZeRO
    reduces together, and how many such buffers it has. live: elements that ZeRO-3 may hold whole. threshold: elements
    up to which it leaves a parameter whole.
    """

    stage: int = 0
    processes: int = 1
    half: bool = False
    offload: tuple[bool, bool] = (False, False)
    states: int = 2
    state_size: int | None = None
    bucket: tuple[int, int] = (0, 0)
    live: int = 0
    threshold: int = 0


@dataclass(frozen=True)
class Part:
    """Bytes of one part of a process's memory: on its GPU and in the host's memory."""

    part: str
    gpu: int
    host: int
    dtype: str
    how: str


def held(model: nn.Module) -> list[Held]:
    """Every parameter and buffer of an adapted model, each once."""
    of: dict[int, str] = {}
    own: list[tuple[str, nn.Module]] = [("modules_to_save", module) for module in saved_modules(model).values()]
    for layer in routed_layers(model):
        own += [("experts", layer.experts), ("router", layer.router)]
    for part, module in own:
        of.update({id(tensor): part for tensor in (*module.parameters(), *module.buffers())})
    found: dict[int, Held] = {}
    for owner, module in enumerate(model.modules()):
        for p in module.parameters(recurse=False):
            packed = size_of(p) // max(1, p.numel())
            one = Held(of.get(id(p), "base"), p.numel(), p.itemsize, owner, p.requires_grad, packed=packed)
            found.setdefault(id(p), one)
        for b in (*module.buffers(recurse=False), *constants(module)):
            found.setdefault(id(b), Held(of.get(id(b), "base"), b.numel(), b.itemsize, owner, buffer=True))
    return list(found.values())


def engine_of(
    options: Mapping[str, Any] | None, processes: int, half: bool, hidden_size: int | None, optimizer: str
) -> Engine | None:
    """The engine of a DeepSpeed configuration (None: plain); ``"auto"`` as transformers fills it in. None for an
    optimiser whose states are not known here."""
    states, size = 2, None
    if "8bit" in optimizer:
        size = 1
    elif optimizer == "sgd":
        states = 0
    elif not optimizer.removeprefix("paged_").startswith("adam"):
        return None
    if options is None:
        return Engine(0, processes, half, states=states, state_size=size)
    zero = options.get("zero_optimization", {})
    stage, width = int(zero.get("stage", 0)), hidden_size or 0

    def filled(key: str, auto: int, default: int) -> int:
        value = zero.get(key, default)
        return auto if value == "auto" else int(value)

    offload = tuple(zero.get(f"offload_{what}", {}).get("device", "none") != "none" for what in ("optimizer", "param"))
    buffers = 0
    if zero.get("contiguous_gradients", True):
        buffers = 2 if stage < 3 and zero.get("overlap_comm", False) else 1
    return Engine(
        stage,
        processes,
        any(options.get(kind, {}).get("enabled") in (True, "auto" if half else True) for kind in ("bf16", "fp16")),
        (offload[0], offload[1] and stage == 3),
        states,
        4 if size is None else size,
        (filled("reduce_bucket_size", width * width, 500_000_000), buffers),
        filled("stage3_max_live_parameters", 0, 1_000_000_000) if stage == 3 else 0,
        filled("stage3_param_persistence_threshold", 10 * width, 100_000) if stage == 3 else 0,
    )


def standing(tensors: Iterable[Held], engine: Engine) -> list[Part]:
    """What lies in memory through the whole of a step.

    With N processes, P parameters and Q trained numbers of b bytes (b = 2 where DeepSpeed trains in half precision):

        parameters     P b;                   ZeRO-3: P b / N, but for those it leaves whole
        gradients      Q b;                   ZeRO-2 and 3: Q b / N, and those of one module whole;
                                              DDP: twice, for its buckets
        optimiser      states * Q * size;     ZeRO: / N
        float32 copy   ZeRO: 4 Q / N, unless ZeRO-3 trains in float32 anyway
        buckets        ZeRO: buffers * elements * b
        gathered       ZeRO-3: b times the elements that may live whole at once, or those of its largest module

    Divided numbers are rounded up per tensor. Exact but for what the last three may leave unused.
    """
    n, stage, deepspeed = engine.processes, engine.stage, engine.stage > 0
    tensors = list(tensors)

    def width(one: Held) -> int:
        return 2 if deepspeed and engine.half and not one.buffer and one.itemsize > 1 else one.itemsize

    def share(one: Held, stages: int) -> int:
        return -(-one.numel // n) if stage >= stages else one.numel

    names = dict.fromkeys(one.part for one in tensors)
    parts = []
    for name in names:
        gpu = host = 0
        for one in (one for one in tensors if one.part == name):
            size = share(one, 4 if one.buffer else 3) * width(one)
            whole = stage == 3 and not one.buffer and one.numel <= engine.threshold
            host += size if engine.offload[1] and not one.buffer else 0
            gpu += (0 if engine.offload[1] and not one.buffer else size) + (one.numel * width(one) if whole else 0)
        own = {width(one) / one.packed for one in tensors if one.part == name and not one.buffer}
        parts.append(Part(name, gpu, host, _dtypes(own), "divided" if stage == 3 else "whole"))
    trained = [one for one in tensors if one.trains]
    kinds = {width(one) for one in trained}
    gradients = sum(share(one, 2) * width(one) for one in trained)
    how = "divided" if stage >= 2 else "whole"
    if not deepspeed and n > 1:
        gradients, how = 2 * gradients, "whole, and once more in DDP's buckets"
    aside = engine.offload[0] and stage >= 2
    parts.append(Part("gradients", *_placed(gradients, aside), _dtypes(kinds), how))
    if stage >= 2:
        size = max((sum(one.numel * width(one) for one in own) for own in _by_owner(trained)), default=0)
        parts.append(Part("gradient in the making", size, 0, _dtypes(kinds), "of one module, not divided yet"))
    how = f"{engine.states} per trained number" + (", divided" if deepspeed else "")
    states = sum(engine.states * share(one, 1) * (engine.state_size or one.itemsize) for one in trained)
    sizes = {engine.state_size or one.itemsize for one in trained}
    parts.append(Part("optimiser states", *_placed(states, engine.offload[0]), _dtypes(sizes), how))
    if deepspeed:
        copied = stage < 3 or engine.offload[0]
        copies = sum(4 * share(one, 1) for one in trained if copied or width(one) < 4)
        how = "of what is trained, divided"
        parts.append(Part("float32 copies", *_placed(copies, engine.offload[0]), "float32", how))
        size = sum(engine.bucket[0] * engine.bucket[1] * width for width in kinds)
        parts.append(Part("reduce buckets", size, 0, _dtypes(kinds), f"{engine.bucket[1]} of {engine.bucket[0]:,}"))
    if stage == 3:
        parts.append(
            _gathered([one for one in tensors if not one.buffer and one.numel > engine.threshold], engine, width)
        )
    return parts


def _by_owner(tensors: Sequence[Held]) -> list[list[Held]]:
    owners: dict[int, list[Held]] = {}
    for one in tensors:
        owners.setdefault(one.owner, []).append(one)
    return list(owners.values())


def _gathered(partitioned: Sequence[Held], engine: Engine, width: Callable[[Held], int]) -> Part:
    there = sum(one.numel for one in partitioned)
    largest = max((sum(one.numel for one in own) for own in _by_owner(partitioned)), default=0)
    most = min(there, max(engine.live, largest))
    size = math.ceil(sum(one.numel * width(one) for one in partitioned) * most / max(1, there))
    return Part("gathered parameters", size, 0, _dtypes(map(width, partitioned)), f"up to {most:,} at a time")


def _placed(size: int, aside: bool) -> tuple[int, int]:
    return (0, size) if aside else (size, 0)


def _dtypes(sizes: Iterable[float]) -> str:
    known = {0.5: "4 bit", 1: "8 bit", 2: "half", 4: "float32", 8: "float64"}
    return ", ".join(known[size] for size in sorted(set(sizes))) or "none"
