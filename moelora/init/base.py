"""Init: the experts' starting point. One file per initialiser."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from moelora.core.errors import ConfigError
from moelora.core.start import Start


class Init(ABC):
    """Called once per site after the experts exist; recipe keys are keyword-only arguments of ``__init__``.

    moves: experts start from factors whose product is not zero. A copy of these is kept, frozen, and subtracted, so
        that every expert's update is zero at the start, whatever the gates: s (B A - B0 A0). It needs experts that own
        their A ("own_A").
    probes: what it needs of some batches of data: ``"gradients"`` of the base weights, or layers' ``"inputs"``.
    """

    moves: ClassVar[bool] = False
    probes: ClassVar[Literal["gradients", "inputs"] | None] = None

    @abstractmethod
    def __call__(self, experts: nn.Module, start: Start) -> None:
        """Set the parameters of ``experts`` in place, under no_grad. Parameters that are no factors are set already."""

    def watch(self) -> tuple[Any, Callable[[Tensor], bool]]:
        """For ``probes = "inputs"``: what becomes ``Start.seen`` of one site, and what takes in its inputs [T, D] of
        tokens that are not padding, batch after batch; it says whether it wants more."""
        raise NotImplementedError(f"{type(self).__name__} probes inputs and does not say how")


def halves(init: str, experts: nn.Module) -> tuple[Tensor, Tensor]:
    """(lora_A, lora_B) of experts. Raises ConfigError for experts that are something else."""
    parameters = dict(experts.named_parameters(recurse=False))
    if not {"lora_A", "lora_B"} <= parameters.keys() or "core" in parameters:
        name = type(experts).__module__.rpartition(".")[2]
        raise ConfigError(
            f"init {init} sets lora_A and lora_B; experts '{name}' train {', '.join(sorted(parameters)) or 'nothing'}; "
            "use experts: lora, or init: kaiming, which leaves experts their own start"
        )
    return parameters["lora_A"], parameters["lora_B"]
