"""What an adapted model does beyond its base class.

``adapt`` gives the model instance a subclass of its own class with a few methods overridden, as torch's ``fully_shard``
does. ``isinstance`` holds, ``forward`` and its signature are untouched, so trainers, ``generate`` and pipelines see the
transformers model they know.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.checkpoint import checkpoint

from moelora.core.errors import MoeloraError
from moelora.core.route import Route
from moelora.core.tape import Collector, Port, Tape, View
from moelora.core.term import Product, settled
from moelora.model.cache import accompany, companion_of
from moelora.model.inputs import answers_of, masks_of, token_share, two_streams
from moelora.model.outputs import LABELS, output_terms
from moelora.model.partition import wholes
from moelora.model.plan import last_hidden
from moelora.model.record import Adaptation, adaptation, routed_layers
from moelora.model.write import adapter_tensors, upload, write
from moelora.routers.base import Router


class RoutedModel(nn.Module):
    """The methods that make a model with experts."""

    moelora: Adaptation

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's call inside a tape. Takes ``task_ids`` [B] or [B, S] besides the model's own arguments.

        While training, the weighted auxiliary terms are part of the returned loss. A router that reads hidden states is
        planned first, from a pass of the base model without gradients.
        """
        task_ids = kwargs.pop("task_ids", None)
        port = self.moelora.port
        if not port.enabled:
            return super().__call__(*args, **kwargs)
        given = (
            {**dict(zip(inspect.signature(self.forward).parameters, args, strict=False)), **kwargs} if args else kwargs
        )
        collector = port.collectors[-1] if port.collectors else None
        training = self.training and torch.is_grad_enabled()
        tape = Tape(
            mask=masks_of(given),
            answers=answers_of(self, given),
            task=task_ids,
            positions=given.get("position_ids"),
            with_terms=training or (collector is not None and collector.with_terms),
            observer=None if collector is None else collector.observer,
        )
        router = self.moelora.router
        plans = router.reads == "hidden"
        companion = companion_of(given, plans) if router.remembers or plans else None
        if companion is not None:
            tape.past = companion.memory
            if plans:
                with disabled(self):
                    hidden = last_hidden(self, given, companion)
                first: Any = self.get_submodule(self.moelora.sites[0].name)
                with torch.autocast(hidden.device.type, enabled=False):  # routing stays in float32
                    tape.plan = first.router.plan(hidden)
        with port.on(tape):
            out = super().__call__(*args, **kwargs)
        _refuse_bypassed(self, tape)
        if tape.with_terms:
            self._add_output_terms(tape, out, given)
        if companion is not None:
            companion.memory = {**tape.past, **_continued(self, tape.kept)}
            accompany(out, given, companion)
        if training and tape.load:
            self._keep_load(tape.load)
        terms = _means(tape.terms, training)
        if training:
            _refuse_lost_terms(self, terms)
        tape.terms.clear()  # a checkpointed graph holds the tape: it must not hold the graph, or neither is ever freed
        if collector is not None:
            collector.terms.append(terms)
            return out
        return self._with_terms(out, terms, given) if training else out

    def _add_output_terms(self, tape: Tape, out: Any, given: dict[str, Any]) -> None:
        def base() -> Any:
            with disabled(self):
                return self(**{key: value for key, value in given.items() if two or key not in LABELS})

        two = two_streams(self)
        stream = "decoder" if two else "input"  # decoders read what labels say
        terms = output_terms(self.moelora.losses, tape, stream, out, base)
        tape.terms.update({name: [term] for name, term in terms.items()})

    def _with_terms(self, out: Any, terms: dict[str, Tensor], given: dict[str, Any]) -> Any:
        total = weighted_sum(self, terms)
        if total is None:
            return out
        loss = out[0] if isinstance(out, tuple) and given.get("labels") is not None else getattr(out, "loss", None)
        if loss is None or given.get("fused_lm_head"):
            raise MoeloraError(
                f"the auxiliary losses ({', '.join(self.moelora.losses)}) would be dropped: the caller takes its loss "
                "from the logits or hidden states, not from the model. With TRL, use moelora.MoeLoraTrainer in "
                "place of SFTTrainer; in a loop of your own, pass labels to the model, or call it inside "
                "moelora.collect(model) and add the terms yourself"
            )
        loss = loss + total * token_share(self, given)
        if isinstance(out, tuple):
            return (loss, *out[1:])
        out["loss"] = loss
        return out

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **kwargs: Any
    ) -> None:
        """Both spellings of the switch come through here; see ``replaying``."""
        func = replaying(gradient_checkpointing_func, self.moelora.port) if enable else gradient_checkpointing_func
        super()._set_gradient_checkpointing(enable=enable, gradient_checkpointing_func=func, **kwargs)  # type: ignore[misc]

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """``generate`` takes ``task_ids`` too."""
        super()._validate_model_kwargs({k: v for k, v in model_kwargs.items() if k != "task_ids"})  # type: ignore[misc]

    def _prepare_text_encoder_decoder_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        with self._encoding(kwargs.get("model_kwargs") or args[1]):
            return super()._prepare_text_encoder_decoder_kwargs_for_generation(*args, **kwargs)  # type: ignore[misc]

    def _prepare_encoder_decoder_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        with self._encoding(kwargs.get("model_kwargs") or args[1]):  # its name before transformers 5.20
            return super()._prepare_encoder_decoder_kwargs_for_generation(*args, **kwargs)  # type: ignore[misc]

    @contextmanager
    def _encoding(self, given: dict[str, Any]) -> Iterator[None]:
        """``generate`` runs an encoder by itself before the first step: inside a tape of its own."""
        port = self.moelora.port
        observer = port.collectors[-1].observer if port.collectors else None
        with port.on(Tape(mask=masks_of(given), task=given.get("task_ids"), observer=observer)):
            yield

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **_: Any,
    ) -> None:
        """Write the adapter (not the base model) to a folder; ``moelora.load`` reads it.

        Options of the base class about shards and formats have no meaning here. Called by all processes of a run; the
        first one writes. Raises MoeloraError for push_to_hub.
        """
        if push_to_hub:
            raise MoeloraError("save_pretrained(push_to_hub=True): save first, then model.push_to_hub(REPO) uploads it")
        state = wholes(adapter_tensors(self), is_main_process) if state_dict is None else state_dict
        if is_main_process:
            write(self, Path(save_directory), state)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the adapter (not the base model), with its model card; gives the address of the commit.

        options: private, token, revision, create_pr, commit_message and commit_description, as the base class has them.
        Raises OutputError when the hub refuses.
        """
        return upload(self, repo_id, **options)

    def _keep_load(self, load: dict[int, Tensor]) -> None:
        kept = self.moelora.port.load
        for index, counts in load.items():
            kept[index] = kept[index] + counts if index in kept else counts
        watched = self.moelora.watched
        if watched is None or watched() is not self:  # a deep copy carries the original's reference
            self.moelora.watched = _watch_optimizers(self)


def replaying(checkpointing: Callable[..., Any], port: Port) -> Callable[..., Any]:
    """A checkpointing function whose recomputed regions replay their tape. Raises MoeloraError for a reentrant one."""
    asked = getattr(checkpointing, "keywords", {})
    if asked.get("use_reentrant"):
        raise MoeloraError(
            "gradient checkpointing with use_reentrant=True gives a routed model wrong gradients (auxiliary terms of "
            "the first pass have no graph); leave it out or pass {'use_reentrant': False}"
        )
    contexts = _both(asked.get("context_fn"), port.contexts)
    return functools.partial(checkpointing, use_reentrant=False, context_fn=contexts)


def weighted_sum(model: RoutedModel, terms: dict[str, Tensor]) -> Tensor | None:
    """The auxiliary terms times their weights, or None when no term has one."""
    losses = model.moelora.losses
    weighted = [losses[name].weight * value for name, value in terms.items() if losses[name].weight]
    return torch.stack(weighted).sum() if weighted else None


def after_step(model: RoutedModel) -> None:
    """Hand every router and allocator the load counted since the last optimiser step, over processes. Idempotent.

    Called by itself after each step of a torch optimiser that holds parameters of the model.
    """
    kept = model.moelora.port.load
    if not kept:
        return
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        flat = torch.cat([kept[index] for index in sorted(kept)])
        torch.distributed.all_reduce(flat)
        sizes = [len(kept[index]) for index in sorted(kept)]
        kept.update(zip(sorted(kept), flat.split(sizes), strict=True))
    loads: dict[Router, Tensor] = {}  # a router may serve several layers
    blocks = {model.moelora.sites[index].parent: load for index, load in kept.items()}  # one route for a whole block
    for layer in routed_layers(model):
        if layer.experts.allocator is not None and layer.experts.allocator.counts:
            load = kept.get(layer.site.index, blocks.get(layer.site.parent))
            if load is not None:
                layer.experts.allocator.count(load.to(layer.experts.scale.device))
        if layer.site.index in kept:
            load, router = kept[layer.site.index], layer.router
            loads[router] = loads[router] + load.to(loads[router].device) if router in loads else load
    for router, load in loads.items():
        router.after_step(load)
    kept.clear()


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """The base model, bit for bit, for as long as the context lasts."""
    port = adaptation(model).port
    before, port.enabled = port.enabled, False
    try:
        yield model
    finally:
        port.enabled = before


@contextmanager
def collect(
    model: nn.Module, observer: Callable[[View, Route], None] | None = None, with_terms: bool = True
) -> Iterator[Collector]:
    """Take the auxiliary terms of the forwards inside: they are listed in ``.terms`` and not added to any loss.

    observer: called with the (View, Route) of every routed layer, for statistics. with_terms: compute the terms outside
    of training too.
    """
    collectors = adaptation(model).port.collectors
    collectors.append(Collector(observer, with_terms))
    try:
        yield collectors[-1]
    finally:
        collectors.pop()


def _means(terms: dict[str, list[Tensor | Product]], training: bool) -> dict[str, Tensor]:
    """Every term's mean over the layers; what is about all processes' tokens is reduced for all of them at once."""
    together = training and torch.distributed.is_available() and torch.distributed.is_initialized()
    values = iter(settled([value for of_layers in terms.values() for value in of_layers], together))
    return {name: _mean([next(values) for _ in of_layers]) for name, of_layers in terms.items()}


def _mean(values: list[Tensor]) -> Tensor:
    wide = [value.to(torch.promote_types(value.dtype, torch.float32)) for value in values]
    first = wide[0].device
    return torch.stack([value.to(first) for value in wide]).mean()


def _continued(model: RoutedModel, kept: dict[int, Tensor]) -> dict[int, Tensor]:
    """What was kept of tokens that others follow in a cache: not an encoder's, which starts anew each time."""
    two, sites = two_streams(model), model.moelora.sites
    return {index: value for index, value in kept.items() if not two or sites[index].stream == "decoder"}


