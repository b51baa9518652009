"""What must travel with a key-value cache beside the model's own: the twin of a first pass, and routers' memory.

A companion rides in the cache as one more layer, so whatever is done to the cache (beams reordered, rows selected or
repeated, tokens cropped, everything reset or copied) is done to it too, and an operation it does not know fails aloud.
During a forward it is taken out: models ask their cache about its layers and must find only their own.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache

from moelora.core.errors import MoeloraError

NAMES = ("past_key_values", "cache_params")
"""What models call their cache, as argument and as output."""
LAYER: Any = getattr(cache_utils, "DummyLayer", object)  # transformers has it since 5.21
LINEAR: Any = getattr(cache_utils, "LinearAttentionCacheLayerMixin", ())  # not in 5.0


class Companion(LAYER):
    """A layer that holds no keys of the model itself.

    twin: the cache of the pass without experts, or None. memory: [B, ...] per site, see ``View.keep``.
    """

    is_compileable = False

    def __init__(self, twin: Cache | None = None) -> None:
        super().__init__()
        self.twin, self.memory = twin, dict[int, Tensor]()
        self.seen: int | None = 0

    @property
    def length(self) -> int | None:
        """Tokens it knows of, where that is known."""
        return self.seen if self.twin is None else _length(self.twin)

    @property
    def is_croppable(self) -> bool:
        return not self.memory and (self.twin is None or self.twin.is_croppable)

    def reset(self) -> None:
        self.memory.clear()
        self.seen = 0
        if self.twin is not None:
            self.twin.reset()

    def crop(self, tokens_to_remove: int) -> None:
        if self.memory and tokens_to_remove:
            raise MoeloraError(
                "this router keeps a running mean over the sequence, which cannot forget tokens: assisted and "
                "speculative decoding are not possible with it; generate without an assistant"
            )
        if self.twin is not None:
            self.twin.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._each_row(lambda value: value.index_select(0, beam_idx.to(value.device)))
        if self.twin is not None:
            self.twin.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each_row(lambda value: value.repeat_interleave(repeats, 0))
        if self.twin is not None:
            self.twin.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._each_row(lambda value: value[indices])
        if self.twin is not None:
            self.twin.batch_select_indices(indices)

    def activate_past_recording(self) -> None:
        if self.twin is not None:
            self.twin.activate_past_recording()

    def _each_row(self, change: Any) -> None:
        self.memory = {site: change(value) for site, value in self.memory.items()}


def companion_of(given: dict[str, Any], twin: bool) -> Companion:
    """The companion of the cache among a forward's arguments, taken out of it; a new one for a new cache or none.

    twin: whether there is a first pass, which needs an empty cache like it. Raises MoeloraError for a cache that was
    filled without a companion: by the base model, or by another adapter.
    """
    cache = next((given[name] for name in NAMES if given.get(name) is not None), None)
    if cache is None:
        return Companion()
    cache = _own(cache)
    found = [layer for layer in cache.layers if isinstance(layer, Companion)]
    cache.layers[:] = [layer for layer in cache.layers if not isinstance(layer, Companion)]
    if found and (found[0].length == _length(cache) or None in (found[0].length, _length(cache))):
        return found[0]
    if found or not all(_is_empty(layer) for layer in cache.layers):
        raise MoeloraError(
            "this cache was filled by a model without this router (the base model, or another adapter), so what the "
            "router needs of the earlier tokens is not in it; pass the whole text and a new cache"
        )
    if not twin:
        return Companion()
    alike = copy.copy(cache)
    alike.layers = copy.deepcopy(cache.layers)
    return Companion(alike)


def accompany(out: Any, given: dict[str, Any], companion: Companion) -> None:
    """Put the companion into the cache that a forward gives back, if any."""
    made = [getattr(out, name, None) for name in NAMES] + [given.get(name) for name in NAMES]
    if isinstance(out, tuple):
        made += [value for value in out if isinstance(value, Cache)]
    cache = next((value for value in made if value is not None), None)
    if cache is not None and companion not in _own(cache).layers:
        companion.seen = _length(_own(cache))
        _own(cache).layers.append(companion)


def _own(cache: Any) -> Any:
    """The part of a cache that grows with the tokens of the model's own stream. Raises MoeloraError without layers."""
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    if not hasattr(own, "layers"):  # MambaCache of transformers 5.0
        raise MoeloraError(
            f"a {type(own).__name__} cannot carry what this router needs of earlier tokens; pass use_cache=False, or "
            "update transformers"
        )
    return own


def _length(cache: Any) -> int | None:
    """Tokens in the cache, where it counts them and reading that does not wait for a device."""
    lengths = (layer.get_seq_length() for layer in cache.layers if isinstance(layer, CacheLayerMixin))
    return next((length for length in lengths if isinstance(length, int)), None)


def _is_empty(layer: Any) -> bool:
    attends = isinstance(layer, CacheLayerMixin) and int(layer.get_seq_length()) > 0
    if isinstance(layer, LINEAR):
        states: Any = layer.has_previous_state
        attends = attends or (any(states.values()) if isinstance(states, dict) else bool(states))
    return not attends
