"""All ranks in use."""

from __future__ import annotations

from moelora.model.record import routed_layers
from tests import tiny


def test_it_is_the_default_and_nothing_stands_between() -> None:
    model = tiny.adapted("llama", "meteora", ranks="full")
    assert all(layer.experts.allocator is None and layer.experts.stored for layer in routed_layers(model))
    assert model.moelora.config.ranks == {"name": "full"}
