"""Named: all layers that ``target_modules`` names get experts, by PEFT's rules; the baseline.

    a list of names       a layer matches when its path equals a name or ends with .name
    one string            a regular expression that must match the whole path
    all-linear            every supported layer but the output head (and a sequence classifier's head)

Paper: none; the rules are those of PEFT's LoraConfig. ``exclude_modules`` takes away, by the same rules;
``layers_to_transform`` keeps only these block indices, found after ``layers_pattern`` (or after any module list).

Recipe line: ``targets: {name: named}`` with ``target_modules: [q_proj, v_proj]``
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from moelora.core.errors import TargetError
from moelora.core.tape import Site
from moelora.core.validate import nearest
from moelora.targets.base import Targets, block_of, describe

SUPPORTED = (nn.Linear, Conv1D)
_CLASSIFIERS = ("score", "classifier")  # heads that PEFT leaves out of all-linear too


class Named(Targets):
    """The default: nothing else is chosen by."""

    def __call__(self, sites: Sequence[Site]) -> list[Site]:
        return list(sites)


def select(
    model: nn.Module,
    target_modules: list[str] | str,
    exclude_modules: list[str] | str | None = None,
    layers_to_transform: list[int] | int | None = None,
    layers_pattern: list[str] | str | None = None,
) -> list[Site]:
    """The sites of ``model`` to adapt, in module order. Raises TargetError: nothing matched, or not a linear layer."""
    modules = dict(model.named_modules())
    if target_modules == "all-linear":
        heads = _output_head(model) or list(_CLASSIFIERS)
        names = [name for name, m in modules.items() if _refusal(m) is None and not _matches(name, heads)]
    else:
        names = [name for name in modules if name and _matches(name, target_modules)]
        _every_target_matches(modules, target_modules)
    if exclude_modules is not None:
        names = [name for name in names if not _matches(name, exclude_modules)]
    if layers_to_transform is not None:
        wanted = [layers_to_transform] if isinstance(layers_to_transform, int) else layers_to_transform
        names = [name for name in names if block_of(name, layers_pattern) in wanted]
    if not names:
        raise TargetError(
            f"target_modules {target_modules!r} with exclude_modules {exclude_modules!r} and layers_to_transform "
            f"{layers_to_transform!r} leaves no layer of {type(model).__name__}{nearest('', _linear_names(modules))}"
        )
    heads = _output_head(model)
    for name in names:
        reason = "the output head, whose weight trainers read directly" if name in heads else _refusal(modules[name])
        if reason is not None:
            raise TargetError(f"target_modules {target_modules!r}: '{name}' is {reason}; supported: Linear, Conv1D")
    return describe(model, names, layers_pattern)


def _matches(name: str, rule: list[str] | str) -> bool:
    if isinstance(rule, str):
        try:
            return re.fullmatch(rule, name) is not None
        except re.error as error:
            raise TargetError(f"target_modules: '{rule}' is not a regular expression: {error}") from None
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in rule)


def _every_target_matches(modules: dict[str, nn.Module], target: list[str] | str) -> None:
    rules: list[list[str] | str] = [target] if isinstance(target, str) else [[suffix] for suffix in target]
    for rule in rules:
        if not any(name and _matches(name, rule) for name in modules):
            word = rule if isinstance(rule, str) else rule[0]
            kind = "the regular expression (a name goes in a list) " if isinstance(rule, str) else ""
            near = nearest(word, _linear_names(modules))
            raise TargetError(f"target_modules: {kind}'{word}' matches no layer{near}")


def _refusal(module: nn.Module) -> str | None:
    """Why a module cannot carry experts, or None."""
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "the output projection of MultiheadAttention, which reads its weight without calling the layer"
    return None if isinstance(module, SUPPORTED) else f"a {type(module).__name__}"


def _linear_names(modules: dict[str, nn.Module]) -> set[str]:
    return {name.rsplit(".", 1)[-1] for name, module in modules.items() if _refusal(module) is None}


def _output_head(model: nn.Module) -> list[str]:
    get = getattr(model, "get_output_embeddings", None)
    output = get() if get is not None else None
    return [] if output is None else [name for name, module in model.named_modules() if module is output]
