"""Checkpoints of MeteoRA (NJUDeepEngine/meteora).

    model.safetensors    the state of the whole model; for each adapted <module>
        base_model.model.<module>.moe_gate.weight      [E, D]
        base_model.model.<module>.lora_A.weight        [E r, D]    the experts' halves, one below the other
        base_model.model.<module>.lora_B.weight        [O, E r]
        base_model.model.<module>.base_layer.weight    [O, D]      and all other weights of the base model

The experts' folders are PEFT LoRAs. Their configurations say what the checkpoint does not: rank and scale of each, in
the order of its gates. The checkpoint's own halves are used, since they may have been trained on; those of the folders
where it holds gates alone. Weights of the base model are compared with the model's, not read into it.

Nor does a checkpoint record top_k and temperature: in MeteoRA's code they are constants, 2 and 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moelora.core.errors import AdapterError
from moelora.core.tape import Site
from moelora.io.files import AGAIN, fail
from moelora.io.peft import LoRATensors, Module, PeftAdapter
from moelora.io.tensors import Entry, TensorFile
from moelora.model.sources import Source, open_sources
from moelora.tools.mixtures.base import FLOATS, Mixture, read_floats, refuse_more_than_lora, target_rule

WEIGHTS, GATE, PREFIX = "model.safetensors", ".moe_gate.weight", "base_model.model."
PICKLES = ("pytorch_model.bin", "pytorch_model_fsdp.bin", "pytorch_model_fsdp_0", "adapter_model.bin", "model.pt")
CLOSE = 0.01
"""How far the base model's weights may be from those in the checkpoint, relative norm: another dtype, no more."""
ORDER = "give the folders of the experts in the order of training: experts=[...], or --expert"


@dataclass(frozen=True, eq=False)
class _Part(PeftAdapter):
    """One expert of the checkpoint: rows of each A, columns of each B."""

    index: int = 0
    halves: Mapping[str, Mapping[str, Entry]] = field(default_factory=dict)
    load: Callable[[str], Tensor] | None = None

    def read(self, module: str) -> LoRATensors:
        assert self.load is not None
        found, both = self.modules[module], self.halves[module]
        own = slice(self.index * found.rank, (self.index + 1) * found.rank)
        return LoRATensors(self.load(both["A"].name)[own], self.load(both["B"].name)[:, own], found.scale)


def read(folder: Path, experts: Sequence[str | Path], model: nn.Module, options: Mapping[str, Any]) -> Mixture:
    """What the checkpoint holds. options: of ``routers.meteora``. Raises AdapterError."""
    with ExitStack() as stack:
        file = TensorFile(folder, WEIGHTS)
        stack.callback(file.close)
        gates, halves, base = _sort(file)
        rule = target_rule(model, set(gates), folder)
        if not experts:
            fail(file.path, "experts", "none", "rank and lora_alpha of each, which are not in the checkpoint", ORDER)
        sources = open_sources(experts)
        for source in sources:
            stack.callback(source.adapter.file.close)
            _check_plain(source.adapter, file, gates)
        given = [source.adapter for source in sources]
        rows = {entry.shape[0] for name in gates.values() if (entry := file.entries[name]).shape}
        if rows != {len(given)}:
            expected = f"{' or '.join(map(str, sorted(rows)))}, as its gates have rows"
            fail(file.path, "experts", f"{len(given)} in what was given", expected, ORDER)
        weights = {}
        for path, name in gates.items():
            width = given[0].modules[path].features[0] or 0
            why = f"{len(given)} experts given, {width} features"
            weights[path] = read_floats(file, name, (len(given), width), why)
        _check_base(file, base, list(gates), model)
        if halves:
            parts = _parts(file, halves, given)
            sources = [Source(part, source.entry) for part, source in zip(parts, sources, strict=True)]
            for adapter in given:
                adapter.file.close()
        stack.pop_all()  # the layers read the experts
    router = {"name": "meteora", "top_k": min(2, len(given)), **options}
    most = max(module.rank for adapter in given for module in adapter.modules.values())
    own = {"num_experts": len(given), "r": most, "train": "none", "adapters": [] if halves else list(map(str, experts))}
    notes = [
        f"top_k {router['top_k']}, temperature {router.get('temperature', 1)}: the checkpoint does not record them; "
        "others by router={...}, or --top-k and --temperature",
        "the experts are frozen, as in the paper; losses: {supervised_gate: 50} trains the gates as its authors did",
    ]

    def gate_of(site: Site) -> dict[str, Tensor]:
        return {"weight": weights[site.name]}

    return Mixture(folder, {"router": router, "target_modules": rule, "experts": own}, sources, gate_of, notes)


def refuse_pickles(folder: Path) -> None:
    """Raise AdapterError for a checkpoint in any form but safetensors."""
    for name in PICKLES:
        if (folder / name).exists():
            what = (
                "if you trust its origin: `accelerate merge-weights` makes model.safetensors of the shards of FSDP; or "
                "safetensors.torch.save_file(torch.load(file, map_location='cpu', weights_only=True), new)"
            )
            fail(folder / name, "format", "pickles, which can run code and are never opened", "safetensors", what)


