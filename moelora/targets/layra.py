"""LayRA: experts in the first and the last blocks only; the middle of the model stays as it is.

Paper: Owodunni and Kumar, "Continually Adding New Languages to Multilingual Language Models" (LayRA), arXiv 2509.11414.
Of blocks 0 to L - 1:

    block l has experts   if   l < first   or   l >= L - last

Early blocks read a language and late ones write it; in between, models think in one language for all, which training on
another would only make them forget. Inside the blocks everything is as without it: any experts, routers, ranks. Layers
in no block get none. In an encoder-decoder each stack has its own first and last blocks.

``moelora.tools.residuals`` adds what a chat model has learned beside its base to the result (the paper's arithmetic).

Differences from the paper: only its opening pages and a summary were read; it says first and last blocks, and 4 of each
(an eighth of 32) is a suggestion of ours.

Recipe line: ``targets: {name: layra, first: 4, last: 4}``
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from moelora.core.errors import ConfigError
from moelora.core.tape import Site
from moelora.targets.base import Targets


class LayRA(Targets):
    """first, last: how many blocks at either end have experts; together more than there are is all of them. Raises
    ConfigError for none."""

    def __init__(self, *, first: Annotated[int, Field(ge=0)] = 4, last: Annotated[int, Field(ge=0)] = 4) -> None:
        if not first + last:
            raise ConfigError("targets.layra: first 0 and last 0 leave no block; give at least one of them a number")
        self.first, self.last = first, last

    def __call__(self, sites: Sequence[Site]) -> list[Site]:
        return [site for site in sites if site.block is not None and self._outer(site.block, site.blocks)]

    def _outer(self, block: int, blocks: int) -> bool:
        return block < self.first or block >= blocks - self.last
