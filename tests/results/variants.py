"""Every variant of LoRA at equal trainable parameters, its learning rate searched, on the built-in tasks.

    python -m tests.results.variants --out docs/results        # about two hours on one core; goes on where it was ended
    python -m tests.results.variants --out docs/results --page # the page and the picture alone, from what is there

A variant is one LoRA on all linear layers of the embedded base, or the mixture that it needs. Its rank is the one that
comes nearest to the parameters of its group's baseline. First one seed, with four learning rates of a common ladder,
and further ones for as long as the best lies at an end; then the other seeds, with the best and those of its two
neighbours that come near it. Writes variants.json, run by run, and from it variants.md and variants.png.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from moelora.core.errors import MoeloraError
from moelora.recipe import read_recipe
from moelora.train.compare import trainable_parameters
from moelora.train.run import train

TASKS = ("reverse", "sort", "shift", "rotate", "count", "sum", "largest", "format")
STEPS, BATCH, SEEDS = 100, 16, (0, 1, 2)
CLOSE = 0.1
"""Neighbours that are worse than the best by more, with the first seed, are left out."""
LADDER = [1e-3 * 2.5**step for step in range(-4, 10)]
COMMON = [
    "data.builtin=false",
    "data.tasks={" + ", ".join(f"{task}: {{path: builtin/{task}}}" for task in TASKS) + "}",
    "data.max_rows=400", "data.max_eval_rows=64", f"training.max_steps={STEPS}", "training.warmup_steps=10",
    f"training.per_device_train_batch_size={BATCH}", "training.per_device_eval_batch_size=128",
    "training.save_strategy=no", "training.eval_strategy=no", "training.report_to=none", "training.disable_tqdm=true",
    f"training.logging_steps={STEPS}", "training.use_cpu=true",
]  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """experts: of ``adapter.experts``. sized: the key of it that makes it equally large; empty where r is as given.

    more: other sections of the adapter, and ``optim``. first: where on the ladder its four rates begin.
    """

    experts: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    group: str = "usual"
    sized: str = "r"
    first: int = 4
    remark: str = ""

    def overrides(self, size: int) -> list[str]:
        """Of the recipe single, with what is sized of this size."""
        experts = {"name": "lora", "num_experts": 1, **self.experts}
        if self.sized:
            experts[self.sized] = size
        experts.setdefault("lora_alpha", 2 * experts["r"])
        sections = {"experts": experts, **self.more}
        return [f"{'' if key == 'optim' else 'adapter.'}{key}={json.dumps(value)}" for key, value in sections.items()]


def optim(name: str, first: int = 4, **options: Any) -> Variant:
    return Variant(more={"optim": {"name": name, **options}}, first=first)


UNIFORM = {"router": {"name": "uniform"}}
VARIANTS = {
    "lora": Variant(remark="baseline"),
    "rslora": Variant({"use_rslora": True}, remark="`use_rslora`"),
    "dora": Variant({"name": "dora"}),
    "kasa": Variant({"name": "kasa"}, {"losses": {"spectrum": 1e-4, "orthogonality": 1e-3}}),
    "slora": Variant({"name": "slora"}),
    "nystrom": Variant({"name": "slora"}, {"init": {"name": "nystrom"}}, remark="of `slora`: NLoRA"),
    "lamda": Variant({"name": "lamda"}, remark="B rests after 30 % of the steps"),
    "pissa": Variant(more={"init": {"name": "pissa"}}),
    "olora": Variant(more={"init": {"name": "olora"}}),
    "lora_ga": Variant(more={"init": {"name": "lora_ga", "batches": 4}}, first=3),
    "eva": Variant(more={"init": {"name": "eva", "batches": 8}}),
    "dylora": Variant(more={"ranks": {"name": "dylora"}}, remark="evaluated at all ranks"),
    "sora": Variant(more={"ranks": {"name": "sora"}}, remark="before pruning"),
    "adalora": Variant({"r": 12}, {"ranks": {"name": "adalora", "target_r": 8, "deltaT": 10}}, sized="",
                       remark="from rank 12 to 8"),
    "increlora": Variant({"r": 12}, {"ranks": {"name": "increlora", "target_r": 8, "interval": 8, "warmup": 8,
                                               "top_h": 28}}, sized="", remark="from rank 1 to 8, at most 12"),
    "spectral": Variant({"r": 16}, {"ranks": {"name": "spectral", "mean_r": 8}}, sized="",
                        remark="ranks 4 to 16, on average 8"),
    "layra": Variant(more={"targets": {"name": "layra", "first": 1, "last": 1}}, remark="2 of 4 blocks"),
    "flexora": Variant(more={"targets": {"name": "flexora", "steps": 40, "validation": 4, "count": 2, "lr": 2.5e-3}},
                       remark="2 of 4 blocks, found in 40 steps: the same two"),
    "lora_plus": optim("lora_plus", first=2),
    "lora_fa": Variant({"train": "B"}, {"optim": {"name": "lora_fa"}}, first=1, remark="A is not trained"),
    "allora": optim("allora"),
    "lora_pro": optim("lora_pro", first=2),
    "altlora": optim("altlora", first=2),
    "altlora_plus": optim("altlora_plus", first=2),
    "ggpo": optim("ggpo"),
    "mgpo": optim("mgpo"),
    "ba_lora": Variant(more={"init": {"name": "pissa"}, "losses": {"ba_lora": {"weight": 1.0, "tokens": "answers"}}},
                       remark="with `init: pissa`"),
    "uniform": Variant({"num_experts": 4, "lora_alpha": 16}, UNIFORM,
                       remark="4 experts, each at 1/4: LoRA itself, a check"),
    "orthogonality": Variant({"num_experts": 4, "lora_alpha": 16}, {**UNIFORM, "losses": {"orthogonality": 1e-3}},
                             remark="4 experts, each at 1/4"),
    "lora (small)": Variant(group="small", remark="baseline"),
    "loraxs": Variant({"name": "loraxs"}, group="small", first=5),
    "lora_sb": Variant({"name": "loraxs"}, {"init": {"name": "lora_sb", "batches": 4}}, group="small",
                       remark="of `loraxs`"),
    "inttune": Variant({"name": "slora", "train": "middle"}, {"init": {"name": "nystrom"}}, group="small", first=5,
                       remark="`slora`, `train: middle`, `init: nystrom`"),
    "lamda (middle)": Variant({"name": "lamda", "train": "middle"}, group="small", first=5, remark="`train: middle`"),
    "vera": Variant({"name": "vera"}, group="small", first=6),
    "nola": Variant({"name": "nola", "r": 4}, group="small", sized="bases", first=6),
    "unilora": Variant({"name": "unilora", "r": 4, "lora_alpha": 4}, group="small", sized="theta_d_length", first=5),
}  # fmt: skip
BASELINES = {"usual": ("lora", 8), "small": ("lora (small)", 1)}


def recipe_of(variant: Variant, size: int, rate: float, seed: int, out: Path) -> Any:
    where = [f"training.learning_rate={rate}", f"training.seed={seed}", f"training.output_dir={out}"]
    return read_recipe("single", [*COMMON, *variant.overrides(size), *where])


def parameters(variant: Variant, size: int) -> int:
    """How many a run would train; a choice of blocks is taken for given."""
    more = variant.more
    if more.get("targets", {}).get("name") == "flexora":
        more = {**more, "targets": {**more["targets"], "blocks": [0, 1]}}
    return trainable_parameters(
        recipe_of(Variant(variant.experts, more, sized=variant.sized), size, 1.0, 0, Path("out"))
    )


def size_for(variant: Variant, wanted: int) -> int:
    """The size at which it trains nearest to so many parameters; they grow with it."""
    low, high = 1, 2
    while parameters(variant, high) < wanted:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if parameters(variant, middle) < wanted else (low, middle)
    return min((low, high), key=lambda size: abs(parameters(variant, size) - wanted))


def run(variant: Variant, size: int, rate: float, seed: int) -> dict[str, Any]:
    """Held-out loss and token accuracy, means over the tasks."""
    out = Path(tempfile.mkdtemp()) / "run"
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            done = train(recipe_of(variant, size, rate, seed, out))
    except MoeloraError as error:
        if not str(error).startswith("training ended"):  # it diverged
            raise
        return {"loss": None, "why": str(error)}
    finally:
        shutil.rmtree(out.parent)
    tasks = done.summary["tasks"].values()
    means = {key: sum(task[key] for task in tasks) / len(TASKS) for key in ("loss", "token_accuracy")}
    return {**means, "seconds": done.summary["seconds"], "parameters": done.summary["trainable_parameters"]}


class Found:
    """What is in variants.json, one more run after the other."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.all: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}

    def loss(self, name: str, size: int, step: int, seed: int) -> float:
        """Of a run, which is made if it is not there. Infinite for one that diverged."""
        entry = self.all.setdefault(name, {"size": size, "runs": {}})
        key = f"{LADDER[step]:.3g} {seed}"
        if key not in entry["runs"]:
            entry["runs"][key] = run(VARIANTS[name], size, LADDER[step], seed)
            self.file.write_text(json.dumps(self.all, indent=1) + "\n", encoding="utf-8")
        loss = entry["runs"][key]["loss"]
        return math.inf if loss is None or math.isnan(loss) else float(loss)


