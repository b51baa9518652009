"""Timings of the operator and of whole training steps, beside their peers, in one process.

    python tests/bench/run.py [--markdown docs/bench/cpu.md]        # make bench

Every row is checked against a float64 oracle first and refused when it is wrong. Times are medians (p10 to p90) in
milliseconds, all variants interleaved, so that a noisy machine is noisy for all of them.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

import moelora
from moelora.core.factors import Factors
from moelora.core.route import Route
from moelora.ops import routed_lora
from moelora.recipe import Recipe
from moelora.train.run import load_base

Step = Callable[[], Tensor | None]


def times(steps: dict[str, Step], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of every step, interleaved."""
    for step in steps.values():
        step()
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            found[name].append(1e3 * (time.perf_counter() - start))
    return found


def rows(title: str, found: dict[str, list[float]], reference: str) -> list[str]:
    """A markdown table; ``reference`` is the row the others are compared with."""
    base = statistics.median(found[reference])
    lines = [
        f"\n### {title}\n",
        "| variant | median ms | p10 | p90 | times " + reference + " |",
        "|---|---|---|---|---|",
    ]
    for name, values in found.items():
        middle, cuts = statistics.median(values), statistics.quantiles(values, n=10)
        lines.append(f"| {name} | {middle:.2f} | {cuts[0]:.2f} | {cuts[-1]:.2f} | {middle / base:.2f} |")
    return lines


def operator(T: int, D: int, E: int, r: int, k: int, repeats: int) -> list[str]:
    """Forward and backward of one layer's update: ours, a loop over chosen tokens, a loop over all (as X-LoRA does)."""
    torch.manual_seed(0)
    x = torch.randn(T, D, requires_grad=True)
    A = torch.randn(E * r, D).div_(D**0.5).requires_grad_()
    B = torch.randn(D, E * r).div_(r).requires_grad_()
    scores, index = torch.randn(T, E).topk(k)
    weight = scores.softmax(-1).requires_grad_()
    factors, leaves = Factors(A, B, torch.ones(E * r)), (x, A, B, weight)

    def ours() -> Tensor:
        return routed_lora.apply(x, factors, Route(weight, E, index))

    def token_loop() -> Tensor:
        out = x.new_zeros(T, D)
        for e in range(E):
            token, slot = (index == e).nonzero(as_tuple=True)
            part = x[token] @ A[e * r : (e + 1) * r].t() @ B[:, e * r : (e + 1) * r].t()
            out = out.index_add(0, token, part * weight[token, slot, None])
        return out

    def dense_loop() -> Tensor:
        gate, out = torch.zeros(T, E).scatter(1, index, weight), x.new_zeros(T, D)
        for e in range(E):
            out = out + ((x * gate[:, e, None]) @ A[e * r : (e + 1) * r].t()) @ B[:, e * r : (e + 1) * r].t()
        return out

    variants = {"moelora": ours, "loop with index_add": token_loop, "loop over all tokens": dense_loop}
    gate = torch.zeros(T, E, dtype=torch.float64).scatter(1, index, weight.detach().double())
    oracle = (x.detach().double() @ A.detach().double().t() * gate.repeat_interleave(r, 1)) @ B.detach().double().t()
    errors = {
        name: float((run().detach().double() - oracle).abs().max() / oracle.abs().max())
        for name, run in variants.items()
    }
    assert max(errors.values()) < 1e-5, f"a wrong variant is not worth timing: {errors}"

    def both(run: Callable[[], Tensor]) -> Step:
        def step() -> None:
            torch.autograd.grad(run().square().sum(), leaves)

        return step

    title = f"Operator, forward and backward, float32: T={T} D=O={D} E={E} r={r} k={k}"
    return rows(title, times({name: both(run) for name, run in variants.items()}, repeats), "moelora")


def whole_model(repeats: int) -> list[str]:
    """A training step (forward and backward) of the tiny base: bare, PEFT's LoRA, and ours, at the same rank."""
    batch = torch.randint(5, 512, (32, 32))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

    def step(model: torch.nn.Module) -> Step:
        model.train()
        return lambda: model(input_ids=batch, labels=batch).loss.backward()

    peft = get_peft_model(load_base(Recipe())[0], LoraConfig(r=24, lora_alpha=24, target_modules=targets))
    adapters = {
        "moelora single": {"experts": {"r": 24}},
        "moelora smora, top 8 of 24": {"experts": {"r": 24}, "router": {"name": "smora", "top_k": 8}},
        "moelora meteora, 2 of 8 x 3": {
            "experts": {"num_experts": 8, "r": 3},
            "router": {"name": "meteora", "top_k": 2},
        },
    }
    steps = {"PEFT LoRA": step(peft)}
    for name, adapter in adapters.items():
        steps[name] = step(moelora.adapt(load_base(Recipe())[0], adapter, verbose=False))
    return rows("Training step of the tiny base (1.3 M), batch 32 x 32, rank 24", times(steps, repeats), "PEFT LoRA")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--markdown", type=Path, help="also write the tables here")
    args = parser.parse_args()
    lines = [
        "# Timings on a CPU",
        "",
        f"`python tests/bench/run.py --repeats {args.repeats}`, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, "
        f"{platform.machine()}. The plain PyTorch reference; there is no compiled kernel yet.",
    ]
    lines += operator(1024, 1024, 8, 8, 2, args.repeats)
    lines += operator(1024, 1024, 64, 8, 2, args.repeats)
    lines += whole_model(args.repeats)
    print("\n".join(lines))
    if args.markdown is not None:
        args.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
