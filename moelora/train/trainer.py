"""MoeLoraTrainer: TRL's SFTTrainer that knows tasks and routed models.

What it adds: task ids beside the tokens (also when packed), auxiliary losses in the loss and the logs, routing
statistics, loss per task and exact match at evaluation, adapter checkpoints. Everything else is TRL's and
transformers'.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from moelora.core.errors import DataError
from moelora.data.progress import quiet_if_small
from moelora.data.prompts import as_prompts
from moelora.eval.evaluate import exact_match, token_sums
from moelora.eval.routing import CollapseAlarm, RoutingStats
from moelora.model.inputs import token_share
from moelora.model.routed import RoutedModel, collect, weighted_sum
from moelora.optim.base import Optim
from moelora.train.durable import DurableTrainer
from moelora.train.logits import with_logits
from moelora.train.progress import LossBar


@dataclass
class TaskCollator(DataCollatorForLanguageModeling):
    """TRL's collator, carrying ``task_ids`` beside the tokens; -1 on padding."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        rows = [torch.tensor(example["task_ids"]) for example in examples]
        if self.padding_free:
            rows = [torch.cat(rows)]
        task_ids = torch.full(batch["input_ids"].shape, -1, dtype=torch.long)
        for row, ids in zip(task_ids, rows, strict=True):
            row[: len(ids)] = ids
        return {**batch, "task_ids": task_ids}


