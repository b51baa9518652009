"""Communication, memory and step time of large runs, reckoned: prints the tables of docs/scaling.md.

    PYTHONPATH=. python tests/bench/scaling_model.py

Parameters and memory are those of ``moelora.train`` for models on the meta device; times follow from the assumptions
below. Nothing is measured here, and nothing in it was measured on a GPU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import moelora
from moelora.model.record import routed_layers
from moelora.recipe import deepspeed_options
from moelora.train.activations import kept, loss_buffer
from moelora.train.memory import Held, engine_of, held, standing

NODE: Final = 8
"""GPUs of a node."""
NVLINK: Final = 450e9
INFINIBAND: Final = 50e9
"""Bytes a second, each way, of one GPU: assumed, not measured."""
HOP: Final = 5e-6
"""Seconds from a node to the next: assumed."""
PRODUCTS: Final = 400e12
"""Half-precision operations a second: 40 % of an H100's 989e12, assumed."""
PCIE: Final = 50e9
HOST: Final = 25e9
"""Bytes a second of one GPU to the host's memory, and of its share of that memory to Adam on the CPU: assumed."""
MEMORY: Final = 72e9
"""Bytes of an 80 GB GPU that a run may fill; the rest is for what the plan does not count."""
TOKENS: Final = 8192
"""Of one GPU in one step: two rows of 4096."""

MODELS: Final[dict[str, dict[str, Any]]] = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
EXPERTS: Final = (8, 64, 512, 4096, 10000)
RANK: Final = 8
CHOSEN: Final = 2


@dataclass(frozen=True)
class Load:
    """What a run has to exchange. width, gradient: bytes of a parameter and of a gradient. balance: bytes of counts.

    small: parameters that ZeRO-3 leaves whole; they are taken for frozen. reuse: ZeRO-3's distance of reuse.
    """

    parameters: int
    trained: int
    width: int = 2
    gradient: int = 2
    balance: int = 0
    small: int = 0
    reuse: int = 1_000_000_000


@dataclass(frozen=True)
class Exchange:
    """Bytes handed over per optimiser step, by what is done with them; ``whole``: of all processes' parts together."""

    whole: dict[str, float]

    def sent(self, processes: int) -> float:
        """Bytes that each process sends, by rings."""
        part = (processes - 1) / processes
        return sum(size * part * (2 if kind == "all_reduce" else 1) for kind, size in self.whole.items())


