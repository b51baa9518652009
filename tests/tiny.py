"""Tiny seeded models, inputs and adapter configurations that the tests share."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import moelora
from moelora.core.methods import Methods
from moelora.core.route import Route
from moelora.core.start import Start
from moelora.core.tape import Site, Tape, View
from moelora.experts.base import Experts
from moelora.model.layer import RoutedLinear
from moelora.model.record import routed_layers
from moelora.routers.base import Router

VOCAB = 64
HIDDEN = 32
SMALL_INIT = {"initializer_range": 0.2}  # larger than usual, so that tiny models give distinct logits
NO_DROPOUT_GPT2 = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
NO_DROPOUT_BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _seeded(cls: type[nn.Module], config: Any, seed: int, dtype: torch.dtype) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls(config).to(dtype).train()


_LLAMA = {
    **{"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 40, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **SMALL_INIT},
}


def llama(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> LlamaForCausalLM:
    """Two blocks, grouped-query attention."""
    return _seeded(LlamaForCausalLM, LlamaConfig(**{**_LLAMA, **options}), seed, dtype)


def qwen(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Qwen2ForCausalLM:
    """Llama's blocks with a bias in q, k and v, zero as long as nothing trains it."""
    return _seeded(Qwen2ForCausalLM, Qwen2Config(**{**_LLAMA, **options}), seed, dtype)


def gpt2(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> GPT2LMHeadModel:
    """Its linear layers are Conv1D, and its output head shares the embedding."""
    shape = {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 64}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = GPT2Config(**{**shape, **ids, **NO_DROPOUT_GPT2, **SMALL_INIT, **options})
    return _seeded(GPT2LMHeadModel, config, seed, dtype)


def bert(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> BertForSequenceClassification:
    """An encoder whose pooler and classifier see one state per sequence."""
    shape = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"intermediate_size": 40, "max_position_embeddings": 64, "num_labels": 3}
    config = BertConfig(**{**shape, **more, **NO_DROPOUT_BERT, **SMALL_INIT, **options})
    return _seeded(BertForSequenceClassification, config, seed, dtype)


def t5(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> T5ForConditionalGeneration:
    """An encoder-decoder. Eager attention: the fused one adds up in another order when its bias requires a gradient."""
    shape = {"vocab_size": VOCAB, "d_model": HIDDEN, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4}
    ids = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
    config = T5Config(**{**shape, **ids, "dropout_rate": 0.0, "attn_implementation": "eager", **options})
    return _seeded(T5ForConditionalGeneration, config, seed, dtype)


def mamba(seed: int = 0, dtype: torch.dtype = torch.float32) -> MambaForCausalLM:
    """A state-space model. Its dt_proj is never called: the weight is multiplied by hand."""
    shape = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 4}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return _seeded(MambaForCausalLM, MambaConfig(**shape, **ids, **SMALL_INIT), seed, dtype)


MODELS: dict[str, Callable[..., Any]] = {"llama": llama, "gpt2": gpt2, "bert": bert, "t5": t5}

TARGETS: dict[str, list[str]] = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "bert": ["query", "value", "dense"],
    "t5": ["q", "v", "wo"],
}

FFN_TARGETS: dict[str, list[str]] = {
    "llama": ["gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_fc", "mlp.c_proj"],
    "t5": ["wi", "wo"],
}
"""Whole feed-forward blocks, for routers around them; BERT's lie in two modules."""

ATTENTION_TARGETS: dict[str, list[str]] = {
    "llama": ["q_proj", "v_proj"],
    "gpt2": ["c_attn", "attn.c_proj"],
    "t5": ["q", "o"],
}
"""Layers of attention, for a LoRA beside such blocks."""

