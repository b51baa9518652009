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

Batch = Mapping[str, Any]


class Probe:
    """The base model, without experts yet, on the first ``init.batches`` of some batches.

    name: what a recipe calls the initialiser. batches: the model's own inputs, with labels where gradients are probed;
    ``task_ids`` are left out. Raises ConfigError for a model that cannot run yet, and for no batch.
    """

    def __init__(
        self, model: nn.Module, init: Init, name: str, layers: Mapping[str, RoutedLinear], batches: Iterable[Batch]
    ) -> None:
        self.model, self.init, self.name = model, init, name
        if any(hasattr(p, "ds_id") for p in model.parameters()):
            raise ConfigError(
                f"init {name} runs the base model before training begins, and ZeRO-3 has taken its weights apart; use "
                "deepspeed: zero2, or another init"
            )
        self.batches = [_on(model, batch) for batch in itertools.islice(batches, init.batches)]
        if not self.batches:
            raise ConfigError(f"init {name} looks at batches of data, and there is none in what was given")
        self.seen = self._inputs(layers) if init.probes == "inputs" else {}

    def start(self, layer: RoutedLinear, weight: Callable[[], Tensor]) -> Start:
        """What a layer's experts may start from. weight: of its base layer."""
        if self.init.probes == "inputs":
            return Start(weight, seen=self.seen[layer.site.name])
        return Start(weight, gradient=lambda: self._gradient(layer.base_layer, layer.site))

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
            with _frozen(self.model), torch.enable_grad():
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
            with _frozen(self.model), torch.no_grad():
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
def _frozen(model: nn.Module) -> Iterator[None]:
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


def _on(model: nn.Module, batch: Batch) -> dict[str, Any]:
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
