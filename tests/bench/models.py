"""Whole models: training steps and generation with X-LoRA beside PEFT's, and of mixtures beside PEFT's LoRA.

A Llama with random weights, experts on all linear layers. PEFT's X-LoRA gets our experts and our head; both are first
compared with our model in float64: logits, and the gradient of every parameter of the head. Generated tokens are
compared with the best ones of the same float64 model.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import moelora
from moelora.model.record import routed_layers
from tests.bench.measure import Clock, Row, largest_error, name_of, peak_bytes, row, saved_bytes, timed

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OURS, PEFT = "moelora X-LoRA", "PEFT X-LoRA"
TRAIN, GENERATE = "training step", "generation"
BOUND = 1e-4
"""Largest error of float32 logits and gradients through a whole model, and largest gap of a chosen token."""

Models = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Shape:
    """A model and its batch; attention has heads of 64 features unless said otherwise.

    new: generated tokens, after a prompt of so many.
    """

    hidden: int = 512
    inner: int = 1376
    layers: int = 4
    vocab: int = 4096
    heads: int = 0
    key_heads: int = 0
    experts: int = 8
    rank: int = 8
    batch: int = 4
    length: int = 256
    prompt: int = 64
    new: int = 128

    def __str__(self) -> str:
        return f"Llama {self.layers} x {self.hidden}, batch {self.batch} x {self.length}"


@dataclass(frozen=True)
class Maker:
    """Makes models of one shape, always with the same base weights."""

    s: Shape
    device: torch.device
    dtype: torch.dtype

    def base(self) -> Any:
        s = self.s
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=s.vocab,
            hidden_size=s.hidden,
            intermediate_size=s.inner,
            num_hidden_layers=s.layers,
            num_attention_heads=s.heads or s.hidden // 64,
            num_key_value_heads=s.key_heads or s.heads or s.hidden // 64,
            max_position_embeddings=max(s.length, s.prompt + s.new),
            eos_token_id=None,
            pad_token_id=0,
        )
        with self.device:
            return LlamaForCausalLM(config).to(self.dtype)

    def frozen(self) -> Any:
        """The base without experts, with a gradient through all of it."""
        model = self.base().requires_grad_(False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers speaks of a method of its own
            model.enable_input_require_grads()
        return model

    def adapted(self, router: dict[str, Any], **experts: Any) -> Any:
        """With our experts; B is not zero, so that routing matters."""
        size = {"num_experts": self.s.experts, "r": self.s.rank, "lora_alpha": self.s.rank}
        config = {"experts": {**size, **experts}, "router": router, "target_modules": TARGETS}
        model = moelora.adapt(self.base(), config, verbose=False)
        for layer in routed_layers(model):
            nn.init.normal_(layer.experts.lora_B, std=0.02)
        return model

    def xlora(self, trained: bool) -> Any:
        router = {"name": "xlora", "xlora_depth": 2, "xlora_size": 64, "xlora_dropout_p": 0.0}
        return self.adapted(router, train="all" if trained else "none")

    def peft_xlora(self, mine: Any, trained: bool) -> Any:
        """PEFT's X-LoRA with the experts and the head of ``mine``."""
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            moelora.save(mine, Path(folder) / "adapter")
            found = sorted((Path(folder) / "adapter" / "experts").iterdir())
            model = self.base()
            model.config.use_cache = False
            config = peft.XLoraConfig(
                task_type="CAUSAL_LM",
                hidden_size=self.s.hidden,
                adapters={str(number): str(path) for number, path in enumerate(found)},
                xlora_depth=2,
                xlora_size=64,
                xlora_dropout_p=0.0,
                use_trainable_adapters=trained,
            )
            made = peft.get_peft_model(model, config).to(self.device)
        for own, other in zip(head(mine), head(made), strict=True):
            other.load_state_dict(own.state_dict())
        return made

    def peft_lora(self, wide: bool = True) -> Any:
        """One LoRA of as many ranks as all experts have. wide: its factors are float32, PEFT's default."""
        rank = self.s.experts * self.s.rank
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, init_lora_weights=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return peft.get_peft_model(self.base(), config, autocast_adapter_dtype=wide)


def head(model: Any) -> list[nn.Linear]:
    """The linear layers of an X-LoRA model's head."""
    if isinstance(model, peft.PeftModel):
        parts = model.base_model.internal_xlora_classifier.layers
    else:
        parts = routed_layers(model)[0].router.head
    return [part for part in parts if isinstance(part, nn.Linear)]


