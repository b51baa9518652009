"""Targets: which of the named layers get experts, one file per way of choosing; and what is known of a layer before
anything is built, its ``Site``."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moelora.core.tape import Site

_CROSS = re.compile(
    r"(EncDecAttention|encoder_attn|crossattention|cross_attn|encoder_decoder_attention)\.(self\.)?(k|v)"
)


class Targets(ABC):
    """Chooses among the layers that ``target_modules`` names. Recipe keys are keyword-only arguments of ``__init__``.

    batches: how many batches of data it looks at to choose by; 0 where nothing is left to choose. batch_size: how many
        rows each has where ``moelora train`` makes them (an ``init`` that looks at data has its way).
    """

    batches: int = 0
    batch_size: int = 8

    @abstractmethod
    def __call__(self, sites: Sequence[Site]) -> list[Site]:
        """Those that get experts, in their order. While nothing is chosen yet: those that may."""

    def choose(self, model: nn.Module, sites: Sequence[Site], batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Recipe keys that say what was chosen: with them nothing is left to choose. The same in all processes.

        model: the base model, frozen, without dropout, and the same again afterwards. batches: its inputs, with labels.
        """
        raise NotImplementedError(f"{type(self).__name__} looks at batches and does not say how it chooses")


@contextmanager
def adding(model: nn.Module, updates: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Inside, the layers of these paths add to their output what the functions make of their input."""

    def hook(update: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        return lambda _, args, y: y + update(args[0]).to(y.dtype)

    hooks = [model.get_submodule(path).register_forward_hook(hook(update)) for path, update in updates.items()]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def describe(model: nn.Module, names: list[str], layers_pattern: list[str] | str | None = None) -> list[Site]:
    """A site for each of the named layers (Linear or Conv1D), in their order."""
    depth: dict[str, int] = {}  # by the path of the stack that holds the blocks
    for name, _ in model.named_modules():
        stack, number = _stack_of(name, layers_pattern)
        if number is not None:
            depth[stack] = max(depth.get(stack, 0), number + 1)
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    hidden_size = getattr(text, "hidden_size", None)
    sites = []
    for index, name in enumerate(names):
        module: Any = model.get_submodule(name)
        wide, out = (
            (module.weight.shape[0], module.nf)
            if isinstance(module, Conv1D)
            else (module.in_features, module.out_features)
        )
        stack, block = _stack_of(name, layers_pattern)
        blocks, stream = depth.get(stack, 0), _stream(model, name)
        sites.append(Site(name, index, int(wide), int(out), stream, len(names), block, blocks, hidden_size))
    return sites


def block_of(name: str, pattern: list[str] | str | None) -> int | None:
    """The first number in a layer's path (a later one may count experts)."""
    return _stack_of(name, pattern)[1]


def _stack_of(name: str, pattern: list[str] | str | None) -> tuple[str, int | None]:
    """The path of the module list that holds a layer's block, and the block's number in it."""
    patterns = [pattern] if isinstance(pattern, str) else pattern or [r"[^.]*"]
    found = (re.match(rf"((?:^|.*?\.){part})\.(\d+)\.", name) for part in patterns)
    return next(((match.group(1), int(match.group(2))) for match in found if match), ("", None))


def _stream(model: nn.Module, name: str) -> str:
    """Decoder layers of an encoder-decoder read decoder tokens, except keys and values of its cross-attention."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "input"
    encoder = model.get_encoder()  # type: ignore[operator]
    inside = any(name.startswith(f"{path}.") for path, module in model.named_modules() if module is encoder)
    return "input" if inside or _CROSS.search(name) else "decoder"
