"""What adapters hold, which of them can be experts of one model, and whether each computes there what it did alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moelora.core.errors import AdapterError, MoeloraError
from moelora.core.tape import Site
from moelora.model.adapt import adapt
from moelora.model.adapters import alone
from moelora.model.record import routed_layers
from moelora.model.routed import disabled
from moelora.model.sources import Source, bias_of, check_fit, dense_weight, open_sources
from moelora.targets.base import describe

PROBE = 8
"""Tokens of the probe input."""
TOLERANCE = 1e-4
"""Largest difference between logits that counts as equal, relative to the largest change that the adapter makes."""


def inspect_adapters(entries: Iterable[str | Path], base: nn.Module | None = None) -> dict[str, Any]:
    """What ``moelora inspect`` shows, JSON-ready. Every tensor is read, one adapter at a time.

    adapters: one entry each; a folder that moelora wrote counts as the experts in it. adapter, base_model, ranks,
        alphas, scales, targets (endings of module names), modules, parameters, bytes, dtypes, kinds (what it is beside
        LoRA), norm (Frobenius norm of all updates scale B A together), zero (modules whose update is zero), group
        (number of its group), and error: why it cannot be an expert, in place of the figures.
    groups: adapters that can be experts of one model, each with the ``experts`` and ``target_modules`` of a recipe.

    With a base model each adapter that fits it has ``difference``, too: between the logits of the mixture with that
    expert alone and those of the base with that adapter, largest over a short probe, relative to the largest change of
    a logit. One that does not fit, or differs by more than 1e-4, has an ``error``. The model is adapted by that.
    """
    found: list[tuple[dict[str, Any], Source | None]] = []
    for entry in entries:
        try:
            found += [(_figures(source), source) for source in open_sources([entry])]
        except AdapterError as error:
            found.append(({"adapter": str(entry), "error": str(error)}, None))
    good = [(entry, source) for entry, source in found if source is not None]
    if base is not None:
        _compare_alone(good, base)
        good = [(entry, source) for entry, source in good if entry["error"] is None]
    return {"adapters": [entry for entry, _ in found], "groups": _groups(good)}


def _figures(source: Source) -> dict[str, Any]:
    adapter, kinds = source.adapter, {"magnitude": "DoRA", "bias": "lora_bias", "base_bias": "bias"}
    modules = {path: module for path, module in adapter.modules.items() if module.rank}
    squares = []
    for path in modules:
        lora = adapter.read(path)
        squares.append(_square(lora.A.double(), lora.B.double()) * lora.scale**2)
    entries = [entry for module in adapter.modules.values() for entry in module.entries.values()]
    parts = {part for module in adapter.modules.values() for part in module.entries}
    root = adapter.config.get("use_rslora", False)
    several = source.entry != str(source.folder) and source.located is None
    return {
        "adapter": str(source.folder) if several else source.entry,
        "error": None,
        "group": None,
        "base_model": adapter.base_model or (source.base.model if source.base else None),
        "ranks": sorted({source.rank(path) for path in modules}),
        "alphas": sorted({round(m.scale * (m.rank**0.5 if root else m.rank), 6) for m in modules.values()}),
        "scales": sorted({round(module.scale, 6) for module in modules.values()}),
        "targets": dict(Counter(path.rpartition(".")[2] for path in modules)),
        "modules": len(modules),
        "parameters": sum(torch.Size(entry.shape).numel() for entry in entries),
        "bytes": sum(entry.end - entry.begin for entry in [*entries, *adapter.full.values()]),
        "dtypes": sorted({str(entry.dtype).removeprefix("torch.") for entry in entries}),
        "kinds": [
            *(kind for part, kind in kinds.items() if part in parts),
            *([adapter.moved] if adapter.moved else []),
            *(["modules_to_save"] if adapter.full else []),
        ],
        "norm": sum(squares) ** 0.5,
        "zero": sum(square == 0 for square in squares),
    }


def _square(A: Tensor, B: Tensor) -> float:
    """Squared Frobenius norm of B A, from r x r products alone."""
    return max(0.0, float(((B.t() @ B) * (A @ A.t())).sum()))


def _groups(good: Sequence[tuple[dict[str, Any], Source]]) -> list[dict[str, Any]]:
    """Adapters go together if they name one base model, and lie in one list of blocks with layers of equal shape."""
    groups: list[list[tuple[dict[str, Any], Source]]] = []
    for entry, source in good:
        group = next((group for group in groups if all(_agree(source, other) for _, other in group)), None)
        if group is None:
            groups.append(group := [])
        group.append((entry, source))
        entry["group"] = groups.index(group)
    return [_recipe(group) for group in groups]


def _agree(one: Source, other: Source) -> bool:
    names = [source.adapter.base_model for source in (one, other)]
    if None not in names and len({str(name).rstrip("/").rpartition("/")[2].lower() for name in names}) > 1:
        return False
    ours, theirs = one.adapter.modules, other.adapter.modules
    if not {re.split(r"\.\d+\.", path)[0] for path in ours} & {re.split(r"\.\d+\.", path)[0] for path in theirs}:
        return False
    return all(ours[path].features == theirs[path].features for path in ours.keys() & theirs.keys())


def _recipe(group: Sequence[tuple[dict[str, Any], Source]]) -> dict[str, Any]:
    """What an ``adapter:`` section needs to mix a group."""
    entries = list(dict.fromkeys(source.entry for _, source in group))
    paths = sorted({path for _, source in group for path in source.adapter.modules})
    highest = max((rank for entry, _ in group for rank in entry["ranks"]), default=1)
    experts = {"train": "none", "num_experts": len(group), "r": highest, "adapters": entries}
    return {"experts": experts, "target_modules": sorted({path.rpartition(".")[2] for path in paths}), "layers": paths}


@torch.no_grad()
def _compare_alone(good: Sequence[tuple[dict[str, Any], Source]], base: nn.Module) -> None:
    """Mix all adapters that fit, and compare the model with each expert alone to the base with that adapter."""
    fitting = []
    for entry, source in good:
        try:
            check_fit(source, base, _own_sites(source, base))
            fitting.append((entry, source))
        except MoeloraError as error:
            entry["error"] = str(error)
    if not fitting:
        return
    recipe = _recipe(fitting)
    config = {
        "router": {"name": "static", "weights_fn": "free"},
        "experts": {
            **recipe["experts"],
            "adapters": [_address(source) for _, source in fitting],
            "modules_from": "ignore",
        },
        "target_modules": recipe["layers"],
    }
    model = adapt(base.eval(), config, verbose=False)
    layers: list[Any] = [*routed_layers(model)]
    with disabled(model):
        plain = _logits(model)
    for index, (entry, source) in enumerate(fitting):
        for layer in layers:
            layer.router.theta.zero_()[index] = 1
        found = _logits(model)
        [again] = open_sources([_address(source)])
        hooks = [layer.base_layer.register_forward_hook(_adding(layer.site.name, again)) for layer in layers]
        with disabled(model):
            expected = _logits(model)
        for hook in hooks:
            hook.remove()
        change = float((expected - plain).abs().max())
        entry["difference"] = float((found - expected).abs().max()) / max(change, 1e-30) if change else 0.0
        if entry["difference"] > TOLERANCE:
            entry["error"] = (
                f"{source.folder}: as an expert alone its logits differ from the adapter's by "
                f"{entry['difference']:.2g} of the largest change it makes; please report this as a bug"
            )


def _address(source: Source) -> str:
    """What names this one adapter, also where it is one of several in its folder."""
    return source.pin.adapter if source.pin is not None else str(source.folder)


def _own_sites(source: Source, base: nn.Module) -> dict[str, Site]:
    modules = dict(base.named_modules())
    paths = [path for path, module in source.adapter.modules.items() if path in modules and module.rank]
    return {site.name: site for site in describe(base, paths)}


def _adding(path: str, source: Source) -> Callable[..., Tensor]:
    """A hook that adds to a base layer's output what an adapter does, straight from its file."""

    def hook(layer: nn.Module, args: tuple[Tensor], y: Tensor) -> Tensor:
        if path not in source.adapter.modules:
            return y
        lora, bias = source.read(path, layer), bias_of(layer)
        weight = None if lora.magnitude is None else dense_weight(layer)
        x = args[0].to(torch.promote_types(y.dtype, torch.float32))
        added, _ = alone(lora, x, weight, x.new_zeros(y.shape[-1]) if bias is None else bias.to(x))
        return (y + added).to(y.dtype)

    return hook


def _logits(model: Any) -> Tensor:
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        inputs = model.dummy_inputs
    else:
        vocabulary = model.get_input_embeddings().num_embeddings
        ids = torch.arange(3, 3 + 7 * PROBE, 7, device=model.device).unsqueeze(0) % vocabulary
        inputs = {"input_ids": ids}
        if getattr(model.config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = ids
    out = model(**inputs)
    first: Tensor = out["logits"] if "logits" in out else out[0]
    return first.double()
