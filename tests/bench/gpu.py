"""Every timing on a GPU, beside its peers: layers, decoding, crossover of the paths, scaling, a Llama-3-8B stack.

    python -m tests.bench.gpu [--out FOLDER] [--suites layer crossover ...] [--compile]
    python -m tests.bench.gpu --cpu-smoke         # its lines on tiny shapes; the times mean nothing

Needs torch with CUDA, triton, transformers and peft. Variants of a case run in one process, interleaved, timed by CUDA
events behind work that keeps the device busy, with the L2 cache flushed. A variant whose output or gradients deviate
from float64, or differ between 20 runs, is refused. Writes gpu.json, and from it gpu.md and gpu_*.png; parts measured
apart are put together by ``python -m tests.bench.page A.json B.json --out docs/bench/gpu``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.bench import gpu_page, layer, models, scaling
from tests.bench.measure import Clock, Row, about, row, shown, write
from tests.bench.page import Rows
from tests.bench.variants import (
    BASE,
    COMPILED,
    EAGER,
    GROUPED,
    INDEX_ADD,
    LOOP,
    LORA,
    OURS,
    OURS_DENSE,
    OURS_GATHER,
    OURS_SORTED,
    Problem,
    Shape,
    variants,
)

WAYS = [BASE, LORA, LOOP, INDEX_ADD, GROUPED, EAGER, OURS, OURS_DENSE, OURS_SORTED]
DECODING = [BASE, LORA, LOOP, EAGER, OURS, OURS_DENSE, OURS_GATHER]
CURVES_OF = [LOOP, INDEX_ADD, EAGER, OURS]

CASES = [
    Shape(16384, 4096, 8, 16, 2),
    Shape(16384, 4096, 64, 64, 4),
    Shape(16384, 4096, 16, 16, 2),
    Shape(16384, 4096, 32, 16, 4),
    Shape(16384, 4096, 64, 16, 4),
    Shape(16384, 4096, 8, 16, 2, zipf=1.2),
    Shape(16384, 4096, 64, 64, 4, zipf=1.2),
    Shape(16384, 4096, 8, 16, 2, n=14336),
    Shape(16384, 4096, 64, 1, 8),
    Shape(4096, 2048, 8, 8, 2),
    Shape(16384, 8192, 8, 16, 2),
]
"""The two with targets first."""
FEW = [Shape(T, 4096, 8, 16, 2) for T in (1, 8, 64)]
CROSSOVER = [Shape(16384, 4096, E, 16, k) for k in (1, 2, 4) for E in (8, 16, 32, 48, 64, 96, 128, 192, 256)]
CURVES = {
    "E": [Shape(16384, 4096, E, 16, 2) for E in (4, 8, 16, 32, 64, 128, 256)],
    "T": [Shape(T, 4096, 8, 16, 2) for T in (256, 1024, 4096, 16384, 65536)],
    "r": [Shape(16384, 4096, 8, r, 2) for r in (4, 8, 16, 32, 64)],
}
STACK = models.Shape(4096, 14336, 4, 4096, heads=32, key_heads=8, experts=8, rank=8, batch=8, length=2048)
"""Four blocks of Llama-3-8B and a small vocabulary, since the output head is no part of the question."""
RUNS = 20


def repeatable(cases: list[Shape], dtype: torch.dtype, device: torch.device, names: list[str]) -> Iterator[Row]:
    """One row per case and way of ours: refused where output and gradients of 20 runs are not bitwise equal."""
    for s in cases:
        p = Problem(s, dtype, device, with_base=True)
        for name, variant in variants(p, names).items():
            first = variant.both(p.upstream)
            again = (variant.both(p.upstream) for _ in range(RUNS - 1))
            differs = sum(not all(map(torch.equal, first, other)) for other in again)
            yield row("repeatable", s, dtype, f"{RUNS} runs", name, error=float(differs), refused=differs > 0)


def rows(suites: list[str], clock: Clock, dtype: torch.dtype, smoke: bool, with_compile: bool) -> Iterator[Row]:
    """Rows of the suites asked for, in the order of ``SUITES``."""

    def cut(cases: list[Shape]) -> list[Shape]:
        return [tiny(s) for s in cases] if smoke else cases

    def able(names: list[str]) -> list[str]:
        kept = [name for name in names if not (smoke and name in (OURS_SORTED, OURS_GATHER))]
        return kept + [COMPILED] * (with_compile and EAGER in names)

    own = [OURS_DENSE, OURS_SORTED]
    device = clock.device
    parts: dict[str, Callable[[], Iterator[Row]]] = {
        "repeatable": lambda: repeatable(cut(CASES), dtype, device, able([OURS, *own])),
        "layer": lambda: layer.suite(cut(CASES), [dtype], able(WAYS), clock, {layer.WITH_BASE: True}),
        "stack": lambda: models.mixtures(models.Maker(tiny_model(STACK) if smoke else STACK, device, dtype), clock),
        "crossover": lambda: layer.suite(cut(CROSSOVER), [dtype], able(own), clock, {"crossover": False}),
        "decode": lambda: layer.suite(cut(FEW), [dtype], able(DECODING), clock, {"decode": True}, (layer.FORWARD,)),
        "scaling": lambda: scaling.suite(
            {name: cut(shapes) for name, shapes in CURVES.items()}, dtype, CURVES_OF, clock, limit=0.5
        ),
    }
    for name in SUITES:
        if name in suites:
            yield from parts[name]()


SUITES = ("repeatable", "layer", "stack", "crossover", "decode", "scaling")


def tiny(s: Shape) -> Shape:
    """The same kind of case, for a machine without a GPU."""
    E = min(s.E, 16)
    return replace(s, T=min(s.T, 32), d=32, n=48 if s.n else 0, E=E, r=min(s.r, 8), k=min(s.k, E // 2))


def tiny_model(s: models.Shape) -> models.Shape:
    return replace(s, hidden=64, inner=96, layers=1, vocab=64, heads=4, key_heads=2, batch=2, length=16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for gpu.json, gpu.md and gpu_*.png")
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--repeats", type=int, default=50, help="rounds of a case at most; three at least")
    parser.add_argument("--seconds", type=float, default=4, help="after which no round of a case is begun")
    parser.add_argument("--compile", action="store_true", help="also eager dense rank space under torch.compile")
    parser.add_argument("--cpu-smoke", action="store_true", help="tiny shapes on the CPU")
    args = parser.parse_args()
    if not args.cpu_smoke and not torch.cuda.is_available():
        sys.exit(
            "tests.bench.gpu measures on a CUDA GPU, and torch finds none here; --cpu-smoke tries its lines on a CPU"
        )
    transformers.logging.set_verbosity_error()
    device = torch.device("cpu" if args.cpu_smoke else "cuda")
    dtype = torch.float32 if args.cpu_smoke else torch.bfloat16
    clock = Clock(device, args.repeats, args.seconds, warm=0 if args.cpu_smoke else 5)
    head = about("gpu", "python -m tests.bench.gpu " + " ".join(sys.argv[1:]), device)
    found: list[Row] = []
    try:
        found.extend(shown(rows(args.suites, clock, dtype, args.cpu_smoke, args.compile)))
    finally:  # what was measured before an error is worth keeping
        finish(args.out, head, found)


def finish(out: Path, head: dict[str, Any], found: list[Row]) -> None:
    write(out / "gpu.json", head, found)
    gpu_page.page(head, Rows(found), out / "gpu")
    print(f"Written: {out / 'gpu.json'}, {out / 'gpu.md'}", file=sys.stderr)


if __name__ == "__main__":
    main()
