"""The operator on a CPU beside other ways to write it: forward, and forward with backward, in float32 and bfloat16.

    python tests/bench/cpu.py [--repeats 15] [--markdown FILE] [--json FILE] [--cases 8 64]

All variants of a case run in one process, interleaved, so that a noisy machine is noisy for all of them. Times are
medians (p10 to p90) in milliseconds. Output and gradients of every variant are compared with float64 first; a variant
that is wrong is not timed. Saved: memory that autograd keeps for the backward pass beside the inputs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moelora.core.factors import Factors
from moelora.core.route import Route, dense_gates
from moelora.ops import cpu, routed_lora

OURS, PLAIN, LOOP = "moelora, compiled", "moelora, plain PyTorch", "loop over all experts (PEFT)"
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 4e-2}
"""Largest error, relative to the largest value, with which a variant is timed: that of bfloat16 products."""


@dataclass(frozen=True)
class Shape:
    """T tokens, d input and output features, E experts of rank r, k chosen."""

    T: int
    d: int
    E: int
    r: int
    k: int

    def __str__(self) -> str:
        return f"T={self.T} d={self.d} E={self.E} r={self.r} k={self.k}"


CASES = [
    Shape(1024, 1024, 8, 8, 2),
    Shape(1024, 1024, 64, 8, 2),
    Shape(1024, 2048, 16, 16, 2),
    Shape(256, 512, 8, 8, 2),
    Shape(1024, 1024, 64, 1, 8),
]


@dataclass
class Variant:
    """One way to compute the update, and the leaves it differentiates: x, the gates, then factors."""

    run: Callable[[], Tensor]
    leaves: list[Tensor]
    joined: Callable[[list[Tensor]], list[Tensor]] = lambda grads: grads
    """The gradients of x, gates, A and B, however the factors are cut."""


@contextlib.contextmanager
def kernels_for(variant: str) -> Iterator[None]:
    """The operator without its compiled kernels, where the variant is the plain one."""
    with contextlib.ExitStack() as stack:
        if variant == PLAIN:
            stack.enter_context(routed_lora.routed_lora.set_kernel_enabled("cpu", False))
            stack.enter_context(routed_lora.routed_lora_backward.set_kernel_enabled("cpu", False))
        yield


def variants(s: Shape, x: Tensor, A: Tensor, B: Tensor, weight: Tensor, index: Tensor) -> dict[str, Variant]:
    """Every way, over the same numbers."""
    dtype, scale = x.dtype, torch.ones(s.E * s.r)
    As = [part.detach().clone().requires_grad_() for part in A.split(s.r)]
    Bs = [part.detach().clone().requires_grad_() for part in B.split(s.r, dim=1)]
    whole, cut = [x, weight, A, B], [x, weight, *As, *Bs]

    def operator() -> Tensor:
        return routed_lora.apply(x, Factors(A, B, scale), Route(weight, s.E, index))

    def all_experts() -> Tensor:
        gate, out = dense_gates(weight, index, s.E).to(dtype), x.new_zeros(s.T, s.d)
        for e in range(s.E):
            out = out + F.linear(F.linear(x * gate[:, e, None], As[e]), Bs[e]) * 1.0
        return out

    def chosen_tokens() -> Tensor:
        out = x.new_zeros(s.T, s.d)
        for e in range(s.E):
            token, slot = (index == e).nonzero(as_tuple=True)
            part = F.linear(F.linear(x[token], As[e]), Bs[e])
            out = out.index_add(0, token, part * weight[token, slot, None].to(dtype))
        return out

    def dense() -> Tensor:
        gate = dense_gates(weight, index, s.E).to(dtype).unsqueeze(-1)
        return ((x @ A.t()).view(s.T, s.E, s.r) * gate).view(s.T, -1) @ B.t()

    def grouped() -> Tensor:
        order = index.flatten().argsort(stable=True)
        ends = torch.bincount(index.flatten(), minlength=s.E).cumsum(0).int()
        token = order // s.k
        h = F.grouped_mm(x[token], A.view(s.E, s.r, s.d).transpose(1, 2), offs=ends)
        u = h * weight.flatten()[order].unsqueeze(-1).to(dtype)
        y = F.grouped_mm(u, B.t().reshape(s.E, s.r, s.d), offs=ends)
        return x.new_zeros(s.T, s.d).index_add(0, token, y)

    def join(grads: list[Tensor]) -> list[Tensor]:
        return [*grads[:2], torch.cat(grads[2 : 2 + s.E]), torch.cat(grads[2 + s.E :], 1)]

    found = {
        LOOP: Variant(all_experts, cut, join),
        "loop over experts, index_add": Variant(chosen_tokens, cut, join),
        "torch grouped_mm": Variant(grouped, whole),
        "dense rank space, eager": Variant(dense, whole),
        PLAIN: Variant(operator, whole),
    }
    if s.r * x.element_size() % 16:
        del found["torch grouped_mm"]  # it wants rows of 16 bytes
    if not cpu.PROBLEM:
        found[OURS] = Variant(operator, whole)
    return found


def forward(name: str, variant: Variant) -> Tensor:
    with kernels_for(name), torch.no_grad():
        return variant.run()


def backward(name: str, variant: Variant, upstream: Tensor) -> list[Tensor]:
    """Gradients of a variant's leaves."""
    with kernels_for(name):
        return list(torch.autograd.grad(variant.run(), variant.leaves, upstream))


