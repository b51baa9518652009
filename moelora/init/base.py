"""Init: the experts' starting point. One file per initialiser."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from moelora.core.errors import ConfigError
from moelora.core.start import Start


class Init(ABC):
    """Called once per site after the experts exist; recipe keys are keyword-only arguments of ``__init__``.

    moves: experts start from factors whose product is not zero. A copy of these is kept, frozen, and subtracted, so
        that every expert's update is zero at the start, whatever the gates: s (B A - B0 A0). It needs experts that own
        their A ("own_A"). An option may decide it: ``self.moves = ...`` in ``__init__``.
    probes: what it needs besides the base's weights: from some batches of data ``"gradients"`` of these, or layers'
        ``"inputs"``; or of a quantised base the ``"weights"`` as they were.
    batches: how many batches it looks at, at most. batch_size: how many rows each has where ``moelora train`` makes
        them, whatever a step of training takes, so that any number of processes starts alike.
    tokens: whose inputs it looks at: of all tokens but padding, or of ``"answers"``, those with a label; without labels
        [B, S] these are all.
    """

    moves: bool = False
    probes: ClassVar[Literal["gradients", "inputs", "weights"] | None] = None
    batches: int = 8
    batch_size: int = 8
    tokens: Literal["all", "answers"] = "all"

    @abstractmethod
    def __call__(self, experts: nn.Module, start: Start) -> None:
        """Set the parameters of ``experts`` in place, under no_grad. Parameters that are no factors are set already."""

    def refuse(self, name: str, router: str) -> None:  # noqa: B027
        """Raise ConfigError where it makes no sense with a router. name, router: what a recipe calls the two."""

    def watch(self, experts: nn.Module) -> tuple[Any, Callable[[Tensor], bool]]:
        """For ``probes = "inputs"``: what becomes ``Start.seen`` of one site, and what takes in its inputs [T, D] batch
        after batch, and says whether it wants more."""
        raise NotImplementedError(f"{type(self).__name__} probes inputs and does not say how")


def halves(init: str, experts: nn.Module, alone: bool = False) -> tuple[Tensor, Tensor]:
    """(lora_A, lora_B) of experts. alone: they must have nothing between these, since their product is what counts; a
    magnitude is around it. Raises ConfigError for experts that are something else."""
    parameters = dict(experts.named_parameters(recurse=False))
    more = parameters.keys() - {"lora_A", "lora_B", "magnitude"}
    if not {"lora_A", "lora_B"} <= parameters.keys() or "core" in more or (alone and more):
        raise ConfigError(
            f"init {init} sets lora_A and lora_B; experts '{named(experts)}' train "
            f"{', '.join(sorted(parameters)) or 'nothing'}; use experts: lora, or init: kaiming, which leaves experts "
            "their own start"
        )
    return parameters["lora_A"], parameters["lora_B"]


def named(method: object) -> str:
    """What a recipe calls a method."""
    return type(method).__module__.rpartition(".")[2]


Share = Literal["slices", "same"]
"""Which directions experts start from: each has its own, or all have the first ones."""


def shares(init: str, share: Share, experts: Any, many: int, width: int = 1) -> Tensor:
    """[E, r * width] which of ``many`` directions each expert starts from: all the first ones, or expert e those from
    e * r * width on. Raises ConfigError where there are too few."""
    count, size = experts.num_experts, experts.r * width
    needed = size if share == "same" else count * size
    if needed > many:
        less = "a lower experts.r" if share == "same" or count == 1 else "init.experts: same, or a lower experts.r"
        raise ConfigError(
            f"init {init} takes {needed} directions ({share}: {count} experts, r {experts.r}) and "
            f"'{experts.site.name}' has {many}; choose {less}"
        )
    first = torch.zeros(count, 1, dtype=torch.long) if share == "same" else torch.arange(count).unsqueeze(1) * size
    return first + torch.arange(size)


def spectrum(matrix: Tensor, many: int, niter: int | None = None, spare: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular directions of a matrix [O, D]: U [O, many], S [many], V [many, D].

    niter: rounds of a randomised method (Halko et al., arXiv 0909.4061) from a fixed seed, which looks at ``spare``
    times as many directions; None is exact.
    """
    if niter is None:
        U, S, V = torch.linalg.svd(matrix, full_matrices=False)
        return U[:, :many], S[:many], V[:many]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(42)  # as PEFT has it for EVA
        U, S, V = torch.svd_lowrank(matrix, q=min(many * spare, *matrix.shape), niter=niter)
    return U[:, :many], S[:many], V.t()[:many]
