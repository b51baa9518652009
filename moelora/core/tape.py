"""Tape: the state of one forward pass, and Port: where the layers of one model find the current tape.

The model opens a tape around each forward; a layer asks the port for its view of it and hands that to
its router and losses. Nothing is left on modules or globals, so two forwards may precede one backward,
and a recomputed (checkpointed) region replays its own tape: recording is muted, computing is not, and
the choices of units made in the first pass are reused.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from moelora.core.errors import DataError, MoeloraError
from moelora.core.factors import Factors
from moelora.core.route import Route
from moelora.core.term import Product


@dataclass(frozen=True, slots=True)
class Site:
    """One adapted place.

    name: module path in the base model. index: position among all ``count`` sites. stream: which tokens it reads,
    ``"input"``, or in an encoder-decoder ``"decoder"``. block: number of the transformer block it lies in, of
    ``blocks``, or None. hidden_size: width of the model's last hidden state, or None where the model does not say.
    """

    name: str
    index: int
    in_features: int
    out_features: int
    stream: str = "input"
    count: int = 1
    block: int | None = None
    blocks: int = 0
    hidden_size: int | None = None

    @property
    def parent(self) -> str:
        """Path of the module that holds the layer."""
        return self.name.rpartition(".")[0]

    @property
    def in_attention(self) -> bool:
        """Whether the module that holds it is called attention; it may lie in one named self, output or by a number."""
        return re.search(r"(?i)(attn|attention)[^.]*(\.(self|output|\d+))*\.[^.]+$", self.name) is not None


@dataclass
class Tape:
    """One forward pass of one model.

    mask: per stream, [B, S] bool, True for real tokens; a missing stream has only real tokens.
    answers: per stream, [B, S] bool, True for tokens whose prediction carries loss; missing without labels.
    task: [B] or [B, S] int64 task ids, -1 where unknown.
    positions: [B, S] position ids, zero at each start of a packed sequence.
    plan: [B, S, L, E] what ``Router.plan`` made of the base model's last hidden state.
    past: what routers kept of the tokens before these, when decoding with a cache; kept: what they keep now.
    shared: routes that one layer of a feed-forward block leaves to the next. images: what a layer's first fellow read
        of their tokens for it, by site index, with the tokens themselves (``moelora.model.fellows``).
    with_terms: whether layers compute their auxiliary terms in this pass.
    called, read: sites that were called, and sites whose weight was looked at.
    """

    mask: dict[str, Tensor] = field(default_factory=dict)
    answers: dict[str, Tensor] = field(default_factory=dict)
    task: Tensor | None = None
    positions: Tensor | None = None
    plan: Tensor | None = None
    past: dict[int, Tensor] = field(default_factory=dict)
    kept: dict[int, Tensor] = field(default_factory=dict)
    shared: dict[str, Route] = field(default_factory=dict)
    images: dict[int, tuple[Tensor, Any]] = field(default_factory=dict)
    called: set[int] = field(default_factory=set)
    read: set[int] = field(default_factory=set)
    with_terms: bool = False
    terms: dict[str, list[Tensor | Product]] = field(default_factory=dict)
    load: dict[int, Tensor] = field(default_factory=dict)
    observer: Callable[[View, Route], None] | None = None
    _choices: list[Tensor] | None = None
    _replay: Iterator[Tensor] | None = None

    @property
    def recording(self) -> bool:
        """False while a checkpointed region is being recomputed."""
        return self._replay is None

    def view(self, site: Site, shape: torch.Size, factors: Factors | None = None, image: Any = None) -> View:
        """What ``site`` may know of this pass; ``shape`` is its input's without the feature axis. See View."""
        self.called.add(site.index)
        mask, answers = (_of_tokens(of.get(site.stream), shape) for of in (self.mask, self.answers))
        return View(self, site, shape, mask, self._task(shape), answers, factors, image)

    def _task(self, shape: torch.Size) -> Tensor | None:
        if self.task is None:
            return None
        if self.task.shape == shape:
            return self.task.reshape(-1)
        if not shape or self.task.shape[:1] != shape[:1]:
            return None
        per_sequence = self.task if self.task.dim() == 1 else self.task[:, -1]
        return per_sequence.view(-1, *[1] * (len(shape) - 1)).expand(shape).reshape(-1)

    @contextmanager
    def remember(self, choices: list[Tensor]) -> Iterator[None]:
        """Keep the choices made inside, for a later replay of the same code."""
        outer, self._choices = self._choices, choices
        try:
            yield
        finally:
            self._choices = outer

    @contextmanager
    def replay(self, choices: list[Tensor]) -> Iterator[None]:
        """Repeat the choices in order and record nothing."""
        outer, self._replay = self._replay, iter(choices)
        try:
            yield
        finally:
            self._replay = outer