def _sort(file: TensorFile) -> tuple[dict[str, str], dict[str, dict[str, Entry]], dict[str, Entry]]:
    """(gates and halves by module, weights of the base model by name)."""
    gates: dict[str, str] = {}
    halves: dict[str, dict[str, Entry]] = {}
    base: dict[str, Entry] = {}
    for name, entry in file.entries.items():
        if not name.startswith(PREFIX):
            fail(file.path, name, "such a name", f"one that starts with {PREFIX}", "save it as MeteoRA's PeftModel")
        path, _, part = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if part == "moe_gate":
            gates[path] = name
        elif part in ("lora_A", "lora_B"):
            halves.setdefault(path, {})[part[-1]] = entry
        else:
            base[name.removeprefix(PREFIX).replace(".base_layer.", ".")] = entry
    for path in sorted(halves.keys() ^ gates.keys()) if halves else ():
        what = "no gate" if path in halves else "no lora_A and lora_B"
        fail(file.path, f"'{path}'", what, "both, as other modules have", AGAIN)
    for path, pair in halves.items():
        if pair.keys() != {"A", "B"} or any(len(e.shape) != 2 or e.dtype not in FLOATS for e in pair.values()):
            fail(file.path, f"'{path}'", f"lora_{', lora_'.join(pair)}", "lora_A and lora_B, two sizes, floats", AGAIN)
    return gates, halves, base


def _check_plain(adapter: PeftAdapter, file: TensorFile, gates: Mapping[str, str]) -> None:
    """MeteoRA's experts are plain LoRAs for the modules that have gates."""
    refuse_more_than_lora(adapter, f"MeteoRA knows no such experts: {ORDER}")
    for path in sorted(adapter.modules.keys() ^ gates.keys()):
        has = "a LoRA, and no gate in the checkpoint" if path in adapter.modules else "no LoRA, and a gate"
        fail(adapter.folder, f"'{path}'", has, f"the modules of {file.path}", "these are not its experts")


def _parts(file: TensorFile, halves: Mapping[str, Mapping[str, Entry]], given: Sequence[PeftAdapter]) -> list[_Part]:
    """The experts in the checkpoint, ranks and scales as the folders say."""
    modules: list[dict[str, Module]] = [{} for _ in given]
    for path, pair in halves.items():
        ranks = {adapter.modules[path].rank for adapter in given}
        if len(ranks) > 1:
            what = "MeteoRA cuts them apart as if all were equal, so such a checkpoint cannot be right; train it again"
            fail(file.path, f"'{path}'", f"experts of ranks {sorted(ranks)}", "one rank", what)
        rank, wide, out = ranks.pop(), *given[0].modules[path].features
        assert wide is not None
        shapes = {"A": (len(given) * rank, wide), "B": (out, len(given) * rank)}
        for half, shape in shapes.items():
            if pair[half].shape != shape:
                why = f"{list(shape)}: {len(given)} experts of rank {rank}"
                fail(file.path, pair[half].name, f"shape {list(pair[half].shape)}", why, ORDER)
        for own, adapter in zip(modules, given, strict=True):
            a, b = pair["A"]._replace(shape=(rank, wide)), pair["B"]._replace(shape=(out, rank))
            own[path] = Module({"A": a, "B": b}, adapter.modules[path].scale)
    load = functools.lru_cache(maxsize=2)(file.read)
    parts = [
        _Part(adapter.folder, adapter.config, own, {}, file, None, index, halves, load)
        for index, (adapter, own) in enumerate(zip(given, modules, strict=True))
    ]
    _check_order(file, parts, given, min(halves))
    return parts


def _check_order(file: TensorFile, parts: Sequence[_Part], given: Sequence[PeftAdapter], path: str) -> None:
    """Raise AdapterError where an expert in the checkpoint is, value for value, another folder's than its own."""
    found = [part.read(path).A for part in parts]
    known = [adapter.read(path).A for adapter in given]
    for index, A in enumerate(found):
        same = [other for other, B in enumerate(known) if torch.equal(A, B.to(A.dtype))]
        if same and index not in same:
            said = f"{given[index].folder}, but it is {given[same[0]].folder}"
            fail(file.path, f"expert {index} of '{path}'", said, "the folder it was trained from", ORDER)


def _check_base(file: TensorFile, base: Mapping[str, Entry], paths: Sequence[str], model: nn.Module) -> None:
    """Raise AdapterError where weights of the base model in the checkpoint are not those of ``model``."""
    held = model.state_dict(keep_vars=True)
    for name, entry in base.items():
        shape = tuple(held[name].shape) if name in held else None
        if shape != entry.shape:
            found = f"shape {list(entry.shape)}"
            expected = f"{list(shape)}" if shape else f"a weight of {type(model).__name__}, which has none such"
            fail(file.path, entry.name, found, expected, "load the base model it was trained beside")
    for name in {f"{paths[0]}.weight", f"{paths[-1]}.weight"} & base.keys():
        own = held[name].detach()
        if own.device.type == "meta" or not own.is_floating_point():
            continue
        saved = file.read(base[name].name).float()
        if float((own.cpu().float() - saved).norm()) > CLOSE * float(saved.norm()):
            raise AdapterError(
                f"{file.path}: {base[name].name}: found other values than this {type(model).__name__} has, expected "
                "the same; load the base model it was trained beside"
            )
