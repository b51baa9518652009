"""adapt: put experts and routers into a model."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from moelora.core.errors import ConfigError
from moelora.core.methods import Methods
from moelora.core.start import Start
from moelora.init.base import Init
from moelora.model.adapters import fill_experts, full_modules, is_lora
from moelora.model.config import AdapterConfig, build_init, build_losses, build_sites, resolve
from moelora.model.fellows import groups
from moelora.model.ffn import block_layers
from moelora.model.inputs import two_streams
from moelora.model.layer import RoutedLinear
from moelora.model.partition import gathered
from moelora.model.probe import Batch, Probe, share
from moelora.model.quantised import form, shape_of, size_of, steady
from moelora.model.record import Adaptation, main_process, routed_layers
from moelora.model.routed import RoutedModel, replaying
from moelora.model.saved import TrainedCopy, fill_saved, find_saved
from moelora.model.sites import batches_needed, decided, find_sites, routed_sites
from moelora.model.sources import dense_weight, open_sources, pinned, warn_of_other_bases
from moelora.ranks.base import Ranks
from moelora.routers.base import Router

Base = TypeVar("Base", bound=nn.Module)


def adapt(
    model: Base,
    config: AdapterConfig | Mapping[str, Any] | str | Path,
    *,
    plugins: Iterable[str | Path] = (),
    verbose: bool = True,
    batches: Iterable[Batch] | None = None,
    full: nn.Module | None = None,
    blank: bool = False,
) -> Base:
    """Freeze ``model``, give its target layers experts and routers, and return it: the same object, still its own
    class.

    config: an AdapterConfig, a dict, or the path of a YAML file with the same keys. plugins: files with methods of your
    own. verbose: print what was adapted. batches: the model's inputs with labels, for an ``init`` or ``targets`` that
    look at data; the first few are taken (see ``moelora.model.probe`` for the cost). full: the base unquantised, for
    ``init: loftq``; processes other than the first need none. blank: the experts are filled from a checkpoint
    afterwards, so no weight is decomposed and no batch looked at. New parameters are float32 (float64 in a float64
    model) on the device of their layer. Raises ConfigError or TargetError, and then leaves the model as it was.

        model = moelora.adapt(model, {"router": {"name": "smora", "top_k": 8}, "experts": {"r": 64}})
    """
    methods = Methods(plugins)
    resolved = resolve(config, methods)
    given = None if batches is None else list(itertools.islice(batches, batches_needed(resolved, methods)[0]))
    if not blank:
        asked, resolved = resolved.targets, decided(model, resolved, methods, given)
        if verbose and main_process() and resolved.targets != asked:
            found = {key: value for key, value in resolved.targets.items() if value != asked[key]}
            print(f"targets {asked['name']} chose {', '.join(f'{key} {value}' for key, value in found.items())}")
    sources = open_sources(resolved.experts.adapters)
    modules = full_modules(model, sources, resolved)
    init = build_init(resolved, methods)
    probe = None
    if init.probes is not None and not blank:
        probe = Probe(model, init, resolved.init["name"], given, full)

    def start(layers: dict[str, RoutedLinear]) -> None:
        if blank:
            for layer in layers.values():
                empty(layer)
        else:
            _begin_all(layers, init, probe, bool(sources))
        if sources:
            fill_experts(model, layers, sources, resolved)
        for layer in layers.values():
            layer.experts.set_anchors()
            if type(layer.router).prepare is not Router.prepare:  # of a partitioned base not all factors can be had
                layer.router.prepare(layer.experts.composed())

    record = attach(model, pinned(resolved, sources), methods, start)
    record.pins = [source.pin for source in sources]
    warn_of_other_bases(sources, model, record.fingerprint)
    fill_saved(model, modules)
    if verbose and main_process():
        print_table(model)
    return model


def attach(
    model: nn.Module, config: AdapterConfig, methods: Methods, start: Callable[[dict[str, RoutedLinear]], None]
) -> Adaptation:
    """``adapt`` with a resolved configuration. start: gives the layers, by path, all their values.

    Until ``start`` has returned the model is as it was.
    """
    if isinstance(model, RoutedModel):
        raise ConfigError("this model has experts already; start from a fresh base model")
    steady(model)  # before a layer is called
    sites, saved = find_sites(model, config, methods), find_saved(model, config.modules_to_save)
    losses = build_losses(config, methods)
    of_layers = {name: loss for name, loss in losses.items() if loss.reads == "layers"}
    router_class: type[Router] = methods.find("routers", config.router["name"])
    record = Adaptation(config, methods, sites, losses, router_class, fingerprint(model, [site.name for site in sites]))
    checkpointed = {  # turned on before the experts came
        module: replaying(cast(Any, module)._gradient_checkpointing_func, record.port)
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False) is True
    }
    _check_router(model, record)
    routed = routed_sites(config, methods, sites)
    kinds = block_layers(model, routed) if record.router.around == "ffn" else {}
    weights = [_weight(model.get_submodule(site.name)) for site in sites]
    layers: dict[str, RoutedLinear] = {}
    for site, router, experts in build_sites(config, methods, sites, [weight.device for weight in weights]):
        base_layer, kind = model.get_submodule(site.name), kinds.get(site.name, RoutedLinear)
        dtype = torch.float64 if weights[site.index].dtype == torch.float64 else torch.float32
        router, experts = router.to(dtype), experts.to(dtype)
        experts.widen(dtype)
        terms = of_layers if isinstance(router, record.router) else {}
        layer = kind(base_layer, site, experts, router, terms, record.port, config.experts.lora_dropout)
        layers[site.name] = layer.train(base_layer.training)
    start(layers)
    if record.router.around == "linear" and not two_streams(model):  # cross-attention's projections read two streams
        for paths in groups(layers):
            layers[paths[0]].fellows = tuple(layers[path].reader for path in paths)

    model.requires_grad_(False)  # the model has not been touched so far; from here on nothing can fail
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    for name in saved:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, TrainedCopy(model.get_submodule(name), record.port))
    cls = type(model)
    own: dict[str, Any] = {"__module__": cls.__module__, "__doc__": cls.__doc__}
    if getattr(model, "is_quantized", False):  # Trainer trains such a model with adapters only, and knows PEFT's alone
        own["_hf_peft_config_loaded"] = True
    model.__class__ = type(cls.__name__, (RoutedModel, cls), own)
    model.moelora = record  # type: ignore[assignment]
    for module, checkpointing in checkpointed.items():
        module._gradient_checkpointing_func = checkpointing  # type: ignore[assignment]
    return record


def _begin_all(layers: dict[str, RoutedLinear], init: Init, probe: Probe | None, filled: bool) -> None:
    """Give all experts their first values; those of all processes are the first one's where they are computed."""
    computed = init.moves or probe is not None
    if probe is not None:
        probe.look(layers)
    slow = computed and len(layers) > 16 and main_process()
    for layer in tqdm(layers.values(), desc="Starting experts", leave=False, disable=not slow):
        if probe is not None and probe.elsewhere:
            empty(layer)
        else:
            begin(layer, init, probe, filled and is_lora(layer.experts))
    if _planned(layers) or computed:
        share(layers.values())


