"""Folders of MixLoRA and MoE-PEFT (TUDB-Labs), and of the package ``mixlora``.

    adapter_config.json          peft_type MIXLORA, MOLA or LORAMOE, with its routing_strategy
    adapter_model.safetensors    <p> is mixlora, mola or loramoe, <m> mlp or self_attn, <i> counts blocks, <e> experts
        <p>.layers.<i>.mlp.moe_gate.weight                        [E, D]    one gate for the block (MixLoRA)
        <p>.layers.<i>.<m>.<name>.moe_gate.weight                 [E, D]    one for each layer (MoLA, LoRAMoE)
        <p>.layers.<i>.<m>.<name>.experts.<e>.lora_A.weight       [r, D]
        <p>.layers.<i>.<m>.<name>.experts.<e>.lora_B.weight       [O, r]
        <p>.layers.<i>.self_attn.<name>.lora_A.weight, ...        a LoRA beside the experts, always on

These projects write a pickle, adapter_model.bin, which is not opened; the same keys are read from a safetensors file.

    mixlora     routers.mixlora: top_k of a softmax, around the feed-forward block
    mola        routers.softmax with top_k, at every layer
    loramoe     routers.softmax over all experts, at every layer of the feed-forward block

LoRAs of attention beside the experts become ``attention: lora`` of these routers, with their own rank and scale.

Refused, since nothing here computes the same: mixlora-dynamic and mixlora-switch; another activation than the base
model's; DoRA, whose magnitudes are not in the file.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from moelora.core.errors import AdapterError
from moelora.core.tape import Site
from moelora.io.files import AGAIN, fail, short
from moelora.io.peft import CONFIG, WEIGHTS, Module, PeftAdapter, check_parts, check_ranks
from moelora.io.peft_config import MAX_ALPHA, MAX_RANK
from moelora.io.tensors import TensorFile
from moelora.model.ffn import FIRST, LAST
from moelora.model.sources import Source
from moelora.tools.mixtures.base import Mixture, Settings, read_floats, target_rule

KINDS = ("MIXLORA", "MOLA", "LORAMOE")
PICKLE = "adapter_model.bin"
MAX_EXPERTS = 4096
BLOCK = re.compile(r"(?:.+\.)?(layers\.\d+\.(?:mlp|self_attn))")
CONVERT = (
    "if you trust its origin: state = torch.load('adapter_model.bin', map_location='cpu', weights_only=True); "
    "safetensors.torch.save_file({k: v.detach().contiguous() for k, v in state.items()}, 'adapter_model.safetensors')"
)
STRATEGIES = {
    "mixlora-dynamic": "moelora has no router that takes experts up to a share of probability (top_p)",
    "mixlora-switch": "moelora has no router with a capacity, which drops tokens",
    "mixtral": "this is the layout before MoE-PEFT: misc/legacy_weights_convertor.py of TUDB-Labs/MixLoRA converts it",
}


@dataclass
class Found:
    """What the header says: names of gates, LoRAs of attention, and modules of every expert, by path in the model."""

    gates: dict[str, str] = field(default_factory=dict)
    beside: dict[str, Module] = field(default_factory=dict)
    experts: list[dict[str, Module]] = field(default_factory=list)

    @property
    def paths(self) -> set[str]:
        return {path for expert in self.experts for path in expert}


def read(folder: Path, model: nn.Module) -> Mixture:
    """What the folder holds. Raises AdapterError."""
    settings = Settings(folder, CONFIG)
    kind = str(settings.take("peft_type", lambda v: v in KINDS, f"one of {KINDS}")).lower()
    count = settings.whole("num_experts", 1, MAX_EXPERTS)
    router, losses = _router(settings, kind, count)
    plain, own = _lora(settings)
    targets = _targets(settings)
    _check_activation(settings, model)
    settings.ignore("base_model_name_or_path", "task_type", "name", "task_name", "lora_init", "router_init_range")
    settings.ignore("top_p", "temperature", "router_z_loss_coef", "expert_capacity", "ffn_dropout", "sparse_step")
    settings.close()
    if not (folder / WEIGHTS).exists() and (folder / PICKLE).exists():
        fail(folder / PICKLE, "format", "a pickle, which can run code and is never opened", WEIGHTS, CONVERT)
    blocks = _blocks(model, kind)
    with ExitStack() as stack:
        file = TensorFile(folder, WEIGHTS)
        stack.callback(file.close)
        found = _sort(file, kind, count, blocks)
        _check_whole(file, found, kind, targets, blocks, model)
        for loras, shape in ((found.beside, plain), *((expert, own) for expert in found.experts)):
            check_parts(loras, {}, folder)
            check_ranks(loras, shape, folder)
        gates = {path: _gate(file, name, count, path, kind, model) for path, name in found.gates.items()}
        stack.pop_all()  # the layers read the experts
    found.experts[0].update(found.beside)
    plain = plain if found.beside else own
    base = settings.values.get("base_model_name_or_path")
    config = {**own, "base_model_name_or_path": base if isinstance(base, str) else None}
    sources = [Source(PeftAdapter(folder, config, expert, {}, file), str(folder)) for expert in found.experts]
    around = {f"{path}.{name}" for path in gates for name in _projections(model, path)} if kind == "mixlora" else set()
    adapter = {
        "router": {**router, "attention": "lora"} if found.beside else router,
        "losses": losses,
        "target_modules": target_rule(model, found.paths | around, folder),
        "experts": {"num_experts": count, **own, "r": max(own["r"], plain["r"])},
    }
    dropout, other = own["lora_dropout"], plain["lora_dropout"]
    notes = ["dropout is off in evaluation; in MoE-PEFT it stays on"] if dropout or other else []
    if dropout != other:
        notes.append(f"the LoRAs of attention had dropout {other}; trained on, they have the experts', {dropout}")

    def gate_of(site: Site) -> dict[str, Tensor]:
        if site.name in found.beside:
            return {}
        return {"weight": gates[site.parent if kind == "mixlora" else site.name]}

    return Mixture(folder, adapter, sources, gate_of, notes)


def _router(settings: Settings, kind: str, count: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the router, the losses it was trained with, where the folder says so)."""
    said = settings.values.get("routing_strategy")
    what = STRATEGIES.get(said, "the two settings do not match") if isinstance(said, str) else "save it again"
    settings.take("routing_strategy", lambda v: v == kind, f"'{kind}', as peft_type says", None, what)
    router: dict[str, Any] = {"name": "mixlora" if kind == "mixlora" else "softmax"}
    if kind != "loramoe":
        router["top_k"] = settings.whole("top_k", 1, count, 2)
    if kind == "mixlora":
        router["jitter"] = settings.number("jitter_noise", lambda v: 0 <= v < 1, "a number from 0, below 1", 0.0)
    coefficient = settings.number("router_aux_loss_coef", lambda v: v >= 0, "a number of at least 0", 0.0)
    on = settings.flag("router_loss", kind == "mixlora")
    return router, {"balance": coefficient} if on and coefficient and kind != "loramoe" else {}