_ANY = {"experts": {"num_experts": 4, "r": 4, "lora_alpha": 8}}
_DRY = {"xlora_dropout_p": 0.0}
_CORES = {"experts": {"name": "core", "num_experts": 4, "r": 3, "lora_alpha": 6}}  # r is not the number of experts
METHODS: dict[str, dict[str, Any]] = {
    **{name: {"router": name, **_ANY} for name in Methods().names("routers")},  # a new router is tested at its defaults
    "single": {"router": "single", "experts": {"r": 4, "lora_alpha": 8}},
    "smora": {
        "router": {"name": "smora", "top_k": 4, "bias_update_rate": 0.01},
        "experts": {"r": 8, "lora_alpha": 8},
    },
    "smora_blocks": {
        "router": {"name": "smora", "top_k": 4, "block_size": 2, "score_fn": "softmax", "bias_in_gate": False},
        "experts": {"num_experts": 2, "r": 4, "lora_alpha": 8},
    },
    "meteora": {
        "router": {"name": "meteora", "top_k": 2, "temperature": 2.0},
        "experts": {"num_experts": 3, "r": 4, "lora_alpha": 8},
    },
    "softmax_top2": {"router": {"name": "softmax", "top_k": 2, "renorm": False}, **_ANY},
    "hydra": {"router": "softmax", "experts": {"name": "hydra", "num_experts": 4, "r": 4, "lora_alpha": 8}},
    "task_shared": {"router": {"name": "task", "gate": "table", "num_tasks": 3, "shared": True}, **_ANY},
    "lora_mixer_hard": {"router": {"name": "lora_mixer", "routing": "hard"}, **_ANY},
    "lora_mixer_through": {"router": {"name": "lora_mixer", "routing": "straight_through", "top_k": 2}, **_ANY},
    "smear_merged": {"router": "smear", "experts": {"name": "merged", "num_experts": 4, "r": 4, "lora_alpha": 8}},
    "flylora": {
        "router": {"name": "flylora", "top_k": 3, "bias_update_rate": 0.01},
        "experts": {"r": 8, "lora_alpha": 8, "train": "B"},
        "init": {"name": "sparse", "density": 0.4},
    },
    "mixlora_attention": {"router": {"name": "mixlora", "attention": "lora"}, **_ANY},
    "comol": {"router": "comol", **_CORES},
    "comol_x": {"router": {"name": "comol", "route_on": "x"}, **_CORES},
    "xlora": {"router": {"name": "xlora", **_DRY}, **_ANY},
    "xlora_layers": {
        "router": {"name": "xlora", "xlora_depth": 2, "xlora_size": 8, "layerwise_scalings": True, "top_k": 2, **_DRY},
        **_ANY,
    },
}
"""One configuration per router, and more for the options that change what it does."""


def router_of(method: str) -> type[Router]:
    """The class of a method's router: what it says of itself decides which tests it takes part in."""
    router = METHODS[method]["router"]
    found: type[Router] = Methods().find("routers", router if isinstance(router, str) else router["name"])
    return found


def experts_of(method: str) -> type[Experts]:
    """The class of a method's experts."""
    found: type[Experts] = Methods().find("experts", METHODS[method]["experts"].get("name", "lora"))
    return found


def fits(kind: str, method: str) -> bool:
    """Whether a method runs on a kind of model.

    A router of hidden states reads one stream of tokens: neither BERT's pooled states nor an encoder-decoder's two.
    """
    router = router_of(method)
    if router.reads == "hidden":
        return kind not in ("bert", "t5")
    return router.around == "linear" or kind in FFN_TARGETS


def targets(kind: str, method: str) -> list[str]:
    """The layers that a method adapts on a kind of model."""
    router: Any = METHODS[method]["router"]
    if router_of(method).around == "linear":
        return TARGETS[kind]
    beside = isinstance(router, dict) and router.get("attention") == "lora"
    return [*FFN_TARGETS[kind], *(ATTENTION_TARGETS[kind] if beside else [])]


PAIRS = [(method, kind) for kind in MODELS for method in METHODS if fits(kind, method)]
"""Every method on every kind of model it runs on."""


