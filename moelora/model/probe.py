"""Probe: what a base model does on a few batches, for initialisers that start experts from data.

Gradients: of W in y = W x the loss has G = sum over tokens dy x^T, so that neither W nor anything below the layer needs
a gradient. A layer's G is made when it is asked for, from one forward and one backward pass (down to the layer) per
batch, and it is the only one there: L layers and n batches cost n L passes. Inputs: one forward pass per batch serves
all layers; those that are called with one tensor (q, k, v) are looked at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from moelora.core.errors import ConfigError
from moelora.core.start import Start
from moelora.core.tape import Site, Tape, View
from moelora.init.base import Init
from moelora.model.inputs import masks_of, two_streams
from moelora.model.layer import RoutedLinear
from moelora.model.quantised import form
from moelora.model.record import main_process
from moelora.model.sources import dense_weight

Batch = Mapping[str, Any]


class Probe:
    """The base model, without experts yet, on the first ``init.batches`` of some batches.

    name: what a recipe calls the initialiser. batches: the model's own inputs, with labels where gradients are probed;
    ``task_ids`` are left out. full: the same model unquantised, where its weights are probed. elsewhere: whether the
    first process has these. Raises ConfigError where what is needed is not there, and for a model that cannot run yet.
    """

    def __init__(
        self, model: nn.Module, init: Init, name: str, batches: Iterable[Batch] | None, full: nn.Module | None
    ) -> None:
        self.model, self.init, self.name, self.full = model, init, name, full
        self.elsewhere = init.probes == "weights" and full is None and not main_process()
        self.seen: dict[str, Any] = {}
        self.batches: list[dict[str, Any]] = []
        if init.probes == "weights":
            self._check_weights()
            return
        if batches is None:
            raise ConfigError(
                f"init {name} looks at data: give moelora.adapt some batches=[...] of the model's inputs, with labels; "
                "moelora train takes them from the recipe's data"
            )
        refuse_parts(model, f"init {name}")
        self.batches = [on_device(model, batch) for batch in itertools.islice(batches, init.batches)]
        if not self.batches:
            raise ConfigError(f"init {name} looks at batches of data, and there is none in what was given")

    def look(self, layers: Mapping[str, RoutedLinear]) -> None:
        """See what has to be seen of all layers at once."""
        if self.init.probes == "inputs":
            self.seen = self._inputs(layers)

    def start(self, layer: RoutedLinear, weight: Callable[[], Tensor]) -> Start:
        """What a layer's experts may start from. weight: of its base layer."""
        site = layer.site
        if self.init.probes == "inputs":
            return Start(weight, seen=self.seen[site.name])
        if self.init.probes == "gradients":
            return Start(weight, gradient=lambda: self._gradient(layer.base_layer, site))
        assert self.full is not None
        before = self.full.get_submodule(site.name)
        return Start(weight, full=lambda: dense_weight(before).clone())

    def _check_weights(self) -> None:
        if not any(form(p) is not None for p in self.model.parameters()):
            raise ConfigError(
                f"init {self.name} makes up for what quantising has lost, and this base is not quantised; add "
                "quantization_config to the recipe, or take another init"
            )
        if self.elsewhere:
            return
        if self.full is None or any(form(p) is not None for p in self.full.parameters()):
            found = "nothing" if self.full is None else "a quantised model (its own checkpoint is)"
            raise ConfigError(
                f"init {self.name} compares the base with what it was: give moelora.adapt the unquantised model, "
                f"full=...; found {found}"
            )

    def _gradient(self, base_layer: nn.Module, site: Site) -> Tensor:
        """G [O, D], the mean over the batches of the gradient of their loss; float32 at least."""
        total: Tensor | None = None

        def watch(_: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
            x = args[0].detach().reshape(-1, site.in_features)

            def add(dy: Tensor) -> None:
                nonlocal total
                wide = torch.promote_types(dy.dtype, torch.float32)
                found = dy.reshape(-1, site.out_features).to(wide).t() @ x.to(wide)
                total = found if total is None else total.add_(found)

            if y.requires_grad:  # called before in this pass
                y.register_hook(add)
                return y
            start = y.detach().requires_grad_()
            start.register_hook(add)
            return start.clone()  # a model may change it in place

        hook = base_layer.register_forward_hook(watch)
        try:
            with frozen(self.model), torch.enable_grad():
                for batch in self.batches:
                    loss = getattr(self.model(**batch), "loss", None)
                    if loss is None:
                        raise ConfigError(f"init {self.name} probes gradients, and the batches have no labels")
                    if loss.requires_grad:
                        loss.backward()
        finally:
            hook.remove()
        if total is None or not torch.isfinite(total).all() or not total.any():
            raise ConfigError(
                f"init {self.name}: the loss of the probed batches has no finite gradient other than zero at "
                f"'{site.name}'; leave the layer out (exclude_modules), or look at the batches"
            )
        return total.div_(len(self.batches))

    def _inputs(self, layers: Mapping[str, RoutedLinear]) -> dict[str, Any]:
        """What the initialiser keeps of each layer's inputs, by path."""
        kept = {name: self.init.watch(layer.experts) for name, layer in layers.items()}
        first: dict[str, str] = {}  # who is called with the same tensor, or the layer itself
        wanting, last = set(layers), ("", torch.empty(0))
        tape = Tape()

        def watch(layer: RoutedLinear, x: Tensor) -> None:
            nonlocal last
            name = layer.site.name
            same = last[1] is x and layers[last[0]].experts.num_experts == layer.experts.num_experts
            if first.setdefault(name, last[0] if same else name) != name:
                wanting.discard(name)
                return
            last = (name, x)
            if name in wanting and not kept[name][1](self._tokens(x, tape.view(layer.site, x.shape[:-1]))):
                wanting.discard(name)

        hooks = [
            layer.base_layer.register_forward_pre_hook(lambda _, args, layer=layer: watch(layer, args[0]))
            for layer in layers.values()
        ]
        try:
            with frozen(self.model), torch.no_grad():
                for batch in tqdm(self.batches, desc="Probing inputs", leave=False, disable=len(self.batches) < 4):
                    tape = self._tape(batch)
                    self.model(**batch)
                    if not wanting:
                        break
        finally:
            for hook in hooks:
                hook.remove()
        return {name: kept[first.get(name, name)][0] for name in layers}

    def _tape(self, batch: Batch) -> Tape:
        """Which tokens are real, and which are answers."""
        labels, stream = batch.get("labels"), "decoder" if two_streams(self.model) else "input"
        answers = {stream: labels.ne(-100)} if isinstance(labels, Tensor) and labels.dim() == 2 else {}
        return Tape(mask=masks_of(dict(batch)), answers=answers)

    def _tokens(self, x: Tensor, view: View) -> Tensor:
        """[T, D] the tokens that count."""
        flat = x.reshape(-1, x.shape[-1])
        kept = flat.new_ones(len(flat), dtype=torch.bool) if view.mask is None else view.mask
        if self.init.tokens == "answers" and view.answers is not None:
            kept = kept & view.answers
        return flat[kept]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Without dropout, and without a gradient of any parameter."""
    modes = {module: module.training for module in model.modules()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, mode in modes.items():
            module.training = mode


def refuse_parts(model: nn.Module, what: str) -> None:
    """Raise ConfigError for a model that cannot run before training begins."""
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        raise ConfigError(
            f"{what} runs the base model before training begins, and ZeRO-3 has taken its weights apart; use "
            f"deepspeed: zero2, or other {what.partition(' ')[0]}"
        )


def on_device(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """A batch where the model is, without task ids, which the model itself does not take."""
    device = next(model.parameters()).device
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items() if k != "task_ids"}


@torch.no_grad()
def share(layers: Iterable[RoutedLinear]) -> None:
    """Give all processes of a run the experts of the first: a decomposition may come out with other signs elsewhere."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    nccl = torch.distributed.get_backend() == "nccl"
    for layer in layers:
        for value in layer.experts.state_dict().values():
            sent = value.cuda() if nccl else value.cpu()
            torch.distributed.broadcast(sent, 0)
            value.copy_(sent)