def _lora(settings: Settings) -> tuple[dict[str, Any], dict[str, Any]]:
    """(r, lora_alpha, use_rslora and lora_dropout of attention, those of the experts, which expert_lora may change)."""
    inner = settings.take("expert_lora", lambda v: v is None or isinstance(v, dict), "an object or null") or {}
    parts = [settings]
    if inner:
        parts.append(Settings(settings.path.parent, CONFIG, "expert_lora"))
    for part in parts:
        part.take("bias", lambda v: v == "none", "'none'", "none")
        part.off("use_dora", "MoE-PEFT does not save the magnitudes of DoRA, so the trained model is not in the folder")
    found: list[dict[str, Any]] = []
    for part in parts:
        last: dict[str, Any] = found[-1] if found else {"use_rslora": False, "lora_dropout": 0.0}
        alpha, dropout = last.get("lora_alpha"), last["lora_dropout"]
        own = {
            "r": part.whole("r", 1, MAX_RANK, last.get("r")),
            "lora_alpha": part.number("lora_alpha", lambda v: 0 < v <= MAX_ALPHA, "a number above 0", alpha),
            "use_rslora": part.flag("use_rslora", last["use_rslora"]),
            "lora_dropout": part.number("lora_dropout", lambda v: 0 <= v < 1, "a number from 0, below 1", dropout),
        }
        found.append(own)
    if inner:
        parts[1].ignore("peft_type", "target_modules", "lora_init")
        parts[1].close()
    return found[0], found[-1]


def _targets(settings: Settings) -> set[str]:
    def good(value: Any) -> bool:
        if isinstance(value, dict):
            return all(type(on) is bool for on in value.values())
        return isinstance(value, list) and all(isinstance(name, str) for name in value)

    value = settings.take("target_modules", good, "a list of names, or an object of names and true or false")
    return {name for name in value if not isinstance(value, dict) or value[name]}


def _check_activation(settings: Settings, model: nn.Module) -> None:
    """The activation of the experts, which MoE-PEFT always saves, is the base model's."""
    config = getattr(model, "config", None)
    own = [getattr(config, key, None) for key in ("hidden_act", "hidden_activation", "activation_function")]
    known = [name for name in own if isinstance(name, str)]
    what = "moelora's experts pass through the block's own activation: load the base model it was trained beside"
    settings.take("act_fn", lambda v: v is None or v in known, f"the base model's ({', '.join(known)})", None, what)


