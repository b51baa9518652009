"""Layers that read the same tokens, such as q, k and v of an attention: x is read once for all of them.

The first of them to be called maps the tokens for its fellows, too: h = A x of each, and the scores of each router.
They find it on the tape, and take it if the tokens they are called with are those very tokens. The numbers are the
same, for each row of the stacked factors is a product of its own; and the gradient of x is added up in one product.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from torch import Tensor, nn

from moelora.core.tape import Tape
from moelora.experts.base import Experts
from moelora.ops import routed_lora
from moelora.ops.project import Image, project
from moelora.routers.base import Router

READERS: Final = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"))
"""Names of children of one module that are called with one tensor, in the order of their calls."""


@dataclass(frozen=True, slots=True)
class Reader:
    """What a layer reads tokens for. index: of its site."""

    index: int
    experts: Experts
    router: Router
    dropout: nn.Dropout

    def maps_first(self, tokens: Tensor) -> bool:
        """Whether it wants h = A x of all its tokens, whatever they choose."""
        return self.experts.stored and routed_lora.maps_first(tokens, self.experts.factors(), self.router.chosen)

    def may_share(self, tokens: Tensor) -> bool:
        """Whether it wants them unchanged by dropout, with factors that lie whole in their module."""
        if not self.experts.stored or (self.dropout.training and self.dropout.p):
            return False
        A = self.experts.factors().A
        return type(A) is nn.Parameter and not hasattr(A, "ds_id") and self.maps_first(tokens)

    def weights(self) -> list[Tensor]:
        """A [R, D] and, of a router that scores tokens by one, its factor [G, D]."""
        A = self.experts.factors().A
        assert A is not None
        return [A] if self.router.scores is None else [A, self.router.get_parameter(self.router.scores)]


def groups(names: Iterable[str]) -> list[list[str]]:
    """The paths, of those given, that read the same tokens: the first to be called comes first."""
    given = dict.fromkeys(names)
    parents = dict.fromkeys(name.rpartition(".")[0] for name in given)
    found = [
        [path for child in children if (path := f"{parent}.{child}") in given]
        for parent in parents
        for children in READERS
    ]
    return [paths for paths in found if len(paths) > 1]


def image_of(reader: Reader, fellows: tuple[Reader, ...], x: Tensor, tokens: Tensor, tape: Tape) -> Image:
    """The tokens [T, D] of a layer called with x [..., D], and what was read of them for it.

    fellows: of the first of a group, all of them, itself included.
    """
    given, image = tape.images.pop(reader.index, (None, None))
    if image is not None and given is x:
        return image
    if not fellows or not all(fellow.may_share(tokens) for fellow in fellows):
        return Image(tokens, reader.maps_first(tokens))
    weights = list({id(weight): weight for fellow in fellows for weight in fellow.weights()}.values())
    known = list(zip(weights, project(tokens, weights), strict=True))
    for fellow in fellows:
        tape.images[fellow.index] = x, Image(tokens, True, known)
    return tape.images.pop(reader.index)[1]