def exchanged(load: Load, stage: int, accumulation: int = 1) -> Exchange:
    """Of Q trained and P parameters, in M micro-batches a step:

        DDP      all-reduce Q g
        ZeRO-1   all-reduce Q g (DeepSpeed's default, in place of a reduce-scatter); all-gather Q b
        ZeRO-2   M all-reduces Q g; all-gather Q b
        ZeRO-3   M all-gathers (2 P - K) b; M reduce-scatters Q g
        all      all-reduce of the counts of a balance rule, 4 bytes per layer and unit

    K: the last parameters of the forward pass, which ZeRO-3 keeps for the backward pass: up to half its distance of
    reuse, for a parameter is used again after all that follow it were passed twice.
    """
    gradients = load.trained * load.gradient
    if stage == 3:
        shared = load.parameters - load.small
        gathered = 2 * shared - min(shared, load.reuse // 2)
        whole = {"all_gather": float(accumulation * gathered * load.width)}
        whole |= {"reduce_scatter": float(accumulation * gradients), "all_reduce": float(load.balance)}
        return Exchange(whole)
    whole = {"all_reduce": float((accumulation if stage == 2 else 1) * gradients + load.balance)}
    return Exchange(whole | ({"all_gather": float(load.trained * load.width)} if stage else {}))


@dataclass(frozen=True)
class Model:
    """What is reckoned of one model with so many experts. products: of one GPU in one step of TOKENS tokens."""

    tensors: list[Held]
    width: int
    activations: int
    loss: int
    products: float
    units: int
    modules: int

    @property
    def trained(self) -> int:
        return sum(one.numel for one in self.tensors if one.trains)

    @property
    def parameters(self) -> int:
        return sum(one.numel for one in self.tensors if not one.buffer)


@functools.cache
def model_of(name: str, experts: int) -> Model:
    """Llama-3's shape, with MeteoRA's gate on every linear layer; two rows of 4096 tokens, gradient checkpointing."""
    shape = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 8192, **MODELS[name]}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape)).to(torch.bfloat16)
    base = sum(p.numel() for p in model.parameters())
    adapter = {"experts": {"num_experts": experts, "r": RANK}, "router": {"name": "meteora", "top_k": CHOSEN}}
    moelora.adapt(model, adapter, verbose=False)
    tensors, width = held(model), shape["hidden_size"]
    layers = routed_layers(model)
    scores = sum(one.numel for one in tensors if one.part == "router" and not one.buffer)
    ranks = sum(max(16, RANK) * CHOSEN * (layer.in_features + layer.out_features) for layer in layers)
    attention = 8 * TOKENS // 2 * width * shape["num_hidden_layers"]
    products = TOKENS * (6.0 * (base - shape["vocab_size"] * width) + attention + 8 * scores + 8 * ranks)
    most = kept(model, TOKENS, TOKENS // 2, half=True, machine="cuda")
    assert not isinstance(most, str)
    modules = len({one.owner for one in tensors if not one.buffer and one.numel > 10 * width})
    loss = loss_buffer(model, TOKENS, half=True)
    return Model(tensors, width, most.most(True), loss, products, experts * len(layers), modules)


def memory(model: Model, stage: int, processes: int, offload: bool = False) -> tuple[int, int]:
    """Bytes of one GPU, and of the host for it."""
    options = deepspeed_options(f"zero{stage}")
    if offload:
        options["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    engine = engine_of(options, processes, True, model.width, "adamw")
    assert engine is not None
    parts = standing(model.tensors, engine)
    return sum(part.gpu for part in parts) + model.activations + model.loss, sum(part.host for part in parts)


@dataclass(frozen=True)
class Step:
    """One step of one micro-batch: bytes that a GPU sends, of what; seconds on the links; seconds of going round."""

    gradients: float
    base: float
    sent: float
    took: float
    waited: float


def step_of(model: Model, stage: int, processes: int) -> Step:
    """Rings within a node; between nodes all its cards share the bytes, and a message goes round node after node."""
    small = sum(o.numel for o in model.tensors if not o.buffer and o.numel <= 10 * model.width and not o.trains)
    load = Load(model.parameters, model.trained, 2, 2, 4 * model.units, small)
    nodes = -(-processes // NODE)
    speed = NVLINK if nodes == 1 else NODE * INFINIBAND
    buckets = math.ceil(model.trained / model.width**2)
    hops = 2 * buckets * math.ceil(math.log2(nodes)) + nodes - 1  # all-reduce by trees
    if stage == 3:
        hops = (2 * model.modules + buckets) * (nodes - 1)
    sent = exchanged(load, stage).sent(processes)
    frozen = replace(load, parameters=model.parameters - model.trained, trained=0, balance=0)
    times = 1 if stage == 3 else 2
    gradients = times * 2 * model.trained * (processes - 1) / processes
    return Step(gradients, exchanged(frozen, stage).sent(processes), sent, sent / speed, hops * HOP)


def offloaded(model: Model, processes: int) -> float:
    """Seconds of the optimiser step on the host: gradients down, values up, and Adam over 28 bytes per number."""
    own = model.trained / processes
    return own * 4 / PCIE + own * 28 / HOST


def most_experts(name: str, stage: int, processes: int, offload: bool) -> int:
    """How many fit, by a straight line through two points; 0 where not even eight do,
    10,001 where all do."""
    if memory(model_of(name, 8), stage, processes, offload)[0] > MEMORY:
        return 0
    few, many = 64, 512
    low, high = (memory(model_of(name, experts), stage, processes, offload)[0] for experts in (few, many))
    return min(EXPERTS[-1] + 1, int(few + (MEMORY - low) * (many - few) / (high - low)))


def said(size: float) -> str:
    """Bytes, or a count, in three figures."""
    for unit in ("", "k", "M", "G", "T"):
        if size < 999.5 or unit == "T":
            return f"{size:.3g} {unit}".rstrip() if size < 1000 else f"{size:.0f} {unit}"
        size /= 1000
    raise AssertionError


COUNTS: Final = ("model", "experts")
SIZES: Final = ("trained", "in half precision", "optimiser", "checkpoint", "balance counts", "compute, s")
TRAFFIC: Final = (
    *("GPUs", "compute, s", "gradients, ZeRO-2", "ZeRO-2 in all", "s"),
    *("gradients, ZeRO-3", "base, ZeRO-3", "ZeRO-3 in all", "s", "waits, s"),
)
GPUS: Final = (8, 64, 1024)
FITS: Final = ((1, False), (2, False), (2, True), (3, False), (3, True))


def sizes(name: str, experts: int) -> list[str]:
    model = model_of(name, experts)
    found = (2 * model.trained, 12 * model.trained, 12 * model.trained, 4 * model.units)
    seconds = f"{model.products / PRODUCTS:.2f}"
    return [name, f"{experts:,}", said(model.trained), *(f"{said(size)}B" for size in found), seconds]


def traffic(name: str, experts: int, processes: int) -> list[str]:
    model = model_of(name, experts)
    two, three = (step_of(model, stage, processes) for stage in (2, 3))
    cells = [f"{said(two.gradients)}B", f"{said(two.sent)}B", f"{two.took:.2g}", f"{said(three.gradients)}B"]
    cells += [f"{said(three.base)}B", f"{said(three.sent)}B", f"{three.took:.2g}", f"{three.waited:.2g}"]
    return [name, f"{experts:,}", str(processes), f"{model.products / PRODUCTS:.2f}", *cells]


def memories(name: str, experts: int) -> list[str]:
    found = [memory(model_of(name, experts), stage, n)[0] for stage in (1, 2, 3) for n in GPUS]
    return [name, f"{experts:,}", *(f"{size / 1e9:.0f}{' x' if size > MEMORY else ''}" for size in found)]


def limits(name: str, processes: int) -> list[str]:
    found = [most_experts(name, stage, processes, offload) for stage, offload in FITS]
    cells = ["all" if most > EXPERTS[-1] else f"{most:,}" if most else "none" for most in found]
    return [name, str(processes), *cells]


def offloading(name: str, experts: int) -> list[str]:
    model = model_of(name, experts)
    host = f"{said(8 * memory(model, 2, 8, True)[1])}B"
    return [name, f"{experts:,}", *(f"{offloaded(model, n):.3g}" for n in GPUS), host]


def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    for cells in (columns, ["---"] * len(columns), *rows):
        print(line(cells))
    print()


def main() -> None:
    cases = [(name, experts) for name in MODELS for experts in EXPERTS]
    stages = [f"ZeRO-{stage}, {n}" for stage in (1, 2, 3) for n in GPUS]
    fits = [f"ZeRO-{stage}{', optimiser offloaded' if offload else ''}" for stage, offload in FITS]
    table([*COUNTS, *SIZES], (sizes(*case) for case in cases))
    table([*COUNTS, *TRAFFIC], (traffic(*case, n) for case in cases for n in GPUS))
    table([*COUNTS, *stages], (memories(*case) for case in cases))
    table(["model", "GPUs", *fits], (limits(name, n) for name in MODELS for n in (8, 64, 256, 1024)))
    table([*COUNTS, *(f"step of {n}, s" for n in GPUS), "host memory of a node"], (offloading(*case) for case in cases))


if __name__ == "__main__":
    main()
