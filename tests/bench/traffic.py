"""Bytes that processes exchange in one optimiser step, counted, against what docs/scaling.md says of them.

    PYTHONPATH=. python tests/bench/traffic.py --out docs/bench/traffic.json        (ten minutes on two cores)

Trains the tiny model for a few steps with gloo on the CPU: DDP and ZeRO-1, 2, 3, with 2 and 4 processes. Counted are
the tensors that are handed to torch.distributed in the last step, whatever an algorithm then does with them; DDP's
buckets come through a communication hook that hands them over. Beside them, what each process holds after the step.
Bytes, not seconds: a CPU says nothing of a GPU's links.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moelora.recipe import check_recipe, deepspeed_options
from tests.bench.scaling_model import Load, exchanged

RECIPE = {
    "adapter": {
        "experts": {"num_experts": 8, "r": 8},
        "router": {"name": "smora", "top_k": 8},
        "target_modules": "all-linear",
    },
    "data": {"tasks": {"reverse": {"path": "builtin/reverse", "max_rows": 400, "max_eval_rows": 1}}},
}
STEPS, MEANT = 4, 1024
"""Optimiser steps, of which the last is counted. Bytes from which on a message is no mere number or two."""

FORGETFUL = "ZeRO-3, nothing kept"
ENGINES = ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", FORGETFUL)

KINDS = {
    **dict.fromkeys(("all_reduce", "all_reduce_coalesced"), "all_reduce"),
    **dict.fromkeys(("reduce",), "reduce"),
    **dict.fromkeys(("all_gather", "all_gather_into_tensor", "_all_gather_base"), "all_gather"),
    **dict.fromkeys(("reduce_scatter", "reduce_scatter_tensor", "_reduce_scatter_base"), "reduce_scatter"),
    **dict.fromkeys(("broadcast", "gather", "scatter", "all_to_all_single"), "other"),
}
"""Functions of torch.distributed, by what they do."""


def size_of(kind: str, given: tuple[Any, ...], named: dict[str, Any]) -> int:
    """Bytes of a whole: of what is summed, of what all shards make together."""
    values = [*given, *named.values()]
    tensors = [value for value in values if isinstance(value, Tensor)]
    lists = [value for value in values if isinstance(value, list) and value and isinstance(value[0], Tensor)]
    sizes = [t.numel() * t.itemsize for t in tensors] + [sum(t.numel() * t.itemsize for t in some) for some in lists]
    return max(sizes, default=0)


class Counted:
    """What was handed over, since the last ``clear``: bytes by kind; small messages apart."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self.small = self.depth = 0

    def clear(self) -> None:
        self.bytes.clear()
        self.small = 0

    def wrap(self, name: str) -> None:
        own: Callable[..., Any] | None = getattr(dist, name, None)
        if own is None:
            return

        @functools.wraps(own)
        def call(*given: Any, **named: Any) -> Any:
            size = size_of(KINDS[name], given, named)
            if self.depth == 0:  # one may call another
                if size < MEANT:
                    self.small += 1
                else:
                    self.bytes[KINDS[name]] += size
            self.depth += 1
            try:
                return own(*given, **named)
            finally:
                self.depth -= 1

        setattr(dist, name, call)


