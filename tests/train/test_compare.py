"""moelora ablate: several recipes, one table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from moelora.core.errors import ConfigError, OutputError
from moelora.recipe import read_recipe, shipped_recipes
from moelora.train import compare as module
from moelora.train.compare import Comparison, compare, read_comparison

QUICK = [
    "training.max_steps=2",
    "training.per_device_train_batch_size=2",
    "training.per_device_eval_batch_size=8",
    "data.max_rows=8",
    "data.max_eval_rows=2",
    "training.report_to=none",
]


def test_two_recipes_in_one_table_and_one_page(tmp_path: Path) -> None:
    variants = compare(Comparison(recipes=["single", "smora"], overrides={"training.seed": 3}), tmp_path, QUICK)
    assert list(variants) == ["base", "single", "smora"]
    assert json.loads((tmp_path / "summary.json").read_text()) == {"variants": variants}
    assert variants["single"]["trainable_parameters"] > 0 and variants["smora"]["seconds"] > 0
    assert len(variants["base"]["tasks"]) == 8
    page = (tmp_path / "report.html").read_text()
    assert all(f"<td>{name}</td>" in page for name in ("single", "smora"))
    for name in ("single", "smora"):
        assert yaml.safe_load((tmp_path / name / "recipe.yaml").read_text())["training"]["seed"] == 3

    foreign = tmp_path / "smora"
    for path in sorted(foreign.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (foreign / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds files that no run wrote"):
        compare(Comparison(recipes=["single", "smora"]), tmp_path, QUICK)
    assert (foreign / "notes.txt").read_text() == "mine"
    assert (tmp_path / "single" / "summary.json").is_file()  # nothing was replaced before that was found


def test_unequal_sizes_are_refused_before_anything_is_trained(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "train", lambda *_, **__: pytest.fail("trained"))
    unequal = Comparison(recipes=["single", "smora"], equal_parameters=0.001)
    with pytest.raises(ConfigError, match=r"differ by more \(single 342,272, smora 338,048\)"):
        compare(unequal, tmp_path)


def test_the_shipped_comparison_is_of_equal_size() -> None:
    content = read_comparison("compare_routers")
    assert content.recipes == ["single", "smora", "comol", "xlora", "meteora", "lora_mixer"]
    assert content.equal_parameters is not None and content.equal_parameters <= 0.03
    recipes = {name: read_recipe(name) for name in content.recipes}
    module._refuse_unequal(recipes, content.equal_parameters, [])
    targets = {str(recipe.adapter.target_modules) for recipe in recipes.values()}
    training = {json.dumps({**recipe.training, "output_dir": ""}) for recipe in recipes.values()}
    assert len(targets) == len(training) == 1


def test_a_comparison_and_a_recipe_are_told_apart() -> None:
    with pytest.raises(ConfigError, match="one recipe, run by `moelora train`"):
        read_comparison("smora")
    with pytest.raises(ConfigError, match="run `moelora ablate compare_routers`"):
        read_recipe("compare_routers")
    assert "compare_routers" in shipped_recipes()


def test_runs_cannot_be_sent_to_one_folder_where_each_would_replace_the_last(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "recipe.yaml").write_text("a run of mine")
    for comparison, more in (
        (Comparison(recipes=["single", "smora"]), [f"training.output_dir={mine}"]),
        (Comparison(recipes=["single"], overrides={"training.output_dir": str(mine)}), []),
    ):
        with pytest.raises(ConfigError, match="a folder for every run"):
            compare(comparison, tmp_path / "out", [*QUICK, *more])
    assert (mine / "recipe.yaml").read_text() == "a run of mine"


def test_two_runs_of_one_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two are called 'smora'"):
        compare(Comparison(recipes=["smora", "smora"]), tmp_path)


def test_a_wrong_key_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("recipes: [smora]\noverride: {}\n")
    with pytest.raises(ConfigError, match="unknown key 'override'; did you mean 'overrides'"):
        read_comparison(tmp_path / "c.yaml")
