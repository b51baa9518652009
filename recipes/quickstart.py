"""Plain LoRA and routed mixtures on the built-in tasks at equal trainable parameters, in one table and one page.

    python recipes/quickstart.py --out out/quickstart
    python recipes/quickstart.py --router comol

Writes summary.json ({"variants": {name: {"trainable_parameters", "seconds", "tasks": {task: {"loss", "accuracy"}}}}}),
report.html, and a complete run folder per variant. About a minute of training per variant on two cores.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/quickstart"))
    parser.add_argument("--router", help="a recipe to compare with plain LoRA, instead of smora and meteora")
    parser.add_argument("--steps", type=int, help="training steps per variant, instead of the recipes'")
    args = parser.parse_args()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # at its import it names kernels that nothing here uses
    from moelora.cli.show import comparison_table
    from moelora.train.compare import Comparison, compare

    routers = [args.router] if args.router else ["smora", "meteora"]
    steps = [] if args.steps is None else [f"training.max_steps={args.steps}"]
    variants = compare(Comparison(recipes=["single", *routers]), args.out, steps)
    comparison_table(variants)
    print(f"{args.out}/report.html shows the same with pictures; {args.out}/summary.json holds the numbers")


if __name__ == "__main__":
    main()