@torch.no_grad()
def empty(layer: RoutedLinear) -> None:
    """Zero all that a layer's experts have."""
    for value in layer.experts.state_dict().values():
        value.zero_()


@torch.no_grad()
def begin(layer: RoutedLinear, init: Init, probe: Probe | None = None, filled: bool = False) -> None:
    """Give a layer's experts their first values. filled: their factors come from elsewhere."""
    base: Any = layer.base_layer

    def weight() -> Tensor:
        with gathered([base.weight]):
            return dense_weight(base).clone()

    start = Start(weight) if probe is None else probe.start(layer, weight)
    if layer.experts.allocator is not None:
        layer.experts.allocator.begin(start)
    layer.experts.begin(start)
    if not filled:
        init(layer.experts, start)
        layer.experts.set_start()
    if layer.experts.allocator is not None:
        layer.experts.allocator.fill(layer.experts)


@torch.no_grad()
def _planned(layers: Mapping[str, RoutedLinear]) -> bool:
    """Let allocators share out ranks over all layers, and say whether they do."""
    allocators = [layer.experts.allocator for layer in layers.values()]
    plans = allocators[0] is not None and type(allocators[0]).plan is not Ranks.plan
    if plans:
        allocators[0].plan(allocators)
    return plans


def _check_router(model: nn.Module, record: Adaptation) -> None:
    """Raise ConfigError for a router that cannot serve this kind of model."""
    name, router = record.config.router["name"], record.router
    if router.reads != "hidden":
        return
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ConfigError(f"routers.{name} reads the last hidden state of one stream; {type(model).__name__} has two")
    if not hasattr(model, "base_model"):
        raise ConfigError(
            f"routers.{name} reads the last hidden state of a transformers model, not {type(model).__name__}"
        )


