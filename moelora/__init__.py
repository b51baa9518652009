"""moelora: mixtures of LoRA experts for transformers models.

    model = moelora.adapt(base_model, {"router": {"name": "smora"}, "experts": {"r": 64}})
    moelora.save(model, "out/")
    model = moelora.load(base_model, "out/")
    with moelora.disabled(model): ...
    with moelora.merged(model): ...

Names are imported when first used, so that ``import moelora`` is instant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from moelora.model.adapt import adapt as adapt
    from moelora.model.config import AdapterConfig as AdapterConfig
    from moelora.model.routed import collect as collect
    from moelora.model.routed import disabled as disabled
    from moelora.model.save import load as load
    from moelora.model.save import save as save
    from moelora.tools.export.merge import merge as merge
    from moelora.tools.export.merge import merged as merged
    from moelora.train.trainer import MoeLoraTrainer as MoeLoraTrainer

_HOME = {
    "adapt": "moelora.model.adapt",
    "AdapterConfig": "moelora.model.config",
    "collect": "moelora.model.routed",
    "disabled": "moelora.model.routed",
    "load": "moelora.model.save",
    "merge": "moelora.tools.export.merge",
    "merged": "moelora.tools.export.merge",
    "save": "moelora.model.save",
    "MoeLoraTrainer": "moelora.train.trainer",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moelora' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