def searches(found: Found, names: list[str]) -> Iterator[None]:
    """Run after run, until every variant is done."""
    counts = {group: parameters(VARIANTS[name], size) for group, (name, size) in BASELINES.items()}
    sizes = {name: size_for(VARIANTS[name], counts[VARIANTS[name].group]) if VARIANTS[name].sized else 0
             for name in names}  # fmt: skip
    close: dict[str, list[int]] = {}
    for name in names:
        tried = list(range(VARIANTS[name].first, VARIANTS[name].first + 4))
        while True:
            losses = {step: found.loss(name, sizes[name], step, SEEDS[0]) for step in tried}
            best = min(tried, key=lambda step: losses[step])
            if best == tried[0] > 0:
                tried.insert(0, tried[0] - 1)
            elif best == tried[-1] < len(LADDER) - 1:
                tried.append(tried[-1] + 1)
            else:
                break
        close[name] = [step for step in tried if abs(step - best) < 2 and losses[step] < losses[best] + CLOSE]
        yield
    for name in names:
        for seed in SEEDS[1:]:
            for step in close[name]:
                found.loss(name, sizes[name], step, seed)
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--page", action="store_true", help="train nothing")
    parser.add_argument("--only", nargs="*", help="variants, instead of all")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    found, names = Found(args.out / "variants.json"), args.only or list(VARIANTS)
    if not args.page:
        torch.set_num_threads(1)
        for _ in tqdm(searches(found, names), total=2 * len(names), desc="Variants"):
            pass
    from tests.results.variants_page import write_page

    write_page(found.all, args.out)


if __name__ == "__main__":
    main()