def _refuse_bypassed(model: RoutedModel, tape: Tape) -> None:
    """Raise MoeloraError when a layer's weight was used and the layer itself never called: its experts had no say."""
    bypassed = sorted(tape.read - tape.called)
    if bypassed:
        names = [model.moelora.sites[index].name for index in bypassed]
        raise MoeloraError(
            f"the model reads the weight of '{names[0]}' without calling the layer ({len(names)} such layers), so "
            f"experts there have no effect; leave them out: exclude_modules: [{names[0].rpartition('.')[2]}]"
        )


def _refuse_lost_terms(model: RoutedModel, terms: dict[str, Tensor]) -> None:
    """Raise MoeloraError for a term without a weight, or a weight without a term."""
    losses = model.moelora.losses
    for name in sorted(terms.keys() - losses.keys()):
        raise MoeloraError(f"the auxiliary term '{name}' is recorded, but has no weight; add losses: {{{name}: ...}}")
    for name in sorted(losses.keys() - terms.keys()):
        raise MoeloraError(
            f"losses.{name} has a weight, but no adapted layer of this model took part in the forward, so there is no "
            "such term; check target_modules against what the model calls"
        )


def _both(outer: Callable[[], Any] | None, inner: Callable[[], Any]) -> Callable[[], Any]:
    """One context_fn from two."""
    if outer is None:
        return inner

    @contextmanager
    def nest(one: Any, two: Any) -> Iterator[None]:
        with one, two:
            yield

    return lambda: tuple(nest(one, two) for one, two in zip(outer(), inner(), strict=True))


def _watch_optimizers(model: RoutedModel) -> weakref.ref[nn.Module]:
    """Run ``after_step`` after every torch optimiser step on this model's parameters, in any trainer or loop."""
    watched: weakref.ref[nn.Module] = weakref.ref(model)

    def stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        alive = watched()
        if alive is None:  # the hook of a model long gone: torch walks its hooks, so none may be removed here
            return
        own = {id(p) for p in alive.parameters() if p.requires_grad}
        if any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            after_step(alive)  # type: ignore[arg-type]

    register_optimizer_step_post_hook(stepped)
    return watched
