"""Plain: the optimiser gets the gradients as they are.

    (dA, dB)  ->  (dA, dB)

Paper: Hu et al., LoRA, arXiv 2106.09685, where A and B are trained by AdamW like any parameters.

Recipe line: ``optim: {name: plain}``
"""

from __future__ import annotations

from moelora.optim.base import Optim


class Plain(Optim):
    """The default: nothing stands between backward and step."""