class MoeLoraTrainer(DurableTrainer):
    """Trains an adapted model on a mixture of tasks.

    train_dataset, eval_dataset: rows with task, task_id, prompt and completion (messages or strings) or text, as
    ``moelora.data`` makes them. tasks: names, a row's task_id is the position. exact_match: tasks whose answers are
    generated and compared at evaluation. Metrics: ``eval_loss``, ``eval_<task>_loss``, ``eval_<task>_accuracy``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: SFTConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None,
        processing_class: PreTrainedTokenizerBase,
        tasks: list[str],
        exact_match: list[str] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        max_skipped_steps: int = 10,
        optim: Optim | None = None,
    ) -> None:
        self.max_skipped_steps, self.optim = max_skipped_steps, optim
        self.tasks, self.exact_match = tasks, exact_match or []
        self.eval_rows = eval_dataset
        self.routing: RoutingStats | None = None
        self.watched: RoutingStats | None = None
        self.step_tokens: Tensor | None = None
        self.alarm = CollapseAlarm()
        trained = [(p, p.data) for p in model.parameters() if p.requires_grad]
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        for parameter, value in trained:
            if parameter.dtype != value.dtype:  # TRL makes bfloat16 of what is trained beside a quantised base
                parameter.data = value.to(parameter.device)
        own: Any = self.data_collator
        self.data_collator = TaskCollator(
            pad_token_id=own.pad_token_id, padding_free=own.padding_free, pad_to_multiple_of=own.pad_to_multiple_of
        )
        shows_progress = not args.disable_tqdm
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        if shows_progress:
            self.add_callback(LossBar())

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        if "task_ids" not in columns:
            columns.append("task_ids")

    def _prepare_dataset(
        self,
        dataset: Dataset,
        processing_class: Any,
        args: SFTConfig,
        packing: bool,
        formatting_func: Callable[..., Any] | None,
        dataset_name: str,
    ) -> Dataset:
        """TRL's preparation of each kind of row, then task ids per token, then packing."""
        with quiet_if_small(len(dataset)):
            return self._with_tasks(dataset, processing_class, args, packing, formatting_func, dataset_name)

    def _with_tasks(
        self, dataset: Dataset, processing_class: Any, args: SFTConfig, packing: bool, *rest: Any
    ) -> Dataset:
        if "task_ids" in dataset.column_names:
            return dataset
        missing = [name for name in ("task_id", "prompt", "completion", "text") if name not in dataset.column_names]
        if missing:
            raise DataError(
                f"MoeLoraTrainer: the dataset has columns {dataset.column_names} and lacks {missing}; make it with "
                "moelora.data.load.load_tasks, or add them (task_id: the task's number; text: None unless plain text)"
            )
        in_order = copy.copy(args)
        in_order.shuffle_dataset = False
        is_text = [text is not None for text in dataset["text"]]
        parts = []
        for texts, columns in ((False, ["prompt", "completion"]), (True, ["text"])):
            rows = [i for i, text in enumerate(is_text) if text == texts]
            if rows:
                part = dataset.select(rows).select_columns([*columns, "task_id"]).add_column("row", rows)
                parts.append(super()._prepare_dataset(part, processing_class, in_order, False, *rest))
                lost = len(rows) - len(parts[-1])
                if lost:
                    share = f"{lost:,} of {len(rows):,} rows of the {rest[-1]} dataset"
                    print(f"{share} have no answer left within max_length {args.max_length}, and are left out")
        prepared = concatenate_datasets(
            [part.select_columns(["input_ids", "labels", "task_id", "row"]) for part in parts]
        )
        order = prepared["row"]
        prepared = prepared.select(sorted(range(len(prepared)), key=lambda i: order[i]))
        prepared = prepared.map(
            lambda row: {"task_ids": [row["task_id"]] * len(row["input_ids"])},
            remove_columns=["task_id", "row"],
            desc="Adding task ids",
        )
        if args.shuffle_dataset:
            prepared = prepared.shuffle(seed=args.seed)
        if packing and args.max_length is not None:  # TRL has refused None
            prepared = pack_dataset(prepared, args.max_length, args.packing_strategy)
        return prepared

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss plus the weighted auxiliary terms, as shares of the batch under gradient accumulation."""
        routed = self.accelerator.unwrap_model(self.model)
        if not isinstance(routed, RoutedModel):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        watching = routed.training and self._logs_next()
        if watching and self.watched is None:
            self.watched = RoutingStats(self.tasks)
        if any(loss.reads == "logits" for loss in routed.moelora.losses.values()):
            model = with_logits(model)
        with collect(routed, self.watched if watching else None) as collector:
            loss = super().compute_loss(model, inputs, False, num_items_in_batch)
        terms = collector.terms[0] if collector.terms else {}
        total = weighted_sum(routed, self._shared(terms, routed, inputs, num_items_in_batch))
        mode = "train" if routed.training else "eval"
        if total is not None:
            loss = loss + total
        for name, value in terms.items():
            self._metrics[mode][f"aux/{name}"].append(float(value.detach()))
        if self.guard is not None and routed.training:
            self.guard.saw(loss, inputs)
        return loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """transformers' micro-batches of a step; also counts their tokens, over processes, for auxiliary means."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [_tokens(batch).to(device) for batch in batches]
        tokens = torch.stack(counts).sum(0) if counts else torch.zeros(2, dtype=torch.long, device=device)
        self.step_tokens = self._add_up(tokens) if self.args.average_tokens_across_devices else tokens
        return batches, items

    def _shared(
        self, terms: dict[str, Tensor], routed: RoutedModel, inputs: dict[str, Any], num_items: Any
    ) -> dict[str, Tensor]:
        """Terms times this micro-batch's part of the step, so that they add up to means over the global batch."""
        if num_items is None:  # the loss is a plain mean of micro-batches, and so are they
            return terms
        assert self.step_tokens is not None  # since ``get_batch_samples``, which counts ``num_items``
        all_of_them = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        every, followed = _tokens(inputs).to(self.step_tokens.device) / self.step_tokens.clamp(min=1) * all_of_them
        shares = {
            "all": every,
            "followed": followed,
            "none": 1 / self.current_gradient_accumulation_steps,
            "answers": token_share(routed, {**inputs, "num_items_in_batch": num_items}) * all_of_them,
        }
        losses = routed.moelora.losses.items()
        counted = {name: loss.of_tokens if loss.tokens == "all" else "answers" for name, loss in losses}
        return {name: value * shares[counted[name]] for name, value in terms.items()}

    def _logs_next(self) -> bool:
        """Whether the optimiser step under way is one whose numbers are logged."""
        step = self.state.global_step + 1
        return step % max(1, int(self.state.logging_steps or 1)) == 0 or (step == 1 and self.args.logging_first_step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log, with the routing of the step's tokens, and a warning when layers collapse."""
        model: Any = self.model
        if self.watched is not None and model.training:
            self.watched.reduce(self._add_up)
            logs.update({f"routing/{name}": value for name, value in self.watched.summary().items()})
            warning = self.alarm.update(self.watched)
            if warning is not None and self.is_world_process_zero():
                tqdm.write(warning, file=sys.stderr)  # above a progress bar, not through it
            self.watched = None
        super().log(logs, start_time)

    def _add_up(self, value: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor = self.accelerator.reduce(value, "sum")
        return total

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Loss and accuracy per task, and ``self.routing``: where the evaluation tokens went."""
        model = self.accelerator.unwrap_model(self.model)
        model.eval()  # and left so, as Trainer's own loop does: TRL's log tells evaluation from training by it
        batches = (self._prepare_inputs(batch) for batch in dataloader)
        if isinstance(model, RoutedModel):
            self.routing = RoutingStats(self.tasks, model.moelora.config.experts.labels)
            with collect(model, self.routing, with_terms=False), self.compute_loss_context_manager():
                sums = token_sums(self.model_wrapped, batches, self.tasks)
            self.routing.reduce(self._add_up)
        else:
            with self.compute_loss_context_manager():
                sums = token_sums(self.model_wrapped, batches, self.tasks)
        sums.sums = self._add_up(sums.sums)
        metrics = {f"{metric_key_prefix}_loss": sums.loss}
        for task, values in sums.metrics().items():
            metrics.update({f"{metric_key_prefix}_{task}_{key}": value for key, value in values.items()})
        for task, accuracy in self.generated_accuracy(model).items():
            metrics[f"{metric_key_prefix}_{task}_accuracy"] = accuracy
        if self.routing is not None:
            metrics.update({f"{metric_key_prefix}_routing/{k}": v for k, v in self.routing.summary().items()})
        nothing: Any = None  # predictions are not kept
        return EvalLoopOutput(nothing, None, metrics, len(dataloader.dataset))

    def measure(self) -> dict[str, float]:
        """``evaluate`` without logging: nothing is reported or written, also before training has begun."""
        metrics = self.evaluation_loop(self.get_eval_dataloader(), "Measuring").metrics
        assert metrics is not None
        return metrics

    def generated_accuracy(self, model: Any) -> dict[str, float]:
        """Exact match by generation, for the tasks that ask for it."""
        if self.eval_rows is None or not self.exact_match:
            return {}
        found = {}
        tokenizer: Any = self.processing_class
        names = self.eval_rows["task"]
        chat = not isinstance(self.eval_rows[0]["prompt"], str)
        for task in self.exact_match:
            rows = self.eval_rows.select([i for i, name in enumerate(names) if name == task])
            if len(rows):
                prompts = as_prompts(rows, chat=True) if chat else list(rows["prompt"])
                answers = [row[-1]["content"] for row in rows["completion"]] if chat else list(rows["completion"])
                found[task] = exact_match(model, tokenizer, prompts, answers, self.tasks.index(task))
        return found

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The adapter writes its own card."""


class Preparation(MoeLoraTrainer):
    """The trainer's way from rows to tokens and batches, without a model."""

    args: SFTConfig

    def __init__(self, tokenizer: PreTrainedTokenizerBase, arguments: SFTConfig) -> None:
        self._tokenizer, self.chat_template, self.args = tokenizer, None, arguments
        self.completion_only_loss = arguments.completion_only_loss is not False

    def batches(self, rows: Dataset, count: int, size: int) -> list[dict[str, Any]]:
        """Up to ``count`` batches of the first rows: each row for itself, however training packs them."""
        tokenizer = self._tokenizer
        rows = rows.select(range(min(len(rows), count * size)))
        prepared = self._prepare_dataset(rows, tokenizer, self.args, False, None, "train")
        collate = TaskCollator(tokenizer.convert_tokens_to_ids(self.args.pad_token or tokenizer.pad_token))
        return [
            collate(prepared.select(range(at, min(at + size, len(prepared)))).to_list())
            for at in range(0, len(prepared), size)
        ]


def _tokens(batch: dict[str, Any]) -> Tensor:
    """[2] how many tokens of a batch are not padding, and how many of these another of their sequence follows."""
    ids, mask, positions = batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids")
    count = torch.tensor(ids.numel()) if mask is None else mask.sum()
    starts = torch.tensor(len(ids)) if positions is None else (positions == 0).sum()
    return torch.stack([count, count - starts.to(count.device)])
