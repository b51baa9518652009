"""Several recipes run one after the other, in one table and one page."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from pydantic import Field
from transformers import AutoConfig, AutoModelForCausalLM

from moelora.core.errors import ConfigError, OutputError
from moelora.core.validate import Strict, check
from moelora.model.adapt import adapt, parameter_counts
from moelora.model.base import base_source
from moelora.recipe import Recipe, find_recipe, read_recipe
from moelora.train.report import write_report
from moelora.train.run import RECIPE, SUMMARY, Result, revision_of, train


class Comparison(Strict):
    """A file for ``moelora ablate``.

    recipes: names of shipped recipes, or paths. overrides: changes to all of them, ``{training.max_steps: 100}``.
    equal_parameters: how far trainable parameters may lie from their mean, as a share; checked before any training.
    evaluate_base: whether the base model is measured too.
    """

    recipes: Annotated[list[str], Field(min_length=1)]
    overrides: dict[str, Any] = {}
    equal_parameters: Annotated[float, Field(gt=0)] | None = None
    evaluate_base: bool = True


def read_comparison(path: str | Path) -> Comparison:
    """The comparison in a YAML file, or a shipped one of that name. Raises ConfigError."""
    file = find_recipe(path)
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not YAML: {error}") from None
    if isinstance(content, dict) and "recipes" not in content:
        raise ConfigError(f"{file}: one recipe, run by `moelora train`; a comparison names its recipes: [smora, comol]")
    return check(Comparison, content, str(file))


def compare(
    comparison: Comparison, out: Path, overrides: Iterable[str] = (), plugins: Iterable[str | Path] = ()
) -> dict[str, dict[str, Any]]:
    """Train every recipe into ``out/NAME`` and write ``out/summary.json`` and ``out/report.html`` about all of them.

    Runs that an earlier comparison left in these folders are replaced. Returns
    ``{name: {"trainable_parameters", "seconds", "tasks": {task: {"loss", "token_accuracy", "accuracy"}}}}``, the base
    model first. Raises ConfigError or OutputError before anything is trained or replaced: recipes are wrong or not of
    equal size, or a folder holds what no run wrote.
    """
    common = [*(f"{key}={json.dumps(value)}" for key, value in comparison.overrides.items()), *overrides]
    if any(override.partition("=")[0] == "training.output_dir" for override in common):
        raise ConfigError(
            "training.output_dir: a comparison has a folder for every run; name the one around them: --out"
        )
    recipes: dict[str, Recipe] = {}
    for name in comparison.recipes:
        run = Path(name).stem
        if run in recipes:
            raise ConfigError(f"recipes: two are called '{run}'")
        place = [f"training.output_dir={out / run}", "training.save_strategy=no"]
        recipes[run] = read_recipe(name, [*place, *common], plugins)
        _refuse_foreign(recipes[run].output_dir)
    if comparison.equal_parameters is not None:
        _refuse_unequal(recipes, comparison.equal_parameters, plugins)
    results: list[Result] = []
    for number, (name, recipe) in enumerate(recipes.items(), 1):
        print(f"\n[{number}/{len(recipes)}] {name}")
        if recipe.output_dir.exists():
            shutil.rmtree(recipe.output_dir)
        results.append(train(recipe, plugins, evaluate_base=comparison.evaluate_base and not results))

    variants: dict[str, dict[str, Any]] = {}
    base = results[0].base
    if base is not None:
        variants["base"] = {"trainable_parameters": 0, "seconds": 0.0, "tasks": base}
    for result in results:
        variants[result.name] = {key: result.summary[key] for key in ("trainable_parameters", "seconds", "tasks")}
    (out / SUMMARY).write_text(json.dumps({"variants": variants}, indent=1) + "\n", encoding="utf-8")
    texts = [find_recipe(name).read_text(encoding="utf-8") for name in comparison.recipes]
    write_report(out / "report.html", results, "\n".join(texts), base)
    return variants


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not (folder / RECIPE).is_file() and (folder.is_file() or any(folder.iterdir())):
        raise OutputError(f"{folder}: holds files that no run wrote; choose another folder")


def _refuse_unequal(recipes: dict[str, Recipe], share: float, plugins: Iterable[str | Path]) -> None:
    counts = {name: trainable_parameters(recipe, plugins) for name, recipe in recipes.items()}
    mean = sum(counts.values()) / len(counts)
    if any(abs(count - mean) > share * mean for count in counts.values()):
        listed = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        raise ConfigError(
            f"equal_parameters {share:g}: trainable parameters differ by more ({listed}); change r or num_experts"
        )


def trainable_parameters(recipe: Recipe, plugins: Iterable[str | Path] = ()) -> int:
    """How many parameters a recipe trains, from the base model's configuration alone. Raises ConfigError."""
    source, options = base_source(recipe.base_model), revision_of(recipe)
    try:
        config = AutoConfig.from_pretrained(source, **options)
    except OSError as error:
        raise ConfigError(f"base_model '{recipe.base_model}': {str(error).strip().splitlines()[0]}") from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    adapter = recipe.adapter.model_copy(update={"experts": recipe.adapter.experts.model_copy(update={"adapters": []})})
    return parameter_counts(adapt(model, adapter, plugins=plugins, verbose=False, blank=True))[0]
