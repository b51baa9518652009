"""A program that kills training runs and lets them go on, again and again, until each is finished.

    python -m tests.train.killed FOLDER KILLS

Everything is imported once; a run is a fork of this process, so that it is in its first step within a second. It tells
through a pipe what it is about to do (``PHASES``) and what it has done. The program waits until a run tells a phase,
and kills it a part of the phase later: by chance, but the same way every time. Prints what it counted as JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  transformers imports it when a trainer is made
import torch
from transformers import TrainerCallback

from moelora.io import folder as adapters
from moelora.recipe import read_recipe
from moelora.train import run as running
from moelora.train.checkpoint import MANIFEST, OPTIMIZER, PAIRS, newest, read_tensors, read_training
from tests.train.world import FAST

PHASES = {"starting": 1, "training": 3, "evaluating": 3, "saving": 3, "finishing": 1}
"""What a run is doing, and how often it is killed there. Finishing: the adapter, the last evaluation, the report."""

STEPS = 16
SETTINGS = [
    *FAST, f"training.max_steps={STEPS}", "training.per_device_train_batch_size=4", "data.max_eval_rows=4",
    "adapter.experts.lora_dropout=0.1", "training.save_total_limit=2", "training.save_strategy=steps",
    "training.eval_strategy=steps", "training.eval_steps=2",
]  # fmt: skip


class Teller(TrainerCallback):
    """Tells what a run does, a line for each thing, with the time."""

    def __init__(self, pipe: int) -> None:
        self.pipe, self.phase = pipe, ""

    def __call__(self, what: str) -> None:
        os.write(self.pipe, f"{time.monotonic()} {what}\n".encode())

    def enter(self, phase: str) -> None:
        self.phase = phase
        self(phase)

    def during(self, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def told(*args: Any, **options: Any) -> Any:
            before = self.phase
            self.enter(phase)
            found = call(*args, **options)
            self.enter(before)
            return found

        return told

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.enter("training")

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        self(f"done {state.global_step}")

    def on_save(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        self(f"saved {state.global_step}")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.enter("finishing")


def train(out: Path, every: int, pipe: int) -> None:
    """A run, or the rest of it, that saves after so many steps."""
    tell, build = Teller(pipe), running.build_trainer
    tell.enter("starting")

    def built(*args: Any) -> Any:
        trainer: Any = build(*args)
        trainer.evaluate = tell.during("evaluating", trainer.evaluate)
        trainer._save_checkpoint = tell.during("saving", trainer._save_checkpoint)
        trainer.add_callback(tell)
        return trainer

    running.build_trainer = built
    recipe = read_recipe("smora", [*SETTINGS, f"training.save_steps={every}", f"training.output_dir={out}"])
    running.train(recipe, resume=(out / running.RECIPE).is_file())


class Run:
    """A process that trains. told: what it has told, each with its time."""

    def __init__(self, out: Path, every: int) -> None:
        assert threading.active_count() == 1, "a fork has this thread alone"
        self.log = out.with_suffix(".log")
        self.told: list[tuple[float, str]] = []
        self.pipe, write = os.pipe()
        self.process = os.fork()
        if self.process == 0:
            code = 1
            try:
                log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 1)
                os.dup2(log, 2)
                train(out, every, write)
                code = 0
            except BaseException:
                os.write(2, traceback.format_exc().encode())
            finally:
                os._exit(code)  # nothing of the program that it was forked from
        os.close(write)
        self._lines = self._read()

    def _read(self) -> Iterator[tuple[float, str]]:
        rest = b""
        while True:
            assert select.select([self.pipe], [], [], 60)[0], f"hangs after {self.told[-1:]}: {self.shown()}"
            block = os.read(self.pipe, 1 << 16)
            if not block:
                return
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                at, _, what = line.decode().partition(" ")
                self.told.append((float(at), what))
                yield self.told[-1]

    def wait_for(self, phase: str, times: int) -> None:
        """Until it has told a phase so often, or has ended."""
        while times and (line := next(self._lines, None)):
            times -= line[1] == phase

    def kill(self) -> bool:
        """Whether it was running still. All that it told is known then."""
        os.kill(self.process, signal.SIGKILL)
        return self.end()

    def end(self) -> bool:
        """Wait for its end; whether it was killed."""
        for _ in self._lines:
            pass
        os.close(self.pipe)
        status = os.waitpid(self.process, 0)[1]
        killed = os.WIFSIGNALED(status)
        assert killed or os.WEXITSTATUS(status) == 0, self.shown()
        return killed

    def shown(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]

    def last(self, what: str) -> int:
        """The last step that it told ``what`` of; 0 if it told none."""
        return max((int(line.partition(" ")[2]) for _, line in self.told if line.startswith(f"{what} ")), default=0)

    def phase(self) -> str:
        return next(line for _, line in reversed(self.told) if line in PHASES)


def durations(told: list[tuple[float, str]]) -> dict[str, float]:
    """Seconds that a phase takes on average, from what an undisturbed run told."""
    phases = [(at, line) for at, line in told if line in PHASES]
    spans: dict[str, list[float]] = {phase: [] for phase in PHASES}
    for (begin, phase), (end, _) in zip(phases, [*phases[1:], told[-1]], strict=True):
        spans[phase].append(end - begin)
    return {phase: sum(found) / len(found) for phase, found in spans.items()}


def complete(folder: Path) -> bool:
    """Whether everything in a checkpoint is as it was written, by a reading of the manifest of its own."""
    manifest = json.loads((folder / MANIFEST).read_text())
    step = int(folder.name.rpartition("-")[2])
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {MANIFEST}
    hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in found}
    adapter = adapters.read_tensors(folder, adapters.read_manifest(folder))
    tensors = [*adapter.values(), read_tensors(folder, OPTIMIZER), read_tensors(folder, PAIRS)]
    finite = all(torch.isfinite(value).all() for part in tensors for value in part.values())
    return hashes == manifest["files"] and read_training(folder).step == manifest["step"] == step and finite


def result(out: Path) -> tuple[dict[str, bytes], list[Any]]:
    """What a finished run leaves: every file with tensors, and the losses of all steps."""
    files = [out / adapters.MANIFEST, out / "router.safetensors", *out.glob("experts/*/*")]
    history = json.loads((out / running.HISTORY).read_text())
    logged = [(row["step"], row[key]) for row in history for key in ("loss", "eval_loss") if key in row]
    return {str(file.relative_to(out)): file.read_bytes() for file in files}, logged


class Hunt:
    """Kills runs until it has killed enough of them, in every phase that matters, and counts what it finds."""

    def __init__(self, kills: int, spans: dict[str, float]) -> None:
        self.spans, self.moments = spans, random.Random(11)
        self.wanted = {"kills": kills, **dict.fromkeys(("training", "evaluating", "saving"), max(1, kills // 10))}
        self.counts = {"kills": 0, **dict.fromkeys(PHASES, 0), "partial": 0, "corrupt": 0, "lost": 0, "intervals": 0}

    def over(self) -> bool:
        return all(self.counts[what] >= count for what, count in self.wanted.items())

    def killed(self, run: Run) -> bool:
        """Kill a run in a phase that it is likely to reach; whether it had not ended before."""
        (phase,) = self.moments.choices(list(PHASES), list(PHASES.values()))
        run.wait_for(phase, 1 if phase in ("starting", "finishing") else self.moments.randint(1, 2))
        time.sleep(self.moments.uniform(0, 0.9) * self.spans[phase])
        return run.kill()

    def let_finish(self, out: Path, every: int) -> None:
        """Start a run, again and again, until one ends by itself."""
        done = saved = 0
        while True:
            run = Run(out, every)
            if not (run.end() if self.over() else self.killed(run)):
                return
            self.counts["kills"] += 1
            self.counts[run.phase()] += 1
            self.counts["partial"] += len(list(out.glob(".checkpoint-*.partial")))
            done, saved = max(done, run.last("done")), max(saved, run.last("saved"))
            selected = newest(out)
            assert not list(out.glob(".checkpoint-*")), "half-written checkpoints are gone"
            step = 0 if selected is None else int(selected.name.rpartition("-")[2])
            self.counts["corrupt"] += selected is not None and not complete(selected)
            self.counts["lost"] += step < saved
            self.counts["intervals"] = max(self.counts["intervals"], -(-(done - step) // every))
            saved = max(saved, step)


def main(folder: Path, kills: int) -> dict[str, int]:
    whole = Run(folder / "whole", 1)
    assert not whole.end()
    expected, finished = result(folder / "whole"), 0
    hunt = Hunt(kills, durations(whole.told))
    while not hunt.over():
        out = folder / f"run-{finished}"
        hunt.let_finish(out, every=1 + finished % 2)
        assert result(out) == expected, f"{out} differs from a run that was never killed"
        assert not list(out.rglob(".*")), "nothing half-written is left"
        finished += 1
    return {**hunt.counts, "finished": finished}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
