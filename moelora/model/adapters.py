"""Adapters become experts: layer after layer read, stacked, and proven to compute what they did alone."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from moelora.core.errors import AdapterError
from moelora.core.route import Route
from moelora.experts.base import Experts
from moelora.experts.core import joint_core_space
from moelora.io.peft import LoRATensors, warn_if_untrained
from moelora.model.config import AdapterConfig
from moelora.model.layer import RoutedLinear
from moelora.model.record import main_process
from moelora.model.saved import find_saved
from moelora.model.sources import Source, bias_of, check_fit, dense_weight
from moelora.routers.single import Single

EXACT, ROUNDED = 1e-12, 1e-6
"""Largest difference that a proof lets pass at any output, relative to the sum of its absolute terms.

The second is for terms with what is kept of DoRA and of biases, in float32. All is computed in float64.
"""


def is_lora(experts: Experts) -> bool:
    """Whether every expert is a LoRA of its own."""
    own = {name for name, _ in experts.named_parameters()} == {"lora_A", "lora_B"} and "own_A" in experts.gives
    return own and experts.stored


@torch.no_grad()
def fill_experts(
    model: nn.Module, layers: Mapping[str, RoutedLinear], sources: Sequence[Source], config: AdapterConfig
) -> None:
    """Give the layers the experts of ``sources``, one each, and prove each of them.

    LoRA experts keep their own rank (filled up with zeros, which is exact), scale, and what they have beside A and B.
    Frozen ones keep the dtype of the files, where that is one. Core experts take any rank; a core space too small for
    all is said in a warning. Everything is checked before a tensor is read, and no more than one layer of all adapters
    is in memory besides the experts. Raises AdapterError.
    """
    for path, layer in layers.items():
        beyond = sources[layer.experts.num_experts :]
        if isinstance(layer.router, Single) and config.router["name"] != "single":
            _check_plain(path, sources, config)
        elif len(sources) < layer.experts.num_experts or any(path in source.adapter.modules for source in beyond):
            raise AdapterError(
                f"experts.adapters: {len(sources)} experts in {', '.join(str(s.folder) for s in sources)}, but "
                f"num_experts is {layer.experts.num_experts} at '{path}'"
            )
    where = [str(source.folder.resolve()) for source in sources]
    if config.experts.train == "none" and config.experts.adapters and len({*where}) < len(where):
        twice = next(folder for folder in where if where.count(folder) > 1)
        raise AdapterError(f"experts.adapters: {twice} twice, and frozen experts that are the same have no use")
    for source in sources:
        check_fit(source, model, {path: layer.site for path, layer in layers.items()})
        if source.base is None:
            warn_if_untrained(source.adapter)
    _check_kind(next(iter(layers.values())).experts, layers, sources, config)
    errors: dict[str, float] = {}
    for path, layer in tqdm(layers.items(), "Reading experts", delay=2, leave=False, disable=not main_process()):
        loras = [source.read(path, layer.base_layer) for source in sources[: layer.experts.num_experts]]
        if is_lora(layer.experts):
            loras = [replace(lora, scale=float(torch.tensor(lora.scale, dtype=torch.float32))) for lora in loras]
            kinds = [kind for source in sources if (kind := source.dtype(path)) is not None]
            wide = functools.reduce(torch.promote_types, kinds, kinds[0]) if kinds else None
            _stack(layer, loras, wide if config.experts.train == "none" else None)
            _prove(path, layer, loras, sources)
        else:
            errors[path] = _project(layer.experts, loras)
    for layer in layers.values():
        if is_lora(layer.experts) and config.experts.absent == "redistribute":
            block = [other for other in layers.values() if other.site.parent == layer.site.parent]
            _mark_present(layer.experts, [layer] if type(layer) is RoutedLinear else block)
    for source in sources:
        source.adapter.file.close()
    worst = max(errors, key=errors.__getitem__, default="")
    if errors.get(worst, 0) > 1e-6 and main_process():
        ranks = sum(source.rank(worst) for source in sources)
        warnings.warn(
            f"experts.adapters: a core space of rank {config.experts.r} does not hold all of these LoRAs: at '{worst}' "
            f"{100 * errors[worst]:.3g} % of them is lost (relative Frobenius norm, worst layer); r: {ranks} is exact",
            stacklevel=2,
        )


def _check_plain(path: str, sources: Sequence[Source], config: AdapterConfig) -> None:
    """The first adapter, and no other, has the LoRA of a layer that has one for all experts."""
    here = [source for source in sources if path in source.adapter.modules]
    if len(here) != 1 or here[0] is not sources[0]:
        leave = f"leave {path.rpartition('.')[2]} out of target_modules"
        raise AdapterError(
            f"experts.adapters: '{path}' has one LoRA for all experts (router '{config.router['name']}'), the first "
            f"adapter's; found one in {', '.join(str(source.folder) for source in here) or 'none'}; "
            f"{'choose a router with experts there too, such as softmax' if here else leave}"
        )


def _check_kind(
    experts: Experts, layers: Mapping[str, RoutedLinear], sources: Sequence[Source], config: AdapterConfig
) -> None:
    name, r = config.experts.name, config.experts.r
    if not is_lora(experts):
        held = {name for name, _ in experts.named_parameters()}
        if held != {"lora_A", "core", "lora_B"} or "core" not in experts.gives:
            raise AdapterError(f"experts.adapters: experts '{name}' cannot start from LoRA adapters")
    else:
        highest = max(source.rank(path) for source in sources for path in layers)
        for source in sources:
            own = max(source.rank(path) for path in layers)
            if own > r:
                what = f" ({source.adapter.moved} doubles it)" if source.adapter.moved else ""
                raise AdapterError(f"{source.folder}: rank {own}{what}, but r is {r} here; set experts.r to {highest}")
    odd = next((source for source in sources if not source.plain), None)
    if odd is None:
        return
    kinds = {"magnitude": "DoRA", "bias": "lora_bias", "base_bias": "trained biases"}
    parts = {part for module in odd.adapter.modules.values() for part in module.entries}
    what = f"{odd.folder}: {' and '.join(kind for part, kind in kinds.items() if part in parts)}"
    if name != "lora" or any(type(layer) is not RoutedLinear for layer in layers.values()):
        raise AdapterError(
            f"{what} can only be an expert of experts: lora, beside single layers; found experts: {name}"
        )
    if config.experts.train != "none":
        raise AdapterError(f"{what} can only be a frozen expert; set experts.train to none, or leave this adapter out")


def _stack(layer: RoutedLinear, loras: Sequence[LoRATensors], dtype: torch.dtype | None) -> None:
    experts, r = layer.experts, layer.experts.r
    held = dict(experts.named_parameters())
    for parameter in held.values():
        keep = parameter.dtype if dtype is None or parameter.dtype == torch.float64 else dtype
        if parameter.dtype == keep:  # in place: an optimiser or engine may hold it
            parameter.zero_()
        else:
            parameter.data = torch.zeros(parameter.shape, dtype=keep, device=parameter.device)
    stretch = torch.zeros(experts.num_experts, layer.out_features, dtype=torch.float64)
    shift = torch.zeros_like(stretch)
    for index, lora in enumerate(loras):
        own = experts.ranks[index] = lora.A.shape[0]
        ranks = slice(index * r, index * r + own)
        if own:
            held["lora_A"].data[ranks].copy_(lora.A)
            held["lora_B"].data[:, ranks].copy_(lora.B)
            experts.scale[index * r : (index + 1) * r] = lora.scale
        vectors = {"bias": lora.bias, "magnitude": lora.magnitude, "base_bias": lora.base_bias}
        experts.vectors[index] = {name: value for name, value in vectors.items() if value is not None}
        if lora.bias is not None:
            shift[index] += lora.scale * lora.bias.to(shift)
        bias = bias_of(layer.base_layer) if experts.vectors[index].keys() - {"bias"} else None
        if lora.magnitude is not None:
            changed = _changed_weight(lora, layer.base_layer)
            stretch[index] = lora.magnitude.to(changed).div(changed.norm(dim=1)).sub(1)
        if bias is not None:
            shift[index] -= stretch[index] * bias.to(shift)  # the stretch is of y without its bias
            if lora.base_bias is not None:
                shift[index] += lora.base_bias.to(shift) - bias.to(shift)
    device = held["lora_A"].device
    if min(experts.ranks) < r:
        experts.used = torch.tensor(experts.ranks, dtype=torch.int32, device=device)
    if any(experts.vectors):
        experts.shift = shift.float().to(device)
        experts.stretch = stretch.float().to(device) if bool(stretch.any()) else None


def _changed_weight(lora: LoRATensors, layer: nn.Module) -> Tensor:
    """W + s B A, [O, D], float32 at least."""
    weight = dense_weight(layer)
    return weight + lora.scale * (lora.B.to(weight) @ lora.A.to(weight))


def _mark_present(experts: Experts, routed: Sequence[RoutedLinear]) -> None:
    """routed: the layers that one route is for."""
    rows = torch.zeros(experts.num_experts, experts.r, dtype=torch.bool)
    for index, (rank, vectors) in enumerate(zip(experts.ranks, experts.vectors, strict=True)):
        own = bool(vectors) or any(layer.experts.ranks[index] for layer in routed)
        rows[index, : max(rank, own)] = True
    experts.present = None if bool(rows.all()) else rows.flatten().to(experts.scale.device)


def _prove(path: str, layer: RoutedLinear, loras: Sequence[LoRATensors], sources: Sequence[Source]) -> None:
    """Raise AdapterError unless every expert alone (gate 1, all others 0) adds to a probe what its adapter does.

    The expected values are computed in float64 from the tensors of the files, by PEFT's formulas.
    """
    experts = layer.experts if layer.experts.scale.device.type != "mps" else copy.deepcopy(layer.experts).cpu()
    device = experts.scale.device
    if device.type == "meta":
        return
    x = torch.randn(len(loras), layer.in_features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one_hot = Route(torch.eye(len(loras), dtype=x.dtype, device=device), len(loras))
    found = experts(x.to(device), lambda *_: one_hot)
    odd = any(lora.magnitude is not None for lora in loras)
    weight = dense_weight(layer.base_layer).cpu().double() if odd else None
    bias = bias_of(layer.base_layer)
    wide = torch.zeros(layer.out_features).double() if bias is None else bias.cpu().double()
    if experts.shift is not None:
        y = wide.expand(len(loras), -1) if weight is None else x @ weight.t() + wide
        found = found + cast(Tensor, experts.beside(experts.composed(), one_hot, y.to(found)))
    held = dict(experts.named_parameters())
    for index, lora in enumerate(loras):
        A, B = lora.A.to(held["lora_A"].dtype), lora.B.to(held["lora_B"].dtype)  # a float64 file may train in float32
        expected, error = alone(replace(lora, A=A, B=B), x[index], weight, wide)
        difference = (found[index].cpu() - expected).abs()
        if not (difference <= error).all():  # or not a number
            raise AdapterError(
                f"{sources[index].folder}: as expert {index} of '{path}' it does not compute what it does alone: "
                f"largest difference {float(difference.max()):.3g} at values of up to {float(expected.abs().max()):.3g}"
                "; please report this as a bug"
            )


def alone(lora: LoRATensors, x: Tensor, weight: Tensor | None, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(what an adapter alone adds to y = W x + b for x [..., D], what its proof lets pass), [..., O] in x's dtype.

    weight: W [O, D], which DoRA needs. bias: b [O].
    """
    update = x.new_zeros(*x.shape[:-1], len(bias))
    error = size = update.clone()
    A, B = lora.A.to(x), lora.B.to(x)
    if A.numel():
        update = lora.scale * (x @ A.t() @ B.t())
        size = lora.scale * (x.abs() @ A.abs().t() @ B.abs().t())
        error = EXACT * size
    if lora.magnitude is not None:
        assert weight is not None
        weight = weight.to(x)
        rows = lora.magnitude.to(x) / (weight + lora.scale * (B @ A)).norm(dim=1)
        update = rows * (x @ weight.t() + update) - x @ weight.t()
        error = ROUNDED * (1 + rows.abs()) * (size + x.abs() @ weight.abs().t() + bias.abs())
    if lora.bias is not None:
        own = lora.scale * lora.bias.to(x)
        update, error = update + own, error + ROUNDED * own.abs()
    if lora.base_bias is not None:
        own = lora.base_bias.to(x)
        update, error = update + own - bias, error + ROUNDED * (own.abs() + bias.abs())
    return update, error


