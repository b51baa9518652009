"""Eight LoRA adapters as a hub has them: no two alike, each trained by PEFT on one built-in task.

    python -m moelora.recipes.hub_adapters --out out/hub_adapters

They stand in for adapters that others have trained: ranks from 2 to 64, four sets of target modules, two conventions of
scale, one DoRA, one with a rank and alpha of its own in some modules. Each folder out/hub_adapters/TASK holds what PEFT's
save_pretrained writes. Folders that are there already stay as they are. PEFT is needed: pip install 'moelora[peft]'.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from transformers import set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTTrainer

from moelora.data.load import Task, load_tasks
from moelora.data.prompts import as_trl
from moelora.recipe import check_recipe
from moelora.train.progress import LossBar
from moelora.train.run import load_base, sft_config

QV, ATTENTION, MLP, ALL = (
    ["q_proj", "v_proj"],
    ["q_proj", "k_proj", "v_proj", "o_proj"],
    ["gate_proj", "up_proj", "down_proj"],
    "all-linear",
)
ADAPTERS: dict[str, dict[str, Any]] = {
    "reverse": {"r": 16, "lora_alpha": 32, "target_modules": ATTENTION},
    "sort": {"r": 24, "lora_alpha": 12, "target_modules": ALL, "use_rslora": True},
    "shift": {"r": 8, "lora_alpha": 16, "target_modules": MLP},
    "rotate": {"r": 12, "lora_alpha": 24, "target_modules": ATTENTION, "use_dora": True},
    "count": {"r": 2, "lora_alpha": 8, "target_modules": QV},
    "sum": {"r": 64, "lora_alpha": 64, "target_modules": ALL},
    "largest": {"r": 4, "lora_alpha": 8, "target_modules": QV, "use_rslora": True},
    "format": {
        "r": 6,
        "lora_alpha": 12,
        "target_modules": ALL,
        "rank_pattern": {"down_proj": 32, r"layers\.3\..*_proj": 3},
        "alpha_pattern": {"down_proj": 32},
    },
}
"""Options of PEFT's LoraConfig by task."""


def train_adapter(task: Task, folder: Path, steps: int, quiet: bool = False) -> None:
    """Train the adapter of a built-in task with PEFT and TRL, and write it to ``folder``."""
    try:
        from peft import LoraConfig
    except ImportError:
        raise SystemExit("hub_adapters trains with PEFT, which is not installed: pip install 'moelora[peft]'") from None
    unfinished = folder.with_name(f".{folder.name}")
    training = {
        "max_steps": steps,
        "per_device_train_batch_size": 64,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 10,
        "max_length": 128,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": quiet,
        "output_dir": str(unfinished),
    }
    recipe = check_recipe({"training": training})
    set_seed(0)
    model, tokenizer = load_base(recipe)
    trainer = SFTTrainer(
        model,
        sft_config(recipe),
        train_dataset=as_trl(task.train.select_columns(["prompt", "completion"]), chat=True),
        processing_class=tokenizer,
        peft_config=LoraConfig(**ADAPTERS[task.name]),
    )
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(LossBar())
    trainer.train()
    trainer.model.save_pretrained(unfinished, save_embedding_layers=False)
    unfinished.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/hub_adapters"))
    parser.add_argument("--steps", type=int, default=120, help="training steps per adapter")
    parser.add_argument("--tasks", nargs="*")
    args = parser.parse_args()

    tasks = load_tasks(check_recipe({"data": {"builtin": True}}).data)
    for number, task in enumerate(tasks, 1):
        if args.tasks and task.name not in args.tasks: continue
        folder = args.out / task.name
        print(f"[{number}/{len(tasks)}] {folder}", "is there already" if folder.exists() else "")
        if not folder.exists():
            train_adapter(task, folder, args.steps)


if __name__ == "__main__":
    main()