def _blocks(model: nn.Module, kind: str) -> dict[str, str]:
    """Paths of blocks in the base model, by what the keys call them. Raises AdapterError for a name of two."""
    blocks: dict[str, str] = {}
    for path, _ in model.named_modules():
        match = BLOCK.fullmatch(path)
        if match and blocks.setdefault(match[1], path) != path:
            raise AdapterError(
                f"{type(model).__name__} has two modules '{match[1]}' ('{blocks[match[1]]}' and '{path}'), so the keys "
                f"of a {kind} folder do not say which is meant; load the language model alone"
            )
    return blocks


def _sort(file: TensorFile, kind: str, count: int, blocks: dict[str, str]) -> Found:
    found = Found(experts=[{} for _ in range(count)])
    numbers = {str(index): index for index in range(count)}
    for name, entry in file.entries.items():
        key = name.split(".")
        path = blocks.get(".".join(key[1:4])) if key[0] == kind else None
        part, rest = (key[3], key[4:]) if path else ("", [])
        match rest:
            case ["moe_gate", "weight"] if kind == "mixlora" and part == "mlp":
                found.gates[str(path)] = name
            case [layer, "moe_gate", "weight"] if kind != "mixlora":
                found.gates[f"{path}.{layer}"] = name
            case [layer, "experts", expert, ("lora_A" | "lora_B") as half, "weight"] if expert in numbers:
                module = found.experts[numbers[expert]].setdefault(f"{path}.{layer}", Module())
                module.entries[half[-1]] = entry
            case [layer, ("lora_A" | "lora_B") as half, "weight"] if kind != "mola" and part == "self_attn":
                found.beside.setdefault(f"{path}.{layer}", Module()).entries[half[-1]] = entry
            case _ if name == "classifier":
                what = "moelora imports experts and gates: load it with MoE-PEFT, or leave the tensor out"
                fail(file.path, name, "the head of a classifier", "experts and gates", what)
            case _:
                expected = f"{kind}.layers.<i>..., of a block of the base model and {count} experts"
                fail(file.path, name, "such a name", expected, "load the base model it was trained beside")
    return found


def _check_whole(
    file: TensorFile, found: Found, kind: str, targets: set[str], blocks: dict[str, str], model: nn.Module
) -> None:
    """Every expert has every targeted layer of every block, and a gate; attention has LoRAs; nothing else has one."""
    parents = [path for path in blocks.values() if kind == "mola" or path.endswith(".mlp")]
    layers = {
        f"{path}.{name}": path in parents
        for path in blocks.values()
        for name, _ in model.get_submodule(path).named_children()
        if name in targets
    }
    wanted = {path for path, routed in layers.items() if routed}
    if not wanted:
        fail(file.path, "target_modules", f"{sorted(targets)}", "names of layers in the base model", AGAIN)
    gated = {path for path in parents if _projections(model, path)} if kind == "mixlora" else wanted
    sets = [("gate", set(found.gates), gated)]
    sets += [("LoRA", set(found.beside), layers.keys() - wanted)]
    sets += [(f"expert {index}", set(expert), wanted) for index, expert in enumerate(found.experts)]
    for what, has, needs in sets:
        for path in sorted(needs - has):
            fail(file.path, f"{what} of '{path}'", "nothing", "its tensors, by target_modules", AGAIN)
        for path in sorted(has - needs):
            fail(
                file.path, f"{what} of '{path}'", "tensors", f"none, by target_modules {short(sorted(targets))}", AGAIN
            )


def _gate(file: TensorFile, name: str, count: int, path: str, kind: str, model: nn.Module) -> Tensor:
    module: Any = model.get_submodule(path)
    if kind == "mixlora":
        first = next((name for name in _projections(model, path) if name in FIRST), None)
        if first is None:
            has = ", ".join(name for name, _ in module.named_children())
            what = f"moelora puts experts around blocks of such projections: {', '.join(FIRST)}"
            fail(file.path, f"'{path}'", f"a block of {has}", "projections of known names, not fused", what)
        module = module.get_submodule(first)
    width = getattr(module, "in_features", None) or module.weight.shape[0]
    return read_floats(file, name, (count, width), f"{count} experts, and the width of '{path}'")


def _projections(model: nn.Module, block: str) -> list[str]:
    """The projections of a feed-forward block, by the names that ``moelora.model.ffn`` knows."""
    return [name for name, _ in model.get_submodule(block).named_children() if name in FIRST + LAST]
