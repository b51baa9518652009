"""Plain LoRA, SMoRA and MeteoRA on the built-in tasks at equal trainable parameters, in one table and one page.

    python recipes/quickstart.py --out out/quickstart

Writes summary.json ({"variants": {name: {"trainable_parameters", "seconds", "tasks": {task: {"loss", "accuracy"}}}}}),
report.html, and a complete run folder per variant. About three minutes of training on two cores.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from moelora.cli.show import task_table
from moelora.recipe import find_recipe, read_recipe
from moelora.train.report import write_report
from moelora.train.run import RECIPE, SUMMARY, Result, train

VARIANTS = ("single", "smora", "meteora")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/quickstart"))
    parser.add_argument("--steps", type=int, help="training steps per variant, instead of the recipes'")
    args = parser.parse_args()

    results: list[Result] = []
    for number, name in enumerate(VARIANTS, 1):
        print(f"\n[{number}/{len(VARIANTS)}] {name}")
        folder = args.out / name
        if (folder / RECIPE).is_file():  # an earlier quickstart
            shutil.rmtree(folder)
        steps = [] if args.steps is None else [f"training.max_steps={args.steps}"]
        recipe = read_recipe(name, [f"training.output_dir={folder}", "training.save_strategy=no", *steps])
        results.append(train(recipe, evaluate_base=not results))

    base = results[0].base or {}
    variants = {"base": {"trainable_parameters": 0, "seconds": 0.0, "tasks": base}}
    variants.update({run.name: {key: run.summary[key] for key in variants["base"]} for run in results})
    (args.out / SUMMARY).write_text(json.dumps({"variants": variants}, indent=1) + "\n", encoding="utf-8")
    recipes = "\n".join(find_recipe(name).read_text(encoding="utf-8") for name in VARIANTS)
    write_report(args.out / "report.html", results, recipes, base)

    print()
    task_table({name: content["tasks"] for name, content in variants.items()})
    print(f"{args.out}/report.html shows the same with pictures; {args.out}/summary.json holds the numbers")


if __name__ == "__main__":
    main()
