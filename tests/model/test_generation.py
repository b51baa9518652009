"""generate and pipeline on an adapted model: a cache changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import pipeline

import moelora
from moelora.core.errors import DataError
from moelora.model.record import routed_layers
from tests import tiny

KINDS = ["llama", "gpt2", "t5"]
NEW = 8


def model_for(kind: str, method: str, **more: Any) -> Any:
    """float64, so that two orders of summation never decide a token."""
    model = tiny.adapted(kind, method, dtype=torch.float64, noise=0.5, **more).eval()
    if kind == "t5":  # with its embedding as output head, an untrained T5 only repeats itself
        model.lm_head.weight = torch.nn.Parameter(torch.randn(tiny.VOCAB, tiny.HIDDEN, dtype=torch.float64))
    return model


def prompts(kind: str, left_padded: bool) -> dict[str, Tensor]:
    given = tiny.unlabelled(tiny.given(kind, rows=3, length=6, padded=False))
    if left_padded:
        for row, cut in enumerate([0, 2, 4]):
            given["attention_mask"][row, :cut] = 0
            given["input_ids"][row, :cut] = 0
    return given


def generated(model: Any, given: dict[str, Tensor], **how: Any) -> Tensor:
    torch.manual_seed(4)
    return model.generate(**given, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0, **how)


STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 1.5, "top_k": 10},
    "beams": {"do_sample": False, "num_beams": 2},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["smora", "meteora"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("left_padded", [False, True])
def test_a_cache_changes_nothing(kind: str, method: str, strategy: str, left_padded: bool) -> None:
    model, given, how = model_for(kind, method), prompts(kind, left_padded), STRATEGIES[strategy]
    cached = generated(model, given, use_cache=True, **how)
    assert torch.equal(cached, generated(model, given, use_cache=False, **how))
    with moelora.disabled(model):
        base = generated(model, given, **how)
    assert not torch.equal(cached, base)  # the experts had a say


def carried(method: str) -> bool:
    """Whether a cache has to carry something for the router."""
    return tiny.router_of(method).remembers or tiny.router_of(method).reads == "hidden"


@pytest.mark.parametrize(
    ("method", "kind", "strategy"),
    [
        (method, kind, strategy)
        for method, kind in tiny.PAIRS
        for strategy in (["greedy", "beams"] if carried(method) else ["greedy"])
        if kind in KINDS
    ],
)
def test_every_router_decodes_with_a_cache(method: str, kind: str, strategy: str) -> None:
    model, given, how = model_for(kind, method), prompts(kind, True), STRATEGIES[strategy]
    cached = generated(model, given, use_cache=True, **how)
    assert torch.equal(cached, generated(model, given, use_cache=False, **how))


@pytest.mark.parametrize(("method", "kind"), [(method, kind) for method, kind in tiny.PAIRS if kind in KINDS])
def test_generation_sees_what_one_forward_over_its_text_sees(method: str, kind: str) -> None:
    """The same masks, tasks and memories, in an encoder that runs by itself too."""
    model, given = model_for(kind, method), prompts(kind, True)
    out = generated(model, given, return_dict_in_generate=True, output_logits=True)
    if kind == "t5":
        with torch.no_grad():
            logits = model(**given, decoder_input_ids=out.sequences[:, :-1]).logits
    else:
        mask = torch.cat([given["attention_mask"], torch.ones(3, NEW, dtype=torch.long)], 1)
        text = {"input_ids": out.sequences, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        with torch.no_grad():
            logits = model(**text, task_ids=given["task_ids"]).logits[:, :-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), logits[:, -NEW:].float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_tasks_reach_every_step(kind: str, strategy: str) -> None:
    model, given, seen = model_for(kind, "smora"), prompts(kind, True), []
    beams = STRATEGIES[strategy].get("num_beams", 1)
    with moelora.collect(model, lambda view, route: seen.append((view.site.name, view.shape, view.task))):
        generated(model, given, **STRATEGIES[strategy])
    steps = [shape for name, shape, _ in seen if name == model.moelora.sites[-1].name]
    assert len(steps) == NEW
    for name, shape, task in seen:
        rows = given["task_ids"].repeat_interleave(1 if name.startswith("encoder.") else beams)
        assert torch.equal(task.view(shape), rows.unsqueeze(1).expand(shape)), name
    assert kind != "t5" or any(name.startswith("encoder.") for name, *_ in seen)


def test_a_misspelt_argument_is_still_refused() -> None:
    model, given = model_for("llama", "smora"), prompts("llama", False)
    with pytest.raises(ValueError, match=r"model_kwargs` are not used.*task_idz"):
        model.generate(**{**given, "task_idz": given["task_ids"]}, max_new_tokens=1)
    with pytest.raises(ValueError, match=r"model_kwargs` are not used.*task_ids"):
        tiny.llama().generate(**given, max_new_tokens=1)  # a base model has no routers


def test_a_router_by_task_cannot_do_without() -> None:
    for kind in KINDS:
        with pytest.raises(DataError, match=r"routers\.task routes by task.*pass task_ids"):
            generated(model_for(kind, "task"), tiny.unlabelled(tiny.batch(kind)))


def test_a_static_cache_changes_nothing() -> None:
    model, given = model_for("llama", "smora"), prompts("llama", True)
    assert torch.equal(generated(model, given, cache_implementation="static"), generated(model, given))


def test_a_padded_prompt_continues_as_it_does_alone() -> None:
    model, given = model_for("llama", "smora"), prompts("llama", True)
    together = generated(model, given)[2, -NEW:]
    row = {key: value[2:, 4:] if value.dim() == 2 else value[2:] for key, value in given.items()}
    alone = generated(model, row)[0, -NEW:]
    assert torch.equal(together, alone)


def test_generating_counts_nothing_and_keeps_no_tape() -> None:
    model = model_for("llama", "smora", losses={"z": 1.0})
    generated(model, prompts("llama", False))
    model.train()  # a trainer that samples during training
    generated(model, prompts("llama", False))
    assert not model.moelora.port.load and model.moelora.port.tape is None
    assert all((bias == 0).all() for bias in tiny.biases(model).values())


def test_masks_cover_the_tokens_of_every_decoding_step() -> None:
    model, given, seen = model_for("llama", "smora"), prompts("llama", True), []
    with moelora.collect(model, lambda view, route: seen.append((view.shape, view.mask))):
        generated(model, given)
    sites = len(routed_layers(model))
    first, later = seen[:sites], seen[sites:]
    assert all(shape == (3, 6) and torch.equal(mask, given["attention_mask"].reshape(-1) == 1) for shape, mask in first)
    assert len(later) == (NEW - 1) * sites
    assert all(shape == (3, 1) and mask.all() for shape, mask in later)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_pipeline(batch_size: int) -> None:
    model = tiny.adapted("llama", "smora", noise=0.5, dtype=torch.float64).eval()
    run = pipeline("text-generation", model=model, tokenizer=tiny.tokenizer(), batch_size=batch_size, device="cpu")
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "return_tensors": True}
    found = [out[0]["generated_token_ids"] for out in run(["w5 w4 w6", "w7"], **how)]
    for prompt, tokens in zip(([5, 4, 6], [7]), found, strict=True):
        given = {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt), dtype=torch.long)}
        assert list(tokens)[-4:] == generated(model, given)[0, len(prompt) : len(prompt) + 4].tolist()
    (text,) = run("w5 w4 w6", max_new_tokens=4, do_sample=False)
    assert text["generated_text"].startswith("w5 w4 w6")
