"""The experts of an X-LoRA folder: LoRA folders that a caller names, or the subfolders that PEFT wrote.

PEFT gives the experts of X-LoRA the names 0, 1, ... and takes these names out of the keys it saves, or leaves keys out
because of them. In a subfolder keys start with ``base_model.lora_model.model.``, and there is more than the expert:

    <module>.lora_A.weight                       the expert's own, and the same for B
    <module>.lora_A.<name>.weight                another expert's
    <name of a weight of the base model>         with ``.base_layer`` where a layer is adapted
    base_model.internal_xlora_classifier...      of the router

PEFT 0.18 and 0.19 write the expert whole. Those before cut its name out of the numbers of blocks too. 0.20 to 0.21.2
leave out every block whose number is the name of another expert: such a subfolder cannot be used.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from torch import nn

from moelora.io.files import fail, read_object
from moelora.io.peft import CONFIG, PARTS, WEIGHTS, Module, PeftAdapter, check_parts, check_ranks, read_peft
from moelora.io.peft_config import check_config
from moelora.io.tensors import TensorFile
from moelora.model.sources import Source, open_sources, targets_of
from moelora.tools.mixtures.base import FLOATS, refuse_more_than_lora

PREFIX, ROUTER = "base_model.lora_model.model.", "base_model.internal_xlora_classifier."
OTHER = re.compile(r".+\.lora_[AB]\.\d+\.weight")
GIVE = (
    "give the folders of the experts, in the order of the router: experts=[...], or --expert; paths that a "
    "configuration names are never opened"
)
OTHERWISE = "X-LoRA computes something else with it than a mixture of experts: leave it out, and train a new router"
LOST = (
    "PEFT names these experts 0, 1, ... and takes such names out of what it saves: blocks are lost from 0.20 to "
    "0.21.2, and renamed before 0.18. Give the folders that the experts were made from: experts=[...], or --expert"
)


def open_experts(folder: Path, names: Sequence[str], given: Sequence[str | Path], model: nn.Module) -> list[Source]:
    """One source for each name: those that are given, in their order, else the subfolders of these names.

    ``default`` is the folder itself. Raises AdapterError for experts that are not plain LoRA, that lack a module they
    target, or that differ from what the subfolders hold of them.
    """
    own = [folder if name == "default" else folder / name for name in names]
    if not given:
        for name, path in zip(names, own, strict=True):
            if not path.is_dir():
                fail(path, "file", "nothing", f"the expert '{name}'", GIVE)
        sources = [Source(_read(path, folder, model), str(path)) for path in own]
    else:
        sources = open_sources(given)
        if len(sources) != len(names):
            fail(
                folder,
                "experts",
                f"{len(sources)} in what was given",
                f"{len(names)}, one for each of the router",
                GIVE,
            )
    for path, source in zip(own, sources, strict=True):
        refuse_more_than_lora(source.adapter, OTHERWISE)
        if given:
            _compare(path, folder, source.adapter)
    return sources


def _read(path: Path, root: Path, model: nn.Module) -> PeftAdapter:
    """The expert in a subfolder, complete."""
    with ExitStack() as stack:
        file = TensorFile(path, WEIGHTS, root)
        stack.callback(file.close)
        if not any(name.startswith(PREFIX) for name in file.entries):
            return read_peft(path, root)
        config = read_object(path, CONFIG, root=root)
        check_config(config, path / CONFIG)
        adapter = PeftAdapter(path, config, _own(file, model), {}, file)
        _check_complete(adapter, model)
        check_parts(adapter.modules, config, path)
        check_ranks(adapter.modules, config, path)
        stack.pop_all()  # the layers read the expert
    return adapter


def _own(file: TensorFile, model: nn.Module) -> dict[str, Module]:
    """The modules of the expert itself. Raises AdapterError for what is of nobody."""
    base = model.state_dict(keep_vars=True).keys()
    modules: dict[str, Module] = {}
    for name, entry in file.entries.items():
        inner = name.removeprefix(PREFIX)
        half, match = next(((half, m) for half in "AB" if (m := PARTS[half].fullmatch(inner))), ("", None))
        if name.startswith(PREFIX) and match:
            modules.setdefault(match[1], Module()).entries[half] = entry
        elif not (name.startswith(ROUTER) or OTHER.fullmatch(inner) or inner.replace(".base_layer", "") in base):
            fail(file.path, name, "a tensor that is no part of this expert, router or base model", "none", LOST)
    return modules


def _check_complete(adapter: PeftAdapter, model: nn.Module) -> None:
    """Raise AdapterError unless it has tensors for the modules that it targets in ``model``, and for no others."""
    targets, found = targets_of(dict(model.named_modules()), adapter), adapter.modules.keys()
    for paths, what in ((targets - found, "nothing"), (found - targets, "a LoRA")):
        if paths:
            expected = "a LoRA, by target_modules" if what == "nothing" else "none, by target_modules"
            fail(adapter.file.path, f"'{min(paths)}' ({len(paths)} such modules)", what, expected, LOST)


def _compare(path: Path, root: Path, adapter: PeftAdapter) -> None:
    """Raise AdapterError where a subfolder holds other values than the expert that was given for it."""
    if not (path / WEIGHTS).is_file():
        return
    with closing(TensorFile(path, WEIGHTS, root)) as file:
        _compare_file(file, adapter)


def _compare_file(file: TensorFile, adapter: PeftAdapter) -> None:
    for name in file.entries:
        inner = name.removeprefix(PREFIX).removeprefix("base_model.model.")
        half, match = next(((half, m) for half in "AB" if (m := PARTS[half].fullmatch(inner))), ("", None))
        own = adapter.modules.get(match[1]) if match else None
        if own is None or half not in own.entries:
            continue
        mine, theirs = file.read(name), adapter.file.read(own.entries[half].name)
        rounded = (theirs.to(kind).double() for kind in FLOATS)  # PEFT loads them in the dtype of the base model
        if not any(torch.equal(mine.double(), value) for value in rounded):
            what = (
                "the experts are given in another order, or are others, or were trained on with the router "
                "(use_trainable_adapters): give those that belong to it"
            )
            fail(file.path, name, f"other values than in {adapter.folder}", "the same", what)
