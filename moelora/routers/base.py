"""Router: which experts, or ranks, each token uses. One file per router."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from moelora.core.errors import ConfigError, DataError
from moelora.core.factors import Factors
from moelora.core.module import ExactBuffers
from moelora.core.route import Route
from moelora.core.tape import Site, View
from moelora.ops.project import project


class Router(ExactBuffers, ABC):
    """The router of one site: pure given its parameters, the tokens and the view.

    Subclasses take ``(site, num_experts, r)`` first and pass them on; recipe keys follow as keyword-only arguments.
    What a subclass may state about itself:

    reads: what ``forward`` gets as x. ``"x"``: the projection's input [T, D]. ``"dropped"``: the same after the
        experts' dropout. ``"h"``: its image in rank space, A x [T, R]. ``"hidden"``: as ``"x"``, and the last hidden
        state of the model without experts is handed to ``plan`` first.
    gives: the optional fields of ``Route`` it fills, which losses may need.
    needs: what it needs of the experts, see ``Experts.gives``.
    remembers: it keeps something of earlier tokens (``view.keep``), so a cache must carry that.
    around: ``"ffn"``: it routes whole feed-forward blocks; the layers of one share its choice.
    scores: the name of its parameter [G, D] where it scores tokens by ``linear_scores``, so that layers that read the
        same tokens can have theirs together.
    scale_rank: the rank that divides lora_alpha; the expert's rank r unless said otherwise.
    units: what it has gates for, see ``Route.units``; the experts unless said otherwise.
    """

    reads: Literal["x", "dropped", "h", "hidden"] = "x"
    gives: ClassVar[tuple[str, ...]] = ()
    needs: tuple[str, ...] = ()
    remembers: ClassVar[bool] = False
    scores: ClassVar[str | None] = None
    around: ClassVar[Literal["linear", "ffn"]] = "linear"

    def __init__(self, site: Site, num_experts: int, r: int) -> None:
        super().__init__()
        self.site, self.num_experts, self.r = site, num_experts, r
        self.units = num_experts

    @classmethod
    def group(cls, site: Site, options: dict[str, Any]) -> str | None:
        """Sites of equal group have one router between them; None is a router of one's own."""
        return None

    @classmethod
    def plain(cls, site: Site, options: dict[str, Any]) -> bool:
        """Whether a site has one expert, always on, in place of routed ones: a plain LoRA beside the mixture."""
        return False

    @property
    def scale_rank(self) -> int:
        return self.r

    @property
    def chosen(self) -> int | None:
        """How many units each token chooses, None where it takes all. A hint: what is computed first goes by it."""
        return getattr(self, "top_k", None)

    @abstractmethod
    def forward(self, x: Tensor, view: View) -> Route:
        """The route of tokens x."""

    def plan(self, hidden: Tensor) -> Tensor:
        """``view.plan`` [B, S, L, E] for all sites, from the last hidden state [B, S, d] of the model without experts.

        Called once per forward for each router whose ``reads`` is ``"hidden"``, with gradients.
        """
        raise NotImplementedError(f"{type(self).__name__} reads hidden states and does not say what it makes of them")

    def constant_gates(self, task: int | None) -> Tensor | None:
        """[G] the gates of every token, where they depend on nothing but the task (-1: none known); else None.

        A router by task gives None without one. What is not None here can be merged into the base model.
        """
        return None

    def prepare(self, factors: Factors) -> None:
        """Called once when the experts have their first values, before any training."""

    def after_step(self, load: Tensor) -> None:
        """Called once per optimiser step with the load [G] that ``view.count`` recorded since the last one, summed
        over processes. For balance rules that are not gradients."""


def linear_scores(weight: Tensor, x: Tensor, view: View | None = None) -> Tensor:
    """Router logits x W^T [..., G] in float32 at least, whatever the model's dtype.

    view: of a router that is given the tokens, so that they need not be read twice where the experts read all of them.
    """
    if view is not None and view.image is not None and view.image.x is x:
        scores: Tensor = view.image.under(weight)
        return scores
    return project(x.reshape(-1, x.shape[-1]), [weight])[0].view(*x.shape[:-1], weight.shape[0])


