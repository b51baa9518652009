"""Runs for tests of many processes: a program for torchrun that trains one case after another.

    torchrun --nproc-per-node 2 -m tests.train.world ENGINE CASES.json

ENGINE is one of ``ENGINES``. CASES.json: a list of {"recipe", "overrides", "rows", "out", "resume", "fault"}; rows are
those of a micro-batch, of which as many are accumulated as make a global batch. Every process
writes ``rank-N.json`` into a case's folder: a hash of all that is trained or counted, as this process has it.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

ENGINES = {"one": 1, "ddp": 2, "zero1": 2, "zero2": 2, "zero3": 2}
"""Engines and how many processes they are tested with."""

GLOBAL_BATCH = 4
FAST = [
    "data.builtin=false",
    "data.tasks={reverse: {path: builtin/reverse}, count: {path: builtin/count}}",
    "data.max_rows=60", "data.max_eval_rows=2", "adapter.target_modules=[q_proj, k_proj, v_proj, down_proj]",
    "training.max_length=48", "training.eval_strategy=no", "training.logging_steps=1", "training.report_to=none",
    "training.disable_tqdm=true", "training.warmup_steps=0", "training.weight_decay=0.01", "training.seed=3",
    # Adam divides by what is nearly nothing where a gradient is: with a larger epsilon, rounding stays rounding.
    "training.adam_epsilon=1e-3", "training.save_strategy=no",
]  # fmt: skip


def run(
    engine: str, cases: list[dict[str, Any]], folder: Path, processes: int | None = None, timeout: float = 280
) -> None:
    """Train the cases in fresh processes; fails with their output if one of them fails, or hangs."""
    folder.mkdir(parents=True, exist_ok=True)
    count = processes or ENGINES[engine]
    listed = folder / f"{engine}.json"
    listed.write_text(json.dumps([{"processes": count, **case} for case in cases]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    try:
        done = subprocess.run(
            [*command, "-m", "tests.train.world", engine, str(listed)],
            capture_output=True, text=True, timeout=timeout, cwd=Path(__file__).parents[2],
        )  # fmt: skip
    except subprocess.TimeoutExpired as hung:
        shown = b"".join(part for part in (hung.stdout, hung.stderr) if part).decode(errors="replace")
        raise AssertionError(f"{engine} hung:\n{shown[-6000:]}") from None
    assert done.returncode == 0, f"{engine} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"


def main(engine: str, cases: list[dict[str, Any]]) -> None:
    import torch

    from moelora.model.partition import wholes
    from moelora.model.write import adapter_tensors
    from moelora.recipe import read_recipe
    from moelora.train import run as running
    from moelora.train.processes import end

    for case in cases:
        out, share = Path(case["out"]), GLOBAL_BATCH // case["processes"]
        rows = case.get("rows", share)
        overrides = [
            *FAST,
            f"training.per_device_train_batch_size={rows}",
            f"training.gradient_accumulation_steps={share // rows}",
            f"training.output_dir={out}",
            *([f"deepspeed={engine}"] if engine.startswith("zero") else []),
            *case.get("overrides", []),
        ]
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        build = running.build_trainer

        def built(*args: Any, case: dict[str, Any] = case, build: Any = build) -> Any:
            trainer = build(*args)
            prepare(trainer, case)
            return trainer

        running.build_trainer = built
        try:
            result = running.train(read_recipe(case["recipe"], overrides), resume=case.get("resume", False))
        finally:
            running.build_trainer = build
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        digest = hashlib.sha256()
        for name, value in sorted(wholes(adapter_tensors(result.model)).items()):
            digest.update(name.encode() + value.numpy().tobytes())
        (out / f"rank-{rank}.json").write_text(json.dumps({"hash": digest.hexdigest(), "summary": result.summary}))
    end()


def prepare(trainer: Any, case: dict[str, Any]) -> None:
    """What a case does to its trainer: faults, and a method between backward and step."""
    import torch

    from tests.train.transforms import TRANSFORMS

    if "transform" in case:
        trainer.optim = TRANSFORMS[case["transform"]]()
    if "nan" in case:  # {"step", "rank", "layer"}
        fault = case["nan"]
        layer = trainer.model.get_submodule(fault["layer"])

        def spoil(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            here = trainer.args.process_index == fault["rank"] and trainer.state.global_step + 1 in fault["steps"]
            return output * float("nan") if here and trainer.is_in_train else output

        layer.register_forward_hook(spoil)
    if "kill_worker" in case:
        trainer.add_callback(KillWorker(case["kill_worker"]))


class KillWorker(TrainerCallback):
    """Kills a data-loader worker as a step begins, and waits until it is dead."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step + 1 == self.step:
            (worker,) = multiprocessing.active_children()
            worker.kill()
            os.waitid(os.P_PID, worker.pid or 0, os.WEXITED | os.WNOWAIT)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))