def batch(kind: str = "llama", rows: int = 3, length: int = 7, seed: int = 1, padded: bool = True) -> dict[str, Tensor]:
    """Inputs with labels for a model of ``MODELS``; right padding of 0, 2 and 3 tokens unless ``padded`` is False."""
    made = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=made)
    mask = torch.ones_like(ids)
    if padded:
        for row, cut in zip(range(rows), [0, 2, 3] * rows, strict=False):
            mask[row, length - cut :] = 0
        ids = ids * mask
    given = {"input_ids": ids, "attention_mask": mask}
    if kind == "bert":
        return {**given, "labels": torch.randint(0, 3, (rows,), generator=made)}
    if kind == "t5":
        labels = torch.randint(3, VOCAB, (rows, length - 2), generator=made)
        labels[0, -2:] = -100
        return {**given, "labels": labels}
    return {**given, "labels": ids.masked_fill(mask == 0, -100)}


def given(kind: str = "llama", seed: int = 1, **how: Any) -> dict[str, Tensor]:
    """A batch with the task of every row, which routers by task need and others ignore."""
    made = batch(kind, seed=seed, **how)
    return {**made, "task_ids": torch.arange(len(made["input_ids"])) % 3}


def checkpointing(model: Any, **kwargs: Any) -> Any:
    """The model with gradient checkpointing on, by the name that every transformers 5 knows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # later releases prefer another name
        model.gradient_checkpointing_enable(**kwargs)
    return model


def unlabelled(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same inputs for a forward without a loss."""
    return {key: value for key, value in given.items() if key != "labels"}


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 to w63 are the token ids 0 to 63; left padding, no special tokens added."""
    words = {f"w{number}": number for number in range(VOCAB)}
    inner = Tokenizer(WordLevel(words, unk_token="w3"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="w0",
        bos_token="w1",
        eos_token="w2",
        unk_token="w3",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _no_weight() -> Tensor:
    raise AssertionError("a start that needs no base weight asked for it")


START = Start(_no_weight)
"""For initialisers that look at nothing."""


def adapted(kind: str, method: str = "smora", seed: int = 0, noise: float = 0.3, **more: Any) -> Any:
    """A tiny model with experts. noise: spread of a random lora_B, so that experts matter; 0 leaves it zero."""
    dtype = more.pop("dtype", torch.float32)
    model = MODELS[kind](seed, dtype, **more.pop("options", {}))
    config = {**METHODS[method], "target_modules": targets(kind, method), **more}
    return shake(adapt(model, config, seed), noise, seed)


def adapt(model: Any, config: dict[str, Any], seed: int = 0) -> Any:
    """``moelora.adapt`` from a fixed random state, silently."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        return moelora.adapt(model, config, verbose=False)


@torch.no_grad()
def shake(model: Any, noise: float = 0.3, seed: int = 0) -> Any:
    """Give every expert a random lora_B, and let routers prepare for it, as if trained ones had been loaded."""
    made = torch.Generator().manual_seed(seed + 2)
    for layer in routed_layers(model):
        b = layer.experts.lora_B
        b.copy_(noise * torch.randn(b.shape, generator=made, dtype=torch.float64))
        layer.router.prepare(layer.experts.factors())
    return model


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that train, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the gradients by name; every trainable parameter has one."""
    found = {}
    for name, parameter in trainable(model).items():
        assert parameter.grad is not None, f"{name} got no gradient"
        found[name] = parameter.grad.clone()
    return found


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    """Equal bit for bit, name by name."""
    assert one.keys() == two.keys()
    different = [name for name in one if not torch.equal(one[name], two[name])]
    assert not different, f"differ: {different}"


def biases(model: nn.Module) -> dict[str, Tensor]:
    """Copies of SMoRA's balance biases by name."""
    return {name: b.clone() for name, b in model.named_buffers() if name.endswith("router.bias")}


