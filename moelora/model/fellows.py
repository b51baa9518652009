"""Layers that read the same tokens, such as q, k and v of an attention: x is read once for all of them.

The first of them to be called maps the tokens for its fellows, too: h = A x of each, and the scores of each router.
They find it on the tape, and take it if the tokens they are called with are those very tokens. The numbers are the
same, for each row of the stacked factors is a product of its own; and the gradient of x is added up in one product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from torch import Tensor, nn

from moelora.core.tape import Tape
from moelora.ops import routed_lora
from moelora.ops.project import Image, project

if TYPE_CHECKING:
    from moelora.model.layer import RoutedLinear

READERS: Final = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"))
"""Names of children of one module that are called with one tensor, in the order of their calls."""


def introduce(layers: list[RoutedLinear]) -> None:
    """Make the layers known to each other that read the same tokens."""
    by_name = {layer.site.name: layer for layer in layers}
    for parent in dict.fromkeys(layer.site.parent for layer in layers):
        for names in READERS:
            group = [by_name[path] for name in names if (path := f"{parent}.{name}") in by_name]
            if len(group) > 1:
                group[0].fellows = tuple(group)


def image_of(layer: RoutedLinear, x: Tensor, tokens: Tensor, tape: Tape) -> Image:
    """The tokens [T, D] of a layer called with x [..., D], and what was read of them for it."""
    given, image = tape.images.pop(layer.site.index, (None, None))
    if image is not None and given is x:
        return image
    group = layer.fellows if layer.port.tape is tape else ()
    if not group or not all(_may_share(fellow, tokens) for fellow in group):
        return Image(tokens)
    weights = {fellow.site.index: _weights(fellow) for fellow in group}
    wanted = list({id(weight): weight for own in weights.values() for weight in own}.values())
    known = list(zip(wanted, project(tokens, wanted), strict=True))
    for index in weights:
        tape.images[index] = x, Image(tokens, known)
    return tape.images.pop(layer.site.index)[1]


def _weights(layer: RoutedLinear) -> list[Tensor]:
    A = layer.experts.factors().A
    assert A is not None
    scores = layer.router.scores
    return [A] if scores is None else [A, layer.router.get_parameter(scores)]


def _may_share(layer: RoutedLinear, tokens: Tensor) -> bool:
    """Whether the layer maps all its tokens first, unchanged by dropout, with factors that lie whole in its module."""
    if layer.training and layer.dropout.p:
        return False
    factors = layer.experts.factors()
    if type(factors.A) is not nn.Parameter or hasattr(factors.A, "ds_id"):
        return False
    return routed_lora.maps_first(tokens, factors)