class Training:
    """A training step as in practice: forward, backward, and AdamW on what is trained. It changes no weight.

    A half-precision model is trained under autocast, as trainers do it.
    """

    def __init__(self, model: Any, ids: Tensor) -> None:
        self.model, self.ids = model.train(), ids
        self.half = torch.autocast(ids.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.0) if trained else None

    def __call__(self) -> None:
        self.loss().backward()
        if self.optimizer is not None:
            self.optimizer.step()
        self.model.zero_grad(set_to_none=True)

    def loss(self) -> Tensor:
        with self.half:
            return self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss

    def held(self) -> int:
        """Bytes of the model and of its optimizer."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        for state in self.optimizer.state.values() if self.optimizer is not None else ():
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
        return sum(tensor.nbytes for tensor in tensors)

    def results(self) -> list[Tensor]:
        """Of X-LoRA: logits, and the gradients of its head."""
        out = self.model(input_ids=self.ids, labels=self.ids, use_cache=False)
        parameters = [parameter for part in head(self.model) for parameter in part.parameters()]
        return [out.logits.detach(), *torch.autograd.grad(out.loss, parameters)]


def training(make: Maker, case: str, models: Models, clock: Clock, compare: set[str]) -> Iterator[Row]:
    """Rows of one case. The first model is ours; those to be compared are held against its float64 copy."""
    s = make.s
    ids = torch.randint(3, s.vocab, (s.batch, s.length), device=make.device)
    steps = {name: Training(build(), ids) for name, build in models.items()}
    ours, rows = next(iter(models)), []
    base = make.base()
    plain = sum(tensor.nbytes for tensor in [*base.parameters(), *base.buffers()])
    wanted = Training(copy.deepcopy(steps[ours].model).double(), ids).results() if compare else []
    for name, step in steps.items():
        error = largest_error(step.results(), wanted) if name in compare else None
        refused = error is not None and not error <= BOUND
        one = row("model", f"{s}: {case}", make.dtype, TRAIN, name, error=error, refused=refused)
        rows.append(one)
        if not refused:
            step()  # the optimizer's state comes with the first step
            given = [*step.model.parameters(), *step.model.buffers(), ids]
            one["saved_bytes"] = saved_bytes(step.loss, given)
            one["peak_bytes"] = step.held() - plain + peak_bytes(step, make.device)
    timed(rows, steps, ours, clock)
    yield from rows


def generation(make: Maker, models: Models, clock: Clock, compare: set[str]) -> Iterator[Row]:
    """Rows of greedy generation, batch 1. error: by how much a chosen token's logit misses the best one's."""
    s = make.s
    ids = torch.randint(3, s.vocab, (1, s.prompt), device=make.device)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": s.new, "do_sample": False}
    made = {name: build().eval() for name, build in models.items()}
    ours, rows = next(iter(models)), []
    oracle = copy.deepcopy(made[ours]).double()
    for name, model in made.items():
        tokens = model.generate(**given)
        error = missed(oracle, tokens, s.prompt) if name in compare else None
        refused = error is not None and not error <= BOUND
        case = f"{s}: {s.new} tokens after {s.prompt}"
        rows.append(row("model", case, make.dtype, GENERATE, name, error=error, refused=refused))
    timed(rows, {name: lambda m=model: m.generate(**given) for name, model in made.items()}, ours, clock)
    yield from rows


@torch.no_grad()
def missed(oracle: Any, ids: Tensor, start: int) -> float:
    """The largest gap between the best logit and the chosen token's, relative to the largest logit."""
    logits = oracle(input_ids=ids, use_cache=False).logits[:, start - 1 : -1]
    chosen = logits.gather(-1, ids[:, start:].unsqueeze(-1)).squeeze(-1)
    return float((logits.amax(-1) - chosen).max() / logits.abs().max())


def suite(s: Shape, dtype: torch.dtype, clock: Clock) -> Iterator[Row]:
    """Every row of whole models."""
    make = Maker(s, clock.device, dtype)
    for trained in (False, True):
        mine = make.xlora(trained)
        models: Models = {
            OURS: lambda mine=mine: mine,
            PEFT: lambda mine=mine, trained=trained: make.peft_xlora(mine, trained),
            **references(make),
        }
        kind = "X-LoRA, experts trained" if trained else "X-LoRA, experts frozen"
        yield from training(make, f"{kind}, {s.experts} of rank {s.rank}", models, clock, {OURS, PEFT})
        if not trained:
            yield from generation(make, models, clock, {OURS, PEFT})
    yield from mixtures(make, clock)


def references(make: Maker) -> Models:
    lora = f"PEFT LoRA r={make.s.experts * make.s.rank}"
    narrow: Models = {f"{lora}, {name_of(make.dtype)} factors": lambda: make.peft_lora(wide=False)}
    return {lora: make.peft_lora, **(narrow if make.dtype == torch.bfloat16 else {}), "base, frozen": make.frozen}


def mixtures(make: Maker, clock: Clock) -> Iterator[Row]:
    """Training steps of mixtures beside PEFT's LoRA of as many ranks."""
    s = make.s
    ranks = s.experts * s.rank
    whole = {"num_experts": 1, "r": ranks, "lora_alpha": ranks}
    models: Models = {
        f"moelora SMoRA, 8 of {ranks} ranks": lambda: make.adapted({"name": "smora", "top_k": 8}, **whole),
        f"moelora MeteoRA, 2 of {s.experts} experts": lambda: make.adapted({"name": "meteora", "top_k": 2}),
        "moelora single": lambda: make.adapted({"name": "single"}, **whole),
        **references(make),
    }
    yield from training(make, f"rank {ranks}", models, clock, set())
