"""Eight LoRA adapters such as a hub has, no two alike: each trained by PEFT on one of the built-in tasks.

    python -m moelora.recipes.hub_adapters --out out/hub_adapters      # about four minutes on one core

The recipes hub_experts_* mix them. Ranks go from 2 to 64, there are four sets of target modules and two conventions of
scale (alpha / r, and rsLoRA's alpha / sqrt(r)); one adapter is a DoRA, one has other ranks and alphas in some modules.
out/hub_adapters/TASK holds what PEFT's save_pretrained writes. Folders that are there already are left alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from transformers import set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTTrainer

from moelora.data.load import Task, load_tasks
from moelora.data.progress import quiet_if_small
from moelora.recipe import check_recipe
from moelora.train.progress import LossBar
from moelora.train.run import load_base, sft_config

QUERY_VALUE = ["q_proj", "v_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "reverse": {"r": 8, "lora_alpha": 16, "target_modules": ATTENTION},
    "sort": {"r": 24, "lora_alpha": 12, "target_modules": "all-linear", "use_rslora": True},
    "shift": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
    "rotate": {"r": 12, "lora_alpha": 24, "target_modules": ATTENTION, "use_dora": True},
    "count": {"r": 2, "lora_alpha": 8, "target_modules": QUERY_VALUE},
    "sum": {"r": 64, "lora_alpha": 64, "target_modules": MLP},
    "largest": {"r": 4, "lora_alpha": 8, "target_modules": QUERY_VALUE, "use_rslora": True},
    "format": {
        **{"r": 6, "lora_alpha": 12, "target_modules": "all-linear"},
        "rank_pattern": {"down_proj": 32, r"layers\.0\.self_attn\.\w+": 3},
        "alpha_pattern": {"down_proj": 32},
    },
}
"""Options of PEFT's LoraConfig by task."""


def train_adapter(task: Task, folder: Path, steps: int, show: bool = True) -> None:
    """Train the adapter of a built-in task on the tiny base model and write it to ``folder``, which must not exist."""
    try:
        from peft import LoraConfig
    except ImportError:
        raise SystemExit(
            "these adapters are trained by PEFT, which is not installed: pip install 'peft>=0.18'"
        ) from None
    unfinished = folder.with_name(f".{folder.name}")
    training = {
        "output_dir": str(unfinished),
        "max_steps": steps,
        "per_device_train_batch_size": 64,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 10,
        "max_length": 128,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": not show,
    }
    recipe = check_recipe({"training": training})
    set_seed(0)
    model, tokenizer = load_base(recipe)
    model.name_or_path = recipe.base_model  # what PEFT writes down
    with quiet_if_small(len(task.train)):
        trainer = SFTTrainer(
            model,
            sft_config(recipe),
            train_dataset=task.train.select_columns(["prompt", "completion"]),
            processing_class=tokenizer,
            peft_config=LoraConfig(**ADAPTERS[task.name]),
        )
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    if show:
        trainer.add_callback(LossBar())
    trainer.train()
    trainer.model.save_pretrained(unfinished, save_embedding_layers=False)
    unfinished.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/hub_adapters"))
    parser.add_argument("--steps", type=int, default=100, help="training steps of each adapter")
    args = parser.parse_args()

    tasks = load_tasks(check_recipe({"data": {"builtin": True}}).data)
    for number, task in enumerate(tasks, 1):
        folder = args.out / task.name
        there = folder.exists()
        print(f"[{number}/{len(tasks)}] {folder}{', there already' if there else ''}", flush=True)
        if not there:
            train_adapter(task, folder, args.steps)
    print(f"{args.out} is complete; next: moelora train hub_experts_smear")


if __name__ == "__main__":
    main()