def error(actual: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest error, relative to the largest value of its tensor."""
    pairs = zip(actual, wanted, strict=True)
    return max(float((a.double() - w).abs().max() / w.abs().max()) for a, w in pairs)


def saved(variant: Variant) -> int:
    """Bytes kept for the backward pass, without the leaves themselves."""
    known = {leaf.untyped_storage().data_ptr() for leaf in variant.leaves}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = variant.run()
        total = sum(kept.values())
    del out
    return total


def timed(steps: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of every step, interleaved."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn:  # the first turn warms up
                found[name].append(1e3 * (time.perf_counter() - start))
    return found


def measure(s: Shape, dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    """All rows of a case: one per variant and pass."""
    torch.manual_seed(0)
    exact = [torch.randn(s.T, s.d), torch.randn(s.E * s.r, s.d) / s.d**0.5, torch.randn(s.d, s.E * s.r) / s.r]
    x, A, B = (tensor.to(dtype).requires_grad_() for tensor in exact)
    scores, index = torch.randn(s.T, s.E).topk(s.k)
    weight, upstream = scores.softmax(-1).requires_grad_(), torch.randn(s.T, s.d).to(dtype)
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, weight, A, B)]
    mixed = (wide[0] @ wide[2].t()) * dense_gates(wide[1], index, s.E).repeat_interleave(s.r, 1)
    right = mixed @ wide[3].t()
    wanted = [right.detach(), *torch.autograd.grad(right, wide, upstream.double())]

    rows, sound = [], {}
    for name, variant in variants(s, x, A, B, weight, index).items():
        grads = variant.joined(backward(name, variant, upstream))
        row = {"case": str(s), "dtype": str(dtype).removeprefix("torch."), "variant": name, "saved": saved(variant)}
        row["error"] = error([forward(name, variant), *grads], wanted)
        rows.append(row)
        if row["error"] < BOUNDS[dtype]:
            sound[name] = variant

    passes = {
        "forward": {n: lambda n=n, v=v: forward(n, v) for n, v in sound.items()},
        "forward and backward": {n: lambda n=n, v=v: backward(n, v, upstream) for n, v in sound.items()},
    }
    out = []
    for title, steps in passes.items():
        times = timed(steps, repeats)
        for row in rows:
            values = times.get(row["variant"])
            if values is None:
                out.append({**row, "pass": title, "refused": True})
                continue
            cuts = statistics.quantiles(values, n=10)
            out.append({**row, "pass": title, "ms": statistics.median(values), "p10": cuts[0], "p90": cuts[-1]})
    return out


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown of the rows of one case, dtype and pass."""
    ours = next((row.get("ms") for row in rows if row["variant"] == OURS), None)
    first = rows[0]
    lines = [
        f"\n### {first['case']}, {first['dtype']}, {first['pass']}\n",
        "| variant | median ms | p10 | p90 | times compiled | saved MB | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        end = f"{row['saved'] / 1e6:.1f} | {row['error']:.0e} |"
        if row.get("refused"):
            lines.append(f"| {row['variant']} | refused: wrong | | | | {end}")
            continue
        ratio = f"{row['ms'] / ours:.2f}" if ours else ""
        lines.append(f"| {row['variant']} | {row['ms']:.2f} | {row['p10']:.2f} | {row['p90']:.2f} | {ratio} | {end}")
    return lines


def targets(rows: list[dict[str, Any]]) -> list[str]:
    """What issue-level targets ask of the two main cases, and what came out."""
    both = [row for row in rows if row["pass"] == "forward and backward" and "ms" in row]
    by = {(row["case"], row["dtype"], row["variant"]): row["ms"] for row in both}
    few, many = str(CASES[0]), str(CASES[1])
    lines = ["\n### Targets, forward and backward\n", "| what | asked | found |", "|---|---|---|"]
    for case, dtype, loop, eager in ((few, "float32", 4, 1), (many, "float32", 20, 3), (few, "bfloat16", 10, None)):
        ours = by.get((case, dtype, OURS))
        if ours is None:
            continue
        lines.append(f"| {case} {dtype}: loop / ours | {loop} | {by[case, dtype, LOOP] / ours:.1f} |")
        rest = [ms for (c, t, name), ms in by.items() if (c, t) == (case, dtype) and name not in (OURS, LOOP)]
        if eager is not None:
            lines.append(f"| {case} {dtype}: best other / ours | {eager} | {min(rest) / ours:.2f} |")
    if (few, "float32", OURS) in by and (many, "float32", OURS) in by:
        growth = by[many, "float32", OURS] / by[few, "float32", OURS]
        lines.append(f"| growth from E=8 to E=64, float32 | at most 1.5 | {growth:.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--cases", type=int, nargs="*", help=f"numbers of cases, 0 to {len(CASES) - 1}; all by default")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    lines = [
        "# The operator on a CPU",
        "",
        f"`python tests/bench/cpu.py --repeats {args.repeats}`, torch {torch.__version__}, {torch.get_num_threads()} "
        f"threads, {platform.machine()}, compiled kernels: {cpu.status()}.",
    ]
    rows: list[dict[str, Any]] = []
    for number in range(len(CASES)) if args.cases is None else args.cases:
        for dtype in (torch.float32, torch.bfloat16):
            found = measure(CASES[number], dtype, args.repeats)
            rows += found
            for title in ("forward", "forward and backward"):
                lines += table([row for row in found if row["pass"] == title])
    lines += targets(rows)
    print("\n".join(lines))
    if args.markdown is not None:
        args.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
