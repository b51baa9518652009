"""The progress bar of a training run: steps, speed, and the loss beside them."""

from __future__ import annotations

from typing import Any

from transformers.trainer_callback import ProgressCallback


class LossBar(ProgressCallback):
    """transformers' bar with the newest losses in it, instead of a line of numbers at every log."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: dict[str, str] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero or self.training_bar is None or logs is None:
            return
        for key in ("loss", "eval_loss"):
            if key in logs:
                self.shown[key] = f"{float(logs[key]):.3f}"
        self.training_bar.set_postfix(self.shown)