class Toy(nn.Module):
    """One float64 layer, for comparing a whole routed layer with an oracle. Its own output is its last hidden state."""

    def __init__(self, wide: int = 5, out: int = 7, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.lin = nn.Linear(wide, out, dtype=torch.float64)
        self.config = SimpleNamespace(hidden_size=out)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.lin(x)

    @property
    def base_model(self) -> Any:
        return _Backbone(self.lin)


class _Backbone:
    def __init__(self, lin: nn.Module) -> None:
        self.lin = lin

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(last_hidden_state=self.lin(x))

    def __call__(self, x: Tensor, return_dict: bool) -> Any:
        return self.forward(x)


def toy(config: dict[str, Any], wide: int = 5, out: int = 7, seed: int = 0) -> tuple[Toy, RoutedLinear]:
    """An adapted ``Toy`` with random lora_B, and its one layer."""
    model = shake(adapt(Toy(wide, out, seed), {"target_modules": ["lin"], **config}, seed), 1.0, seed)
    layer = model.lin
    assert isinstance(layer, RoutedLinear)
    return model, layer


Oracle = Callable[[dict[str, Tensor], Tensor], tuple[Tensor, Tensor]]
"""(parameters W, b, A, B, Wg, tokens x [T, D]) to (y [T, O], gates [T, G])."""


def assert_layer_equals(
    model: Toy,
    layer: RoutedLinear,
    oracle: Oracle,
    tokens: int = 6,
    rtol: float = 1e-11,
    task: Tensor | None = None,
) -> None:
    """A whole routed layer against its formula: output, gates, and the gradient of everything that has one.

    The oracle's parameters go by W, b, A, B, Wg, and by their own names beyond these. task: [T] ids for the layer.
    """
    made = torch.Generator().manual_seed(5)
    x = torch.randn(2, tokens // 2, layer.in_features, generator=made, dtype=torch.float64)
    parameters = {"W": layer.base_layer.weight, "b": layer.base_layer.bias}
    renamed = {"lora_A": "A", "lora_B": "B", "weight": "Wg"}
    for part in (layer.experts, layer.router):
        parameters.update({renamed.get(name, name): parameter for name, parameter in part.named_parameters()})
    mine = x.clone().requires_grad_()
    gates: list[Tensor] = []
    with moelora.collect(model, lambda view, route: gates.append(route.dense())):
        y = model(mine) if task is None else model(mine, task_ids=task.view(x.shape[:-1]))
    upstream = torch.randn(y.shape, generator=made, dtype=torch.float64)
    y.backward(upstream)

    copies = {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in parameters.items()}
    theirs = x.reshape(-1, layer.in_features).clone().requires_grad_()
    expected, gate = oracle(copies, theirs)
    expected.backward(upstream.reshape(expected.shape))
    close = {"rtol": rtol, "atol": rtol}
    torch.testing.assert_close(y.reshape(expected.shape), expected, **close)
    torch.testing.assert_close(gates[0], gate, **close)
    torch.testing.assert_close(mine.grad.reshape(theirs.shape), theirs.grad, **close)
    for name, p in parameters.items():
        wanted = copies[name].grad
        assert (p.grad is None) == (not p.requires_grad), name
        if p.requires_grad:
            wanted = torch.zeros_like(p) if wanted is None else wanted
            torch.testing.assert_close(p.grad, wanted, **close, msg=lambda m, name=name: f"{name}: {m}")


def routes(model: nn.Module, **given: Tensor) -> list[Route]:
    """The routes of one forward without gradients, in site order; nothing is counted or added to a loss."""
    found: dict[int, Route] = {}
    with torch.no_grad(), moelora.collect(model, lambda view, route: found.setdefault(view.site.index, route)):
        model(**given)
    return [found[index] for index in sorted(found)]


def view(shape: tuple[int, ...], mask: Tensor | None = None, **tape: Any) -> View:
    """The view of a site that sees tokens of this shape; mask: [B, S], True for real tokens."""
    site = Site("site", 0, 5, 7)
    masks = {} if mask is None else {"input": mask.bool()}
    return Tape(mask=masks, **tape).view(site, torch.Size(shape))


def route(logits: Tensor, k: int) -> Route:
    """A top-k route over softmax scores, made without any router."""
    probs = logits.softmax(-1)
    index = logits.argsort(-1, descending=True)[:, :k]
    return Route(probs.gather(1, index), logits.shape[-1], index, logits, probs)
