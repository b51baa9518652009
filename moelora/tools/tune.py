"""Block sizes of the Triton kernels, measured on the GPU at hand: what ``moelora tune`` does."""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from moelora.core.errors import MoeloraError

Measure = Callable[[Callable[[], object]], float]
"""Milliseconds that a call takes."""


def tune(out: Path | None = None, tokens: int = 8192, features: int = 4096, progress: Any = iter) -> Path:
    """Measure every kernel, dtype and width on this GPU, and write the best block sizes where the operator finds them.

    out: another file than that of this GPU in the user's cache. tokens, features: of the products measured. progress:
    wraps the list of things to measure. Gives the file. Raises MoeloraError without a CUDA GPU or Triton.
    """
    from moelora.ops import cuda

    if cuda.PROBLEM or not torch.cuda.is_available():
        raise MoeloraError(f"moelora tune measures Triton kernels on a CUDA GPU, and here is none: {cuda.status()}")
    from triton.testing import do_bench

    from moelora.triton_kernels import table

    device = torch.device("cuda", torch.cuda.current_device())
    rows = search(do_bench, device, tokens, features, progress)
    path = out or table.tuned_file(torch.cuda.get_device_name(device))
    write(path, rows, {"device": torch.cuda.get_device_name(device), "torch": torch.__version__})
    return path


def search(
    measure: Measure, device: torch.device, tokens: int, features: int, progress: Any = iter
) -> dict[str, dict[str, int]]:
    """The best configuration of every row of the table, by its key; what does not fit the GPU is left out."""
    from triton.runtime.errors import OutOfResources

    from moelora.triton_kernels import table

    rows = {}
    for kernel, single, ranks in progress(list(itertools.product(table.KERNELS, (False, True), table.RANKS))):
        best: tuple[float, Any] | None = None
        for config in candidates(kernel, ranks, single):
            try:
                took = measure(call(kernel, ranks, single, config, device, tokens, features))
            except OutOfResources:
                continue
            if best is None or took < best[0]:
                best = took, config
        assert best is not None, (kernel, single, ranks)
        rows[table.name(kernel, single, ranks)] = best[1].as_dict()
    return rows


def candidates(kernel: str, ranks: int, single: bool) -> Iterator[Any]:
    """Configurations worth a try."""
    from moelora.triton_kernels.launch import Config

    deep, warps, stages = (32,) if single else (32, 64, 128), (4, 8), (2, 3, 4)
    if kernel == "shrink":
        yield from itertools.starmap(Config, itertools.product((32, 64, 128), (ranks,), deep, warps, stages))
    elif kernel == "expand":
        yield from itertools.starmap(
            Config, itertools.product((32, 64, 128), (64, 128, 256), (min(ranks, 64),), warps, stages)
        )
    else:
        yield from itertools.starmap(Config, itertools.product((min(ranks, 128),), (64, 128), deep, warps, stages))


def call(
    kernel: str, ranks: int, single: bool, config: Any, device: torch.device, tokens: int, features: int
) -> Callable[[], object]:
    """One launch of a kernel over random tensors."""
    from moelora.triton_kernels import expand, outer, shrink, sort

    dtype = torch.float32 if single else torch.bfloat16
    made = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=made, device=device, dtype=torch.float32).to(dtype)

    x, w, u = random(tokens, features), random(ranks, features), random(tokens, ranks)
    if kernel == "shrink":
        return lambda: shrink.shrink(x, w, config)
    if kernel == "expand":
        return lambda: expand.expand(u, w, config, x)
    units = 8
    index = torch.randint(units, (tokens, 1), generator=made, device=device)
    segments = sort.sort_tokens(index, units, 64)
    gradient = torch.empty(units * ranks, features, dtype=dtype, device=device)
    return lambda: outer.outer_sorted(u, x, gradient, ranks, segments, config)


def write(path: Path, rows: dict[str, dict[str, int]], about: dict[str, str]) -> None:
    """The file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        json.dump({**about, "rows": rows}, file, indent=1)
    os.replace(file.name, path)