def worker(engine: str, accumulation: int, folder: Path) -> None:
    """One process of a run."""
    counted = Counted()
    for name in KINDS:  # before anything that remembers them is imported
        counted.wrap(name)
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.nn.parallel import DistributedDataParallel
    from transformers import TrainerCallback

    from moelora.model.adapt import parameter_counts
    from moelora.train import run

    started = DistributedDataParallel.__init__

    def start(self: Any, *given: Any, **named: Any) -> None:
        started(self, *given, **named)

        self.register_comm_hook(None, allreduce_hook)

    DistributedDataParallel.__init__ = start  # type: ignore[method-assign]
    found: dict[str, Any] = {}

    class Watch(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            counted.clear()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == STEPS:
                found.update(bytes=dict(counted.bytes), small=counted.small)

    build = run.build_trainer

    def built(*given: Any) -> Any:
        trainer = build(*given)
        trainer.add_callback(Watch())
        made.append(trainer)
        return trainer

    made: list[Any] = []
    run.build_trainer = built
    training = {
        "output_dir": str(folder / "run"), "max_steps": STEPS, "per_device_train_batch_size": 2, "use_cpu": True,
        "gradient_accumulation_steps": accumulation, "eval_strategy": "no", "save_strategy": "no",
        "report_to": "none", "logging_steps": 1000, "disable_tqdm": True, "max_length": 64,
        "gradient_checkpointing": False,
    }  # fmt: skip
    content = {**RECIPE, "training": training, **({} if engine == "DDP" else {"deepspeed": configured(engine, folder)})}
    result = run.train(check_recipe(content))
    found["trained"], found["parameters"] = parameter_counts(result.model)
    found["held"] = held_by(made[0])
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))


def configured(engine: str, folder: Path) -> str:
    """A DeepSpeed configuration of the recipes, or one under which ZeRO-3 keeps nothing whole for later."""
    if engine != FORGETFUL:
        return engine.replace("ZeRO-", "zero")
    options = deepspeed_options("zero3")
    options["zero_optimization"].update(stage3_max_reuse_distance=0, stage3_max_live_parameters=0)
    path = folder / "zero3.json"
    path.write_text(json.dumps(options))
    return str(path)


def held_by(trainer: Any) -> dict[str, int]:
    """Bytes that this process holds: parameters, moments, float32 copies."""

    def size(tensors: Any) -> int:
        return sum(t.numel() * t.itemsize for t in tensors)

    optimizer = trainer.engine.optimizer
    states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor) and v.dim()]
    found = {"optimiser states": size(states)}
    parameters = list(trainer.model.parameters())
    found["parameters"] = size(getattr(p, "ds_tensor", p) for p in parameters)
    if trainer.engine.stage in (1, 2):
        found["float32 copies"] = size(trainer.engine.deepspeed.optimizer.single_partition_of_fp32_groups)
    return found


def expected(found: dict[str, Any], engine: str, accumulation: int) -> dict[str, float]:
    """What the model says of the same run, in float32: 28 sites with 64 units each, 9 norms of 160."""
    reuse = 0 if engine == FORGETFUL else 10**9
    load = Load(found["parameters"], found["trained"], 4, 4, 4 * 28 * 64, 9 * 160, reuse)
    return exchanged(load, 0 if engine == "DDP" else int(engine[5]), accumulation).whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    parser.add_argument("--accumulation", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(given.worker[0], int(given.worker[1]), Path(given.worker[2]))
        return
    rows = []
    for processes in given.processes:
        for engine in given.engines:
            for accumulation in given.accumulation:
                with tempfile.TemporaryDirectory() as folder:
                    launch = ["torch.distributed.run", f"--nproc-per-node={processes}", "--rdzv-backend=c10d"]
                    own = [__file__, "--worker", engine, str(accumulation), folder]
                    command = [sys.executable, "-m", *launch, "--rdzv-endpoint=localhost:0", *own]
                    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
                    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
                    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
                    if done.returncode:
                        sys.exit(done.stdout[-2000:] + done.stderr[-4000:])
                    found = json.loads((Path(folder) / "found.json").read_text())
                wanted = expected(found, engine, accumulation)
                row = {"processes": processes, "engine": engine, "accumulation": accumulation, **found, "model": wanted}
                rows.append(row)
                print(f"{processes} processes, {engine}, {accumulation} micro-batches: {found['small']} small messages")
                for kind in sorted({*found["bytes"], *wanted}):
                    counted, said = found["bytes"].get(kind, 0), wanted.get(kind, 0)
                    print(f"   {kind:15} {counted:>12,} bytes   model {said:>14,.0f}", flush=True)
                print(f"   holds {found['held']}", flush=True)
    if given.out is not None:
        given.out.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
