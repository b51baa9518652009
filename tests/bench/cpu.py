"""Every timing on a CPU, beside its peers: layers, scaling curves, whole models.

    python -m tests.bench.cpu [--out FOLDER] [--suites layer scaling model]         # make bench

Variants of a case run in one process, interleaved, so that a noisy machine is noisy for all of them. A variant whose
output or gradients deviate from float64 is refused. Writes cpu.json, and from it cpu.md and cpu_scaling.png.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers

from tests.bench import cpu_page, layer, models, scaling, variants
from tests.bench.measure import Clock, Row, about, shown, write
from tests.bench.page import Rows
from tests.bench.variants import Shape

CASES = [
    Shape(1024, 1024, 8, 8, 2),
    Shape(1024, 1024, 64, 8, 2),
    Shape(1024, 2048, 16, 16, 2),
    Shape(256, 512, 8, 8, 2),
    Shape(1024, 1024, 64, 1, 8),
]
CURVES = {
    "E": [Shape(1024, 1024, E, 8, 2) for E in (4, 8, 16, 32, 64, 128, 256)],
    "T": [Shape(T, 1024, 8, 8, 2) for T in (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)],
    "r": [Shape(1024, 1024, 8, r, 2) for r in (4, 8, 16, 32, 64)],
}
PEERS = [variants.BASE, variants.LORA, variants.LOOP, variants.LOOP_WIDE, variants.INDEX_ADD, variants.GROUPED]
WAYS = [*PEERS, variants.EAGER, variants.OURS, variants.OURS_DENSE]
ON_CURVES = [variants.LOOP, variants.INDEX_ADD, variants.EAGER, variants.OURS]
SUITES_OF = {layer.ALONE: False, layer.WITH_BASE: True}
SUITES = ("layer", "scaling", "model")


def rows(suites: list[str], repeats: int) -> Iterator[Row]:
    device = torch.device("cpu")
    if "layer" in suites:
        yield from layer.suite(CASES, [torch.float32, torch.bfloat16], WAYS, Clock(device, repeats, 4), SUITES_OF)
    if "scaling" in suites:
        yield from scaling.suite(CURVES, torch.float32, ON_CURVES, Clock(device, repeats, 2), limit=3)
    if "model" in suites:
        yield from models.suite(models.Shape(), torch.float32, Clock(device, repeats, 20))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for cpu.json, cpu.md and cpu_*.png")
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--repeats", type=int, default=15, help="rounds of a case at most; three at least")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    found = list(shown(rows(args.suites, args.repeats)))
    command = "make bench" if args.suites == list(SUITES) else "python -m tests.bench.cpu " + " ".join(sys.argv[1:])
    head = about("cpu", command, torch.device("cpu"))
    write(args.out / "cpu.json", head, found)
    cpu_page.page(head, Rows(found), args.out / "cpu")
    print(f"Written: {args.out / 'cpu.json'}, {args.out / 'cpu.md'}", file=sys.stderr)


if __name__ == "__main__":
    main()