def fingerprint(model: nn.Module, names: list[str]) -> str | None:
    """A hash of the base weights under the adapter: shapes of all, values of the first and the last layer.

    Values are sampled and rounded to bfloat16, so the same checkpoint loaded in another dtype agrees. None when weights
    are not there to read (meta device). Of weights partitioned by ZeRO-3, two layers are gathered.

    Quantised weights are rounded in another way by every device. There the values are those of all that is not
    quantised, up to the last layer (embeddings, norms), and the hash stands behind a form: ``nf4:...``.
    """
    digest = hashlib.sha256()
    weights = [_weight(model.get_submodule(name)) for name in names]
    for name, weight in zip(names, weights, strict=True):
        digest.update(f"{name}:{shape_of(weight)};".encode())
    forms = sorted({found for weight in weights if (found := form(weight)) is not None})
    for weight in _unquantised(model, weights[-1]) if forms else (weights[0], weights[-1]):
        with gathered([weight]):
            if weight.device.type == "meta" or weight.numel() == 0:
                return None
            flat = weight.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // 256)].cpu().to(torch.bfloat16)
            digest.update(sample.view(torch.int16).numpy().tobytes())
    return ":".join(["+".join(forms)] * bool(forms) + [digest.hexdigest()[:32]])


def _unquantised(model: nn.Module, last: Tensor) -> list[Tensor]:
    before = itertools.takewhile(lambda weight: weight is not last, model.parameters())
    return [weight for weight in before if form(weight) is None]


def _weight(layer: nn.Module) -> Tensor:
    return cast(Tensor, layer.weight)


def print_table(model: nn.Module) -> None:
    """One row per kind of adapted layer, and the trainable share of the whole."""
    from rich.console import Console
    from rich.table import Table

    kinds: dict[tuple[str, int, int], list[RoutedLinear]] = {}
    for layer in routed_layers(model):
        kinds.setdefault((layer.site.name.rsplit(".", 1)[-1], layer.in_features, layer.out_features), []).append(layer)
    counted: set[int] = set()
    table = Table("target", "layers", "in -> out", "experts", "router", "trainable")
    for (name, wide, out), layers in kinds.items():
        experts, router = layers[0].experts, layers[0].router
        own = {id(p): p.numel() for layer in layers for p in layer.parameters() if p.requires_grad}
        trainable = sum(size for p, size in own.items() if p not in counted)  # a shared router counts where it is first
        counted.update(own)
        counts = sorted({layer.experts.num_experts for layer in layers})
        size = f"{'-'.join(map(str, {counts[0]: 0, counts[-1]: 0}))} x r={experts.r}"
        table.add_row(name, str(len(layers)), f"{wide} -> {out}", size, type(router).__name__, f"{trainable:,}")
    trainable, total = parameter_counts(model)
    table.caption = f"trainable {trainable:,} of {total:,} parameters ({100 * trainable / total:.2f} %)"
    Console().print(table)


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) parameters; shards of a partitioned model and packed weights count in full."""
    sizes = [(size_of(p), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)
