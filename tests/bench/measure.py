"""What every suite measures with: interleaved times, memory, errors against float64, and rows of one form.

A row is a plain dict with the keys ``KEYS``. A variant whose error is above its bound is refused: its row says so and
holds no time. Tables and pictures are made from the rows alone (``tests/bench/page.py``).
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import peft
import torch
import transformers
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from moelora.ops import cpu, cuda

KEYS: Final = (
    *("suite", "case", "dtype", "pass", "variant", "ms", "p10", "p90", "ratio"),
    *("saved_bytes", "peak_bytes", "error", "refused"),
)
"""Of a row. ms, p10, p90: median and deciles. ratio: this variant's ms over ours. Bytes and errors may be None."""

BOUNDS: Final = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 1e-2}
"""Largest error, relative to the largest value, with which a variant is timed: that of the dtype's matrix products."""

Row = dict[str, Any]
Step = Callable[[], Any]


@dataclass(frozen=True)
class Clock:
    """Times of a device.

    repeats, seconds: rounds of one case at most, three at least; and seconds after which none is begun. warm: rounds
    that do not count, beside the runs in which a variant was compared. flush: bytes written between two steps on a GPU,
    so that none finds its input in the L2. ahead: cycles that a GPU is kept busy before a step, so that the host is
    ahead of it and its launches are not timed.
    """

    device: torch.device
    repeats: int = 15
    seconds: float = 5.0
    warm: int = 0
    flush: int = 512 << 20
    ahead: int = 4_000_000

    def rounds(self, steps: Mapping[str, Step]) -> dict[str, list[float]]:
        """Milliseconds of every step, interleaved."""
        for _ in range(self.warm):
            for step in steps.values():
                step()
        found: dict[str, list[float]] = {name: [] for name in steps}
        began = time.perf_counter()
        for done in range(max(3, self.repeats)):
            if done >= 3 and time.perf_counter() - began > self.seconds:
                break
            for name, step in steps.items():
                found[name].append(self.once(step))
        return found

    def once(self, step: Step) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            step()
            return 1e3 * (time.perf_counter() - start)
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.empty(self.flush, dtype=torch.int8, device=self.device).zero_()
        torch.cuda._sleep(self.ahead)
        begin.record()
        step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def saved_bytes(run: Callable[[], Any], given: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps of ``run()`` for backward: distinct storages that are none of the given tensors'."""
    known = {tensor.untyped_storage().data_ptr() for tensor in given}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()  # alive until counted: a freed storage's address may be another's
        total = sum(kept.values())
    del out
    return total


def peak_bytes(step: Step, device: torch.device) -> int:
    """Most bytes that ``step()`` had allocated at once beyond what was there before, by the device's own allocator."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        step()
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def largest_error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest deviation, relative to the largest value of its tensor; infinite where something is no number."""
    errors = []
    for one, right in zip(found, wanted, strict=True):
        scale = float(right.abs().max()) or 1.0
        error = float((one.detach().double() - right).abs().max()) / scale if right.numel() else 0.0
        errors.append(error if error == error else float("inf"))  # max() would lose a nan
    return max(errors)


def row(suite: str, case: object, dtype: torch.dtype, what: str, variant: str, **more: Any) -> Row:
    """A row without times; ``more`` are other keys."""
    start: Row = dict.fromkeys(KEYS)
    start.update({"suite": suite, "case": str(case), "dtype": name_of(dtype), "pass": what, "variant": variant})
    start.update({"refused": False, **more})
    return checked(start)


def timed(rows: Sequence[Row], steps: Mapping[str, Step], ours: str, clock: Clock) -> None:
    """Fill in the times of the rows of one case and pass; refused ones are neither run nor filled."""
    sound = {one["variant"]: one for one in rows if not one["refused"]}
    found = clock.rounds({name: steps[name] for name in sound})
    for name, values in found.items():
        cuts = statistics.quantiles(values, n=10, method="inclusive")
        sound[name].update(ms=statistics.median(values), p10=cuts[0], p90=cuts[-1])
    for one in sound.values():
        one["ratio"] = one["ms"] / sound[ours]["ms"] if ours in sound else None


def shown(found: Iterable[Row]) -> Iterator[Row]:
    """The same rows, each said on the error stream when it is there."""
    began, case = time.perf_counter(), ""
    for one in found:
        where = f"{one['suite']}: {one['case']}, {one['dtype']}, {one['pass']}"
        if where != case:
            print(f"[{time.perf_counter() - began:4.0f} s] {where}", file=sys.stderr)
        case = where
        result = "refused: it is wrong" if one["refused"] else "right"
        if one["ms"] is not None:
            result = f"{one['ms']:10.3f} ms" + ("" if one["ratio"] is None else f"   {one['ratio']:.2f} of ours")
        print(f"         {one['variant']:32} {result}", file=sys.stderr, flush=True)
        yield one


def checked(one: Row) -> Row:
    """The row, if it has the form that all have. Raises ValueError otherwise."""
    if tuple(one) != KEYS:
        raise ValueError(f"a row has the keys {KEYS}, not {tuple(one)}")
    if one["refused"] and one["ms"] is not None:
        raise ValueError(f"a refused variant has no time: {one}")
    return one


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def about(kind: str, command: str, device: torch.device) -> dict[str, Any]:
    """What the rows were measured on, beside them in the file. kind: the page they belong to, cpu or gpu."""
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        machine = f"{processor()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    kernels = cuda.status() if kind == "gpu" else cpu.status()
    return {"kind": kind, "command": command, "machine": machine, "versions": versions, "kernels": kernels}


def processor() -> str:
    """What Linux calls it, and whether it has matrix instructions, on which half precision depends."""
    about_it = Path("/proc/cpuinfo")
    if not about_it.is_file():
        return platform.machine()
    facts = dict(line.split("\t: ", 1) for line in about_it.read_text().splitlines() if "\t: " in line)
    facts = {key.strip(): value for key, value in facts.items()}
    return facts.get("model name", platform.machine()) + (" with AMX" if "amx_bf16" in facts.get("flags", "") else "")


def write(path: Path, head: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """The head and the rows as JSON, one row per line."""
    lines = ",\n".join("  " + json.dumps(checked(one)) for one in rows)
    start = json.dumps(dict(head), indent=1)[:-2]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{start},\n "rows": [\n{lines}\n ]\n}}\n', encoding="utf-8")


def read(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """(head, rows) of a file that ``write`` wrote."""
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = [checked(one) for one in content.pop("rows")]
    return content, rows