def reset_linear(weight: Tensor) -> None:
    """The default of ``torch.nn.Linear``: uniform in +-1/sqrt(D)."""
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))


def check_top_k(name: str, top_k: int | None, units: int, kind: str = "experts (num_experts)") -> None:
    """Raise ConfigError when more units are asked for than there are."""
    if top_k is not None and top_k > units:
        raise ConfigError(f"routers.{name}: top_k {top_k} is more than the {units} {kind}")


@torch.no_grad()
def level_by_sign(bias: Tensor, load: Tensor, rate: float) -> None:
    """The balance rule of DeepSeek-V3: each unit's bias [G] moves by ``rate`` against the sign of its excess load."""
    bias += rate * torch.sign(load.mean() - load).to(bias.dtype)


def tasks_of(view: View, name: str) -> Tensor:
    """[T] task ids, -1 where unknown. Raises DataError when the batch has none."""
    return view.tasks(f"routers.{name} routes by task")


def task_experts(view: View, name: str, num_experts: int) -> Tensor:
    """[T, E] with a 1 where expert i meets a token of task i; tokens of no task (-1) have none. Raises DataError."""
    task = tasks_of(view, name)
    if task.device.type == "cpu" and (task >= num_experts).any():  # on a GPU this would wait for the device
        raise DataError(
            f"routers.{name}: task id {int(task.max())} at '{view.site.name}', but there are {num_experts} experts; "
            "give the adapter at least as many experts as there are tasks"
        )
    return task.unsqueeze(1) == torch.arange(num_experts, device=task.device)


def running_mean(values: Tensor, view: View, pool: Literal["prefix", "sequence"] = "prefix") -> Tensor:
    """Mean [T, n] of values [T, n] over the tokens of the same sequence up to and with each; float32 at least.

    pool: ``"sequence"`` takes later tokens in, too. Padding does not count, and where only padding came before the mean
    is zero. Position 0 starts another sequence of a packed row. Tokens that are no [B, S] are a sequence each.
    Sums and counts [B, n + 1] are kept in float64 for the tokens that follow in a cache. Raises ConfigError where
    ``"sequence"`` cannot be: in a cache, or in the decoder of an encoder-decoder.
    """
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    if len(view.shape) != 2:
        return values
    past, positions = view.past, view.tape.positions
    if pool == "sequence" and (past is not None or view.site.stream == "decoder"):
        raise ConfigError(
            f"'{view.site.name}' routes by the mean of the whole sequence (pool: sequence), which changes with every "
            "new token: it is for encoders and cannot decode with a cache; use pool: prefix"
        )
    exact = torch.float32 if values.device.type == "mps" else torch.float64  # sums of packed rows are subtracted
    rows = values.unflatten(0, view.shape).to(exact)
    valid = rows.new_ones(view.shape, dtype=torch.bool) if view.mask is None else view.mask.view(view.shape)
    items = torch.cat([rows.masked_fill(~valid.unsqueeze(-1), 0), valid.unsqueeze(-1).to(exact)], -1)
    kept = items.new_zeros(items.shape[0], items.shape[2]) if past is None else past
    items = torch.cat([kept.unsqueeze(1), items], 1)  # it stands before the first token
    sums = items.cumsum(1)
    last = torch.full_like(sums[..., :1], sums.shape[1] - 1, dtype=torch.long)
    if positions is not None and positions.shape in (view.shape, (1, view.shape[1])):
        starts = nn.functional.pad(((positions == 0) & valid).long(), (1, 0)).cumsum(1)  # number of the sequence
        before = nn.functional.pad(sums, (0, 0, 1, -1))
        sums = sums - before.gather(1, torch.searchsorted(starts, starts).unsqueeze(-1).expand_as(sums))
        last = torch.searchsorted(starts, starts, right=True).unsqueeze(-1) - 1
    view.keep(sums[:, -1])
    sums = sums if pool == "prefix" else sums.gather(1, last.expand_as(sums))
    mean = sums[..., :-1] / sums[..., -1:].clamp(min=1)
    return mean[:, 1:].flatten(0, 1).to(values.dtype)
