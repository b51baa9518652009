"""The table of variants: of one size, read as its numbers say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.results import variants
from tests.results.variants import BASELINES, LADDER, SEEDS, VARIANTS, Found, parameters, searches, size_for
from tests.results.variants_page import STUDENT, reading, row, write_page

RESULTS = Path(__file__).parents[2] / "docs" / "results"


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.sized])
def test_every_variant_trains_as_many_parameters_as_its_baseline(name: str) -> None:
    variant = VARIANTS[name]
    baseline, size = BASELINES[variant.group]
    wanted = parameters(VARIANTS[baseline], size)
    of_page = json.loads((RESULTS / "variants.json").read_text())[name]["size"]
    assert parameters(variant, of_page) == pytest.approx(wanted, rel=0.07)


def test_the_size_is_the_nearest_one() -> None:
    assert size_for(VARIANTS["lora"], parameters(VARIANTS["lora"], 5)) == 5
    assert size_for(VARIANTS["dora"], parameters(VARIANTS["lora"], 8)) == 7


def test_the_page_is_of_the_numbers_beside_it(tmp_path: Path) -> None:
    write_page(json.loads((RESULTS / "variants.json").read_text()), tmp_path)
    again = (tmp_path / "variants.md").read_text(encoding="utf-8")
    assert again == (RESULTS / "variants.md").read_text(encoding="utf-8")


def entry(losses: dict[float, list[float | None]]) -> dict[str, Any]:
    runs = {
        f"{rate:.3g} {seed}": {"loss": loss, "token_accuracy": 0.5, "parameters": 10}
        for rate, of_seeds in losses.items()
        for seed, loss in enumerate(of_seeds)
    }
    return {"size": 4, "runs": runs}


def test_a_row_is_of_the_best_rate_that_all_seeds_have() -> None:
    made = row("lora", entry({0.1: [1.0, 1.2, 1.4], 0.2: [0.5], 0.3: [1.1, 1.1, 1.1], 0.4: [0.9, None, 0.9]}))
    assert made is not None and made.rate == 0.3 and made.rates == 4 and not made.edge
    assert row("lora", entry({0.1: [1.0, 1.0]})) is None


def test_a_difference_is_of_runs_with_one_seed() -> None:
    base = row("lora", entry({0.1: [1.0, 2.0, 3.0]}))
    better, open_ = (row(n, entry({0.1: o})) for n, o in (("dora", [0.9, 1.9, 2.9]), ("kasa", [0.0, 2.5, 3.0])))
    assert base and better and open_
    assert better.against(base) == pytest.approx((-0.1, 0), abs=1e-12)
    apart, width = open_.against(base)
    assert apart == pytest.approx(-0.5 / 3) and width == pytest.approx(STUDENT * math.sqrt(7 / 12) / math.sqrt(3))
    said = reading([base, better, open_], base)
    assert "Better than LoRA by more than the interval: dora. Worse: none. Not told apart by three seeds: kasa." in said


def test_a_search_goes_on_while_the_best_lies_at_an_end_and_makes_no_run_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[float, int]] = []

    def run(variant: Any, size: int, rate: float, seed: int) -> dict[str, Any]:
        made.append((rate, seed))
        return {"loss": abs(math.log(rate / LADDER[9])) / 30 + 0.01 * seed, "token_accuracy": 0.0, "parameters": 1}

    monkeypatch.setattr(variants, "run", run)
    monkeypatch.setattr(variants, "parameters", lambda variant, size: size)
    for _ in range(2):
        assert len(list(searches(Found(tmp_path / "variants.json"), ["lora"]))) == 2
    assert [LADDER.index(rate) for rate, seed in made if seed == 0] == [4, 5, 6, 7, 8, 9, 10]
    assert sorted({(LADDER.index(rate), seed) for rate, seed in made if seed}) == [
        (step, seed) for step in (8, 9, 10) for seed in SEEDS[1:]
    ]
    assert len(made) == len(set(made))
