"""What the benchmarks rest on: wrong variants get no time, memory is counted right, rows have one form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.bench import layer, models, variants
from tests.bench.measure import Clock, checked, largest_error, peak_bytes, read, row, saved_bytes, timed, write
from tests.bench.variants import OURS, Problem, Shape, Variant

CPU = torch.device("cpu")
CLOCK = Clock(CPU, repeats=3)
SMALL = Shape(T=12, d=32, E=4, r=8, k=2, n=48)
NAMES = [variants.BASE, variants.LORA, variants.LOOP, variants.LOOP_WIDE, variants.INDEX_ADD, variants.GROUPED]
NAMES += [variants.EAGER, variants.OURS, variants.OURS_DENSE]


def problem(with_base: bool = True, dtype: torch.dtype = torch.float32, s: Shape = SMALL) -> Problem:
    return Problem(s, dtype, CPU, with_base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_base", [True, False])
def test_every_way_is_right_and_timed(with_base: bool, dtype: torch.dtype) -> None:
    p = problem(with_base, dtype)
    found = variants.variants(p, NAMES)
    assert (variants.BASE in found) == with_base and (variants.LOOP_WIDE in found) == (dtype == torch.bfloat16)
    rows = list(layer.measured(p, found, CLOCK, "layer", (layer.FORWARD, layer.BOTH)))
    assert len(rows) == 2 * len(found)
    assert [one["variant"] for one in rows if one["refused"] or one["ms"] is None] == []


def test_ways_that_cannot_compute_a_problem_are_left_out() -> None:
    found = variants.variants(problem(s=Shape(T=12, d=32, E=4, r=1, k=2)), [*NAMES, variants.OURS_SORTED])
    assert variants.GROUPED not in found and variants.OURS_SORTED not in found and variants.LOOP in found


def spoiled(p: Problem, kind: str) -> Variant:
    """The eager way with one thing wrong."""
    right = variants.eager(p)

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, y: Tensor) -> Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: object, dy: Tensor) -> Tensor:
            return 2 * dy

    def run() -> Tensor:
        if kind == "gradient":
            return Twice.apply(right.run())
        if kind == "only without gradients":
            return right.run() * (1 if torch.is_grad_enabled() else 2)
        return right.run() * (float("nan") if kind == "nan" else 1.001)

    return Variant(run, right.leaves, right.right)


@pytest.mark.parametrize("kind", ["output", "gradient", "only without gradients", "nan"])
def test_a_wrong_variant_is_refused_and_never_timed(kind: str) -> None:
    p, runs = problem(), []
    wrong = spoiled(p, kind)
    counted = Variant(lambda: (runs.append(1), wrong.run())[1], wrong.leaves, wrong.right)
    found = {OURS: variants.ours(p, "dense"), "wrong": counted}
    rows = list(layer.measured(p, found, CLOCK, "layer", (layer.BOTH,)))
    good, bad = rows
    assert bad["refused"] and bad["ms"] is None and bad["ratio"] is None and bad["error"] > 1e-4
    assert not good["refused"] and good["ms"] > 0 and good["ratio"] == 1
    assert len(runs) == 2  # for the comparison, with and without gradients


def test_times_of_others_stand_without_ours() -> None:
    rows = [row("layer", "case", torch.float32, "forward", name) for name in (OURS, "other")]
    rows[0]["refused"] = True
    timed(rows, {OURS: lambda: 1 / 0, "other": lambda: None}, OURS, CLOCK)
    assert rows[0]["ms"] is None and rows[1]["ms"] >= 0 and rows[1]["ratio"] is None


def test_rounds_are_interleaved_and_end_with_the_time() -> None:
    order: list[str] = []
    steps = {name: lambda name=name: order.append(name) for name in "ab"}
    found = Clock(CPU, repeats=5, warm=2).rounds(steps)
    assert {name: len(values) for name, values in found.items()} == {"a": 5, "b": 5}
    assert order == list("ab" * 7)
    assert len(Clock(CPU, repeats=50, seconds=0).rounds(steps)["a"]) == 3


def test_saved_bytes_counts_storages_once_and_no_inputs() -> None:
    x = torch.randn(100, requires_grad=True)
    assert saved_bytes(lambda: x * x, [x]) == 0
    assert saved_bytes(lambda: x * x, []) == 400
    assert saved_bytes(lambda: x.exp().view(10, 10).sin() * 2, [x]) == 400  # exp's output, kept by exp and by sin
    assert saved_bytes(lambda: x.exp().exp(), [x]) == 800


def test_peak_bytes_is_the_most_at_once() -> None:
    x = torch.randn(1000)

    def step() -> Tensor:
        y = x + 1
        z = y * 2
        del y
        return z.sum()

    assert 8000 <= peak_bytes(step, CPU) < 8200


def test_errors() -> None:
    one = torch.tensor([1.0, 2.0])
    assert largest_error([one, one], [one.double(), torch.tensor([1.0, 4.0]).double()]) == 0.5
    assert largest_error([one * float("nan")], [one.double()]) == float("inf")
    assert largest_error([torch.ones(2)], [torch.zeros(2).double()]) == 1


def test_rows_have_one_form(tmp_path: Path) -> None:
    good = row("layer", SMALL, torch.bfloat16, "forward", OURS, error=0.1)
    write(tmp_path / "deep" / "x.json", {"kind": "cpu"}, [good, good])
    assert read(tmp_path / "deep" / "x.json") == ({"kind": "cpu"}, [good, good])
    assert good["case"] == "T=12 d=32 n=48 E=4 r=8 k=2" and good["dtype"] == "bfloat16"
    for bad in ({**good, "more": 1}, {key: value for key, value in good.items() if key != "p90"}):
        with pytest.raises(ValueError, match="a row has the keys"):
            checked(bad)
    with pytest.raises(ValueError, match="no time"):
        checked({**good, "refused": True, "ms": 1.0})


TINY = models.Shape(64, 96, 1, 50, experts=2, rank=4, batch=2, length=8, prompt=4, new=3)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_xlora_of_both_libraries_is_compared_before_it_is_timed(trained: bool) -> None:
    make = models.Maker(TINY, CPU, torch.float32)
    mine = make.xlora(trained)
    theirs, wrong = make.peft_xlora(mine, trained), make.peft_xlora(mine, trained)
    assert any(".lora_" in name for name, p in theirs.named_parameters() if p.requires_grad) == trained
    with torch.no_grad():
        models.head(wrong)[-1].bias += torch.tensor([0.5, 0.0])
    found = {models.OURS: lambda: mine, models.PEFT: lambda: theirs, "wrong": lambda: wrong}
    rows = list(models.training(make, "case", found, CLOCK, set(found)))
    assert [one["refused"] for one in rows] == [False, False, True]
    assert rows[1]["ratio"] > 0 and min(one["peak_bytes"] for one in rows[:2]) > 0
    generated = list(models.generation(make, {**found, "none": make.frozen}, CLOCK, {models.OURS, models.PEFT}))
    assert [one["refused"] for one in generated] == [False, False, False, False]


def test_a_token_that_is_not_the_best_is_found() -> None:
    class Fixed(nn.Module):
        def forward(self, input_ids: Tensor, use_cache: bool) -> object:
            logits = torch.zeros(1, input_ids.shape[1], 3, dtype=torch.float64)
            logits[..., 1], logits[..., 2] = 4.0, 3.0
            return type("Out", (), {"logits": logits})

    assert models.missed(Fixed(), torch.tensor([[0, 0, 1, 1]]), 2) == 0
    assert models.missed(Fixed(), torch.tensor([[0, 0, 1, 2]]), 2) == 0.25