def _project(experts: Experts, loras: Sequence[LoRATensors]) -> float:
    """Put LoRAs into the core space of the experts, scales into the cores; gives the relative error.

    Where the space has room left, A and the cores keep their random start there and B is zero, so nothing is added and
    everything can learn.
    """
    held = dict(experts.named_parameters())
    own, wide, out = float(experts.scale[0]), held["lora_A"].shape[1], held["lora_B"].shape[0]
    scaled = [(lora.A.reshape(-1, wide), lora.B.reshape(out, -1).double() * (lora.scale / own)) for lora in loras]
    A, core, B, error = joint_core_space(scaled, held["lora_A"].shape[0])
    into, out = A.shape[0], B.shape[1]
    held["lora_A"][:into] = A.to(held["lora_A"])
    held["lora_B"].zero_()[:, :out] = B.to(held["lora_B"])
    held["core"][:, :out] = 0
    held["core"][:, :out, :into] = core.to(held["core"])
    return error


def full_modules(model: nn.Module, sources: Sequence[Source], config: AdapterConfig) -> dict[str, Tensor]:
    """Tensors that the adapters hold of modules trained in full, by name in the model, as ``modules_from`` says.

    Tensors equal to the base model's count as none. Raises AdapterError for adapters that disagree, and for modules
    that are not listed in modules_to_save.
    """
    choice, saved = config.experts.modules_from, find_saved(model, config.modules_to_save)
    named = [*config.experts.adapters, "agree", "ignore"]
    if choice not in named:
        raise AdapterError(f"experts.modules_from: '{choice}' is none of {', '.join(named)}")
    found: dict[str, Tensor] = {}
    owners: dict[str, list[Source]] = {}
    chosen = [s for s in sources if choice == "agree" or choice in (s.entry, str(s.folder))]
    here = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    for source in chosen:
        for name, entry in source.adapter.full.items():
            base = here.get(name)
            if base is None or entry.shape != tuple(base.shape):
                raise AdapterError(
                    f"{source.folder}: it holds '{name}' {entry.shape}, which the model has "
                    f"{'not' if base is None else f'as {tuple(base.shape)}'}; load its own base model, and resize the "
                    "embeddings first if they were"
                )
            value = source.adapter.read_full(name)
            if base.device.type != "meta" and torch.equal(value, base.detach().cpu().to(value.dtype)):
                continue
            if not any(name.startswith(f"{path}.") for path in saved):
                raise AdapterError(
                    f"{source.folder}: it has trained '{name}' in full, which no gate can choose; list the module in "
                    "modules_to_save to take it for the whole model, or leave it out: experts.modules_from: ignore"
                )
            if name in found and not torch.equal(found[name], value):
                raise AdapterError(_disagree(name, owners[name][0], source))
            found[name] = value
            owners.setdefault(name, []).append(source)
    for name, own in owners.items():
        lacks = next((other for other in chosen if not any(other is source for source in own)), None)
        if lacks is not None:
            raise AdapterError(_disagree(name, own[0], lacks))
    return found


def _disagree(name: str, one: Source, other: Source) -> str:
    return (
        f"experts.adapters: {one.folder} and {other.folder} disagree on '{name}', which is trained in full and "
        f"is there once for all experts; choose one of them (experts.modules_from: '{one.entry}'), or ignore"
    )