@dataclass(frozen=True, slots=True)
class View:
    """One layer's view of the tape during one call.

    shape: the input's shape without features, T = its product. mask: [T] bool or None.
    task: [T] int64, -1 where unknown, or None. answers: [T] bool or None, see Tape. factors: the layer's experts.
    image: the tokens as the experts see them, with what is known of them in rank space (``moelora.ops.project``).
    """

    tape: Tape
    site: Site
    shape: torch.Size
    mask: Tensor | None
    task: Tensor | None
    answers: Tensor | None = None
    factors: Factors | None = None
    image: Any = None

    @property
    def plan(self) -> Tensor:
        """[T, L, E] the router's plan for these tokens. Raises MoeloraError when there is none for them."""
        plan, where = self.tape.plan, f"'{self.site.name}'"
        if plan is None:
            raise MoeloraError(f"{where} routes by the model's last hidden state; call the whole model, not a part")
        if plan.shape[:-2] != self.shape:
            raise MoeloraError(
                f"{where} reads {tuple(self.shape)} states and the model has {tuple(plan.shape[:-2])} tokens: a router "
                "that plans by token cannot serve it; leave it out with exclude_modules"
            )
        return plan.reshape(-1, *plan.shape[-2:])

    def tasks(self, why: str) -> Tensor:
        """[T] task ids, -1 where unknown. Raises DataError when the batch has none; ``why`` says who needs them."""
        if self.task is None:
            raise DataError(
                f"{why}, and '{self.site.name}' was given none; pass task_ids=[B] or [B, S] to the model or to "
                "generate (moelora.MoeLoraTrainer does, from the data's task column; transformers.Trainer drops them "
                "unless remove_unused_columns=False)"
            )
        return self.task

    @property
    def past(self) -> Tensor | None:
        """What this site kept of the tokens before these, [B, ...], or None at the start of a sequence."""
        return self.tape.past.get(self.site.index)

    def keep(self, value: Tensor) -> None:
        """Keep [B, ...] for the tokens that follow these in a cache."""
        if self.tape.recording:
            self.tape.kept[self.site.index] = value.detach()

    def only(self, tokens: str) -> View:
        """This view, its mask narrowed to ``"answers"``; as it is for ``"all"``. Raises DataError without labels."""
        if tokens == "all":
            return self
        if not self.tape.answers:
            raise DataError("a loss with tokens: answers needs labels [B, S] in the batch; without them, tokens: all")
        if self.answers is None:
            return self
        return replace(self, mask=self.answers if self.mask is None else self.answers & self.mask)

    def once(self, choose: Callable[[], Tensor]) -> Tensor:
        """``choose()``, or what it gave in the first pass when a checkpointed region is recomputed.

        Near ties may fall differently the second time, and gradients would then belong to other experts.
        """
        tape = self.tape
        if tape._replay is not None:
            return next(tape._replay)
        with torch.no_grad():  # a choice saves nothing for backward, in the first pass as in the replay
            chosen = choose()
        if tape._choices is not None:
            tape._choices.append(chosen)
        return chosen

    def add(self, name: str, term: Tensor | Product) -> None:
        """Record an auxiliary term of this site: a scalar, or a product over processes."""
        if self.tape.recording:
            self.tape.terms.setdefault(name, []).append(term)

    def count(self, load: Tensor) -> None:
        """Record how many tokens chose each unit, [G], for balance updates after the optimiser step."""
        if self.tape.recording:
            seen = self.tape.load.get(self.site.index)
            self.tape.load[self.site.index] = load if seen is None else seen + load

    def observe(self, route: Route) -> None:
        """Show the route to whoever collects statistics of this pass."""
        if self.tape.recording and self.tape.observer is not None:
            self.tape.observer(self, route)


class Port:
    """The one place where the layers of a model find its current tape. Shared by reference, not a module."""

    def __init__(self) -> None:
        self.enabled = True
        self.tape: Tape | None = None
        self.collectors: list[Collector] = []
        self.load: dict[int, Tensor] = {}  # per site, since the last optimiser step
        self._thread: int | None = None

    @contextmanager
    def on(self, tape: Tape) -> Iterator[Tape]:
        """Make ``tape`` the current one."""
        me = None if torch.compiler.is_compiling() else threading.get_ident()  # a compiler cannot trace it
        if me is not None and self.tape is not None and self._thread != me:
            raise MoeloraError(
                "this model is already in a forward pass of another thread, as nn.DataParallel and threaded servers "
                "do it; start one process per GPU (torchrun, accelerate launch), or guard the model with a lock"
            )
        outer, self.tape, self._thread = (self.tape, self._thread), tape, me
        try:
            yield tape
        finally:
            self.tape, self._thread = outer

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """(forward, recompute) contexts of one region, for ``torch.utils.checkpoint(context_fn=...)``."""
        tape = self.tape
        if tape is None:
            return nullcontext(), nullcontext()
        choices: list[Tensor] = []
        return tape.remember(choices), _Recompute(self, tape, choices)


class _Recompute:
    """The recompute context of one region. Entered anew at every backward through it, so not a generator."""

    def __init__(self, port: Port, tape: Tape, choices: list[Tensor]) -> None:
        self.port, self.tape, self.choices = port, tape, choices

    def __enter__(self) -> None:
        self.stack = ExitStack()
        self.stack.enter_context(self.port.on(self.tape))
        self.stack.enter_context(self.tape.replay(self.choices))

    def __exit__(self, *error: Any) -> None:
        self.stack.__exit__(*error)


def _of_tokens(mask: Tensor | None, shape: torch.Size) -> Tensor | None:
    """[B, S] as [T] for tokens of ``shape``; the newest ones when decoding; None for what is no sequence."""
    if mask is not None and mask.shape != shape:
        # Decoding with a cache: the mask covers the past too. Other shapes are not sequences (a pooled state).
        fits = len(shape) == 2 and mask.shape[0] == shape[0] and mask.shape[1] > shape[1]
        mask = mask[:, mask.shape[1] - shape[1] :] if fits else None
    return None if mask is None else mask.reshape(-1)


@dataclass
class Collector:
    """Takes the auxiliary terms of the forwards inside ``moelora.model.collect`` into its own hands.

    terms: name to scalar, one dict per forward. observer: called with every (View, Route), or None.
    with_terms: whether terms are computed outside of training too.
    """

    observer: Callable[[View, Route], None] | None = None
    with_terms: bool = True
    terms: list[dict[str, Tensor]] = field(default_factory=list)
