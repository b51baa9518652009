"""An adapted model in place of its base model: outputs, losses, gradients, checkpointing, copies."""

from __future__ import annotations

import contextlib
import copy
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import BertForMaskedLM

import moelora
from moelora.core.errors import DataError, MoeloraError
from moelora.core.tape import Tape
from moelora.model.record import routed_layers
from moelora.model.routed import weighted_sum
from tests import tiny

KINDS = list(tiny.MODELS)
METHODS = [method for method in tiny.METHODS if tiny.fits("llama", method)]
LOSSES: dict[str, dict[str, float]] = {
    method: {
        **({"balance": 0.5} if "probs" in tiny.router_of(method).gives else {}),
        **({"z": 0.1} if "logits" in tiny.router_of(method).gives else {}),
    }
    for method in tiny.METHODS
}
LOSSES["meteora"] = {"balance": 0.1, "supervised_gate": 0.5}


def given(kind: str, seed: int = 1) -> dict[str, Tensor]:
    return tiny.given(kind, seed)


def train(model: Any, kind: str, steps: int = 3) -> None:
    sgd = torch.optim.SGD(list(tiny.trainable(model).values()), lr=0.5)
    for step in range(steps):
        model(**given(kind, step)).loss.backward()
        sgd.step()
        sgd.zero_grad()


# Equal to the base model


@pytest.mark.parametrize(("method", "kind"), tiny.PAIRS)
def test_starts_as_the_base_model_bit_for_bit(method: str, kind: str) -> None:
    base = tiny.MODELS[kind]()
    model = tiny.adapted(kind, method, noise=0, experts={**tiny.METHODS[method]["experts"], "lora_dropout": 0.3})
    # A router around feed-forward blocks sums what it has split by gates that add up to one: up to rounding.
    near = {"rtol": 0, "atol": 0 if tiny.router_of(method).around == "linear" else 1e-5}
    for mode in (True, False):
        mine, theirs = model.train(mode)(**given(kind)), base.train(mode)(**tiny.batch(kind))
        torch.testing.assert_close(mine.logits, theirs.logits, **near)
    torch.testing.assert_close(mine.loss, theirs.loss, **near)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["smora", "meteora"])
def test_disabled_is_the_base_model_bit_for_bit_after_training(kind: str, method: str) -> None:
    base, model = tiny.MODELS[kind](), tiny.adapted(kind, method, losses=LOSSES[method])
    train(model, kind)
    batch = tiny.batch(kind)
    expected = base(**batch)
    with moelora.disabled(model) as same:
        found = model(**batch)
    assert same is model
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    assert not torch.equal(model(**given(kind)).logits, expected.logits)  # and it is on again


def test_disabled_nests_and_survives_errors() -> None:
    model, batch = tiny.adapted("llama"), tiny.unlabelled(tiny.batch())
    on = model(**batch).logits
    with moelora.disabled(model):
        off = model(**batch).logits
        with contextlib.suppress(KeyError), moelora.disabled(model):
            raise KeyError
        assert torch.equal(model(**batch).logits, off)
    assert torch.equal(model(**batch).logits, on) and not torch.equal(on, off)


def test_disabled_needs_experts() -> None:
    with pytest.raises(MoeloraError, match="this LlamaForCausalLM has no experts"), moelora.disabled(tiny.llama()):
        pass


@pytest.mark.parametrize("kind", KINDS)
def test_is_still_its_own_class(kind: str) -> None:
    base, model = tiny.MODELS[kind](), tiny.adapted(kind)
    assert isinstance(model, type(base)) and type(model).__name__ == type(base).__name__
    assert type(base) is not type(model)  # other instances of the class are left alone
    assert model.forward.__func__ is base.forward.__func__
    assert set(tiny.trainable(model)) == {
        name for name, _ in model.named_parameters() if ".experts." in name or ".router." in name
    }


def test_is_the_same_object() -> None:
    base = tiny.llama()
    weights = {name: p.data_ptr() for name, p in base.named_parameters()}
    model = tiny.adapt(base, tiny.METHODS["smora"])
    assert model is base
    kept = {name.replace(".base_layer", ""): p.data_ptr() for name, p in model.named_parameters()}
    assert weights.items() <= kept.items()


def test_experts_follow_the_mode_of_their_layer() -> None:
    model = tiny.adapt(tiny.llama().eval(), {**tiny.METHODS["smora"], "experts": {"r": 8, "lora_dropout": 0.5}})
    assert not any(layer.training or layer.dropout.training for layer in routed_layers(model))
    assert torch.equal(model(**tiny.batch()).logits, model(**tiny.batch()).logits)


# The loss


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bert"])
@pytest.mark.parametrize("method", ["smora", "meteora"])
def test_loss_is_the_models_own_plus_the_weighted_terms(kind: str, method: str) -> None:
    model = tiny.adapted(kind, method, losses=LOSSES[method])
    with moelora.collect(model) as collected:
        own = model(**given(kind)).loss
    (terms,) = collected.terms
    assert terms.keys() == LOSSES[method].keys() and all(term > 0 for term in terms.values())
    expected = own + sum(weight * terms[name] for name, weight in LOSSES[method].items())
    torch.testing.assert_close(model(**given(kind)).loss, expected)


def test_terms_are_not_added_outside_training() -> None:
    model, batch = tiny.adapted("llama", "smora", losses=LOSSES["smora"]), tiny.batch()
    with moelora.collect(model):
        own = model(**batch).loss
    with torch.no_grad():
        assert torch.equal(model(**batch).loss, own)
    assert torch.equal(model.eval()(**batch).loss, own)


def test_loss_in_a_tuple() -> None:
    model, batch = tiny.adapted("llama", "smora", losses=LOSSES["smora"]), tiny.batch()
    expected = model(**batch)
    loss, logits, *_ = model(**batch, return_dict=False)
    assert torch.equal(loss, expected.loss) and torch.equal(logits, expected.logits)


def test_positional_arguments_are_understood() -> None:
    model, batch = tiny.adapted("llama", "smora", losses=LOSSES["smora"]), tiny.batch()
    by_name = model(**batch).loss
    by_position = model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"]).loss
    assert torch.equal(by_name, by_position)


def test_terms_that_would_be_lost_are_an_error() -> None:
    model, batch = tiny.adapted("llama", "smora", losses=LOSSES["smora"]), tiny.unlabelled(tiny.batch())
    for more in ({}, {"return_dict": False}):
        with pytest.raises(MoeloraError, match=r"auxiliary losses \(balance, z\) would be dropped.*moelora\.collect"):
            model(**batch, **more)
    with torch.no_grad():
        model(**batch)
    model.eval()(**batch)


def test_terms_of_a_part_called_by_itself_are_an_error() -> None:
    model, batch = tiny.adapted("llama", "smora", losses=LOSSES["smora"]), tiny.unlabelled(tiny.batch())
    with pytest.raises(MoeloraError, match=r"was called outside its model's own forward"):
        model.model(**batch)
    with torch.no_grad():
        model.model(**batch)
    silent = tiny.adapted("llama", "smora")
    assert torch.equal(silent.model(**batch)[0], silent.eval().model(**batch)[0])  # without losses it is fine


def test_terms_of_weight_zero_are_reported_and_not_added() -> None:
    model, batch = tiny.adapted("llama", "smora", losses={"z": 0.0}), tiny.batch()
    with moelora.collect(model) as collected:
        own = model(**batch).loss
    assert collected.terms[0]["z"] > 0 and torch.equal(model(**batch).loss, own)
    model(**tiny.unlabelled(batch))  # nothing would be lost


def test_collect_lists_one_entry_per_forward_and_the_innermost_wins() -> None:
    model, batch = tiny.adapted("llama", "smora", losses={"z": 1.0}), tiny.batch()
    with moelora.collect(model) as outer:
        model(**batch)
        with moelora.collect(model) as inner:
            model(**batch)
            model(**batch)
    assert len(outer.terms) == 1 and len(inner.terms) == 2


# Which tokens count


def masks_of(model: Any, **batch: Tensor) -> dict[str, Tensor | None]:
    """The mask that each site sees in one forward."""
    seen: dict[str, Tensor | None] = {}
    with torch.no_grad(), moelora.collect(model, lambda view, route: seen.setdefault(view.site.name, view.mask)):
        model(**batch)
    return seen


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_padding_does_not_count(kind: str) -> None:
    batch = tiny.batch(kind)
    for mask in masks_of(tiny.adapted(kind), **batch).values():
        assert torch.equal(mask, batch["attention_mask"].reshape(-1).bool())
    assert set(masks_of(tiny.adapted(kind), input_ids=batch["input_ids"]).values()) == {None}


def test_states_that_are_not_tokens_all_count() -> None:
    batch = tiny.batch("bert")
    for name, mask in masks_of(tiny.adapted("bert"), **batch).items():
        if "pooler" in name:
            assert mask is None
        else:
            assert torch.equal(mask, batch["attention_mask"].reshape(-1).bool())


@pytest.mark.parametrize("explicit", [False, True])
def test_encoder_and_decoder_have_their_own_padding(explicit: bool) -> None:
    batch = tiny.batch("t5")
    decoder = batch["labels"].ne(-100)
    assert not decoder.all()
    if explicit:
        decoder = torch.ones_like(decoder)
        decoder[1, 3:] = False
        batch["decoder_attention_mask"] = decoder.long()
    seen = masks_of(tiny.adapted("t5"), **batch)
    for name, mask in seen.items():
        reads_encoder = name.startswith("encoder.") or name.endswith("EncDecAttention.v")
        assert torch.equal(mask, (batch["attention_mask"].bool() if reads_encoder else decoder).reshape(-1)), name
    assert any(name.endswith("EncDecAttention.v") for name in seen)


def answers_of(model: Any, **batch: Any) -> dict[str, Tensor | None]:
    """The tokens whose prediction carries loss, as each site sees them in one forward."""
    seen: dict[str, Tensor | None] = {}
    with torch.no_grad(), moelora.collect(model, lambda view, route: seen.setdefault(view.site.name, view.answers)):
        model(**batch)
    return seen


def labels_of_some(seed: int = 5) -> Tensor:
    """Labels for the last three tokens of a batch's rows, -100 before."""
    labels = torch.randint(3, tiny.VOCAB, (3, 7), generator=torch.Generator().manual_seed(seed))
    labels[:, :4] = -100
    return labels


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_causal_answer_is_carried_by_the_token_before_it(kind: str) -> None:
    labels = labels_of_some()
    batch = {**tiny.unlabelled(tiny.batch(kind, padded=False)), "labels": labels}
    expected = torch.zeros(3, 7, dtype=torch.bool)
    expected[:, 3:6] = True
    for answers in answers_of(tiny.adapted(kind), **batch).values():
        assert torch.equal(answers, expected.reshape(-1))


@pytest.mark.parametrize(
    ("loss_type", "shifted"),
    [("ForCausalLM", True), ("ForConditionalGeneration", True), (None, True), ("ForMaskedLM", False)],
)
def test_what_a_loss_compares_is_known_by_its_name(loss_type: str | None, shifted: bool) -> None:
    model, labels = tiny.adapted("llama"), labels_of_some()
    model.loss_type = loss_type  # such as a vision-language model's, or none, as GPT-2's
    expected = labels.ne(-100)
    expected = expected.roll(-1, 1) & torch.arange(7).lt(6) if shifted else expected
    for answers in answers_of(model, **{**tiny.unlabelled(tiny.batch(padded=False)), "labels": labels}).values():
        assert torch.equal(answers, expected.reshape(-1))


def test_tokens_that_carry_loss_are_those_whose_logits_have_a_gradient() -> None:
    """Not what is said of labels, but what the loss does."""
    for kind in ("llama", "gpt2", "t5"):
        batch = tiny.batch(kind, padded=False)
        if kind != "t5":
            batch["labels"] = labels_of_some()
        model = tiny.adapted(kind)
        out = model(**batch)
        (grad,) = torch.autograd.grad(out.loss, out.logits)
        carries = (grad != 0).any(-1).reshape(-1)
        for name, answers in answers_of(model, **batch).items():
            encoder = name.startswith("encoder.") or name.endswith("EncDecAttention.v")
            assert answers is None if encoder else torch.equal(answers, carries), name


def test_labels_that_are_shifted_already_are_taken_as_they_are() -> None:
    shifted = labels_of_some()
    batch = {**tiny.unlabelled(tiny.batch(padded=False)), "shift_labels": shifted}
    for labels in ({}, {"labels": torch.full_like(shifted, 3)}):
        for answers in answers_of(tiny.adapted("llama"), **batch, **labels).values():
            assert torch.equal(answers, shifted.ne(-100).reshape(-1))


def test_masked_words_carry_their_own_loss() -> None:
    config = {**tiny.METHODS["smora"], "target_modules": tiny.TARGETS["bert"]}
    model = tiny.adapt(BertForMaskedLM(tiny.bert().config), config)
    labels = labels_of_some()
    batch = {**tiny.unlabelled(tiny.batch("bert", padded=False)), "labels": labels}
    seen = answers_of(model, **batch)
    assert seen and all(torch.equal(answers, labels.ne(-100).reshape(-1)) for answers in seen.values())


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_without_labels_for_tokens_there_are_no_answers(kind: str) -> None:
    batch = tiny.batch(kind)
    batch = batch if kind == "bert" else tiny.unlabelled(batch)  # BERT's are of whole sequences
    model = tiny.adapted(kind, "smora", losses={"z": {"weight": 1.0, "tokens": "answers"}})
    assert set(answers_of(tiny.adapted(kind), **batch).values()) == {None}
    with pytest.raises(DataError, match="tokens: answers needs labels"), moelora.collect(model):
        model(**batch)


def test_a_loss_over_answers_leaves_out_the_prompt() -> None:
    batch = {**tiny.unlabelled(tiny.batch(padded=False)), "labels": labels_of_some()}
    terms = {}
    for tokens in ("all", "answers"):
        model = tiny.adapted("llama", "smora", losses={"z": {"weight": 1.0, "tokens": tokens}})
        with moelora.collect(model) as collected:
            model(**batch)
        terms[tokens] = collected.terms[0]["z"]
    logits = [route.logits.view(3, 7, -1) for route in tiny.routes(model, **batch)]
    whole = torch.stack([value.logsumexp(-1).square().mean() for value in logits]).mean()
    part = torch.stack([value[:, 3:6].logsumexp(-1).square().mean() for value in logits]).mean()
    torch.testing.assert_close(terms["all"], whole)
    torch.testing.assert_close(terms["answers"], part)


# Gradient checkpointing


def loss_and_gradients(
    model: Any, kind: str, forwards: int = 1, half: bool = False, collect: bool = False
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses (and terms) of some forwards, and the gradients of one backward through all of them."""
    torch.manual_seed(11)
    reported, total = [], torch.zeros(())
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        for number in range(forwards):
            if collect:
                with moelora.collect(model) as collected:
                    loss = model(**given(kind, number)).loss
                reported += list(collected.terms[0].values())
                loss = loss + weighted_sum(model, collected.terms[0])
            else:
                loss = model(**given(kind, number)).loss
            reported.append(loss.detach())
            total = total + loss
    total.backward()
    return reported, tiny.gradients(model)


def assert_checkpointing_changes_nothing(kind: str, method: str, more: dict[str, Any], **run: Any) -> None:
    losses = {"losses": LOSSES[method], **more}
    plain = loss_and_gradients(tiny.adapted(kind, method, **losses), kind, **run)
    saving = tiny.checkpointing(tiny.adapted(kind, method, **losses))
    recomputed = count_layer_calls(saving)
    again = loss_and_gradients(saving, kind, **run)
    assert max(recomputed.values()) == 2 * run.get("forwards", 1)  # it did recompute
    assert all(torch.equal(a, b) for a, b in zip(plain[0], again[0], strict=True))
    tiny.assert_same(plain[1], again[1])
    routers = [grad for name, grad in plain[1].items() if ".router." in name]
    assert not routers or any((grad != 0).any() for grad in routers)


def count_layer_calls(model: Any) -> dict[int, int]:
    """Calls of each routed layer with its experts on, counted as they happen."""
    calls: dict[int, int] = {}
    for layer in routed_layers(model):
        layer.register_forward_pre_hook(
            lambda module, args: calls.__setitem__(
                module.site.index, calls.get(module.site.index, 0) + int(module.port.enabled)
            )
        )
    return calls


@pytest.mark.parametrize(("method", "kind"), tiny.PAIRS)
def test_checkpointing_gives_the_same_gradients_bit_for_bit(method: str, kind: str) -> None:
    assert_checkpointing_changes_nothing(kind, method, {})


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("method", ["smora", "meteora"])
def test_checkpointing_with_two_forwards_before_one_backward(kind: str, method: str) -> None:
    assert_checkpointing_changes_nothing(kind, method, {}, forwards=2)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["smora", "meteora"])
def test_checkpointing_with_dropout(kind: str, method: str) -> None:
    options = {"gpt2": {"resid_pdrop": 0.1, "attn_pdrop": 0.1}, "llama": {"attention_dropout": 0.1}}[kind]
    experts = {**tiny.METHODS[method]["experts"], "lora_dropout": 0.3}
    assert_checkpointing_changes_nothing(kind, method, {"experts": experts, "options": options}, forwards=2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["smora", "meteora"])
def test_checkpointing_under_autocast(kind: str, method: str) -> None:
    assert_checkpointing_changes_nothing(kind, method, {}, half=True)


@pytest.mark.parametrize("method", ["smora", "meteora"])
def test_checkpointing_with_collected_terms(method: str) -> None:
    assert_checkpointing_changes_nothing("llama", method, {}, forwards=2, collect=True)


@pytest.mark.parametrize(
    ("method", "router"),
    [("smora", {"name": "smora", "top_k": 8}), ("meteora", {"name": "meteora", "top_k": 3})],
)
def test_checkpointing_when_every_unit_is_chosen(method: str, router: dict[str, Any]) -> None:
    assert_checkpointing_changes_nothing("llama", method, {"router": router})


@pytest.mark.parametrize("method", ["smora", "smora_blocks", "meteora"])
def test_a_choice_that_would_flip_in_the_recomputation_is_kept(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = loss_and_gradients(tiny.adapted("llama", method, losses=LOSSES[method]), "llama")[1]
    model = tiny.checkpointing(tiny.adapted("llama", method, losses=LOSSES[method]))
    loss = model(**given("llama", 0)).loss
    for module in ("smora", "meteora"):  # from here on, another choice would be made
        monkeypatch.setattr(f"moelora.routers.{module}.top_k", lambda scores, k: scores.detach().argsort(-1)[:, :k])
    loss.backward()
    tiny.assert_same(tiny.gradients(model), expected)
    model.zero_grad()
    model(**given("llama", 0)).loss.backward()
    flipped = tiny.gradients(model)
    assert any(not torch.equal(flipped[name], expected[name]) for name in expected)  # the trap was real


def test_two_backward_passes_through_one_checkpointed_graph() -> None:
    plain, saving = (tiny.adapted("llama", "smora", losses=LOSSES["smora"]) for _ in range(2))
    tiny.checkpointing(saving)
    for model in (plain, saving):
        loss = model(**given("llama")).loss
        loss.backward(retain_graph=True)
        loss.backward()
    tiny.assert_same(tiny.gradients(plain), tiny.gradients(saving))


def test_checkpointing_of_a_deep_copy() -> None:
    model = tiny.checkpointing(tiny.adapted("llama", "smora", losses=LOSSES["smora"]))
    twin = copy.deepcopy(model)
    expected, found = (loss_and_gradients(m, "llama")[1] for m in (model, twin))
    tiny.assert_same(expected, found)


def test_checkpointing_turned_on_before_the_experts_came() -> None:
    expected = loss_and_gradients(tiny.adapted("llama", "smora", losses=LOSSES["smora"]), "llama")[1]
    base = tiny.checkpointing(tiny.llama())
    config = {**tiny.METHODS["smora"], "target_modules": tiny.TARGETS["llama"], "losses": LOSSES["smora"]}
    model = tiny.shake(tiny.adapt(base, config))
    tiny.assert_same(loss_and_gradients(model, "llama")[1], expected)


def test_reentrant_checkpointing_turned_on_before_is_refused_too() -> None:
    base = tiny.checkpointing(tiny.llama(), gradient_checkpointing_kwargs={"use_reentrant": True})
    keys, cls = list(base.state_dict()), type(base)
    with pytest.raises(MoeloraError, match="use_reentrant=True gives a routed model wrong gradients"):
        tiny.adapt(base, tiny.METHODS["smora"])
    assert type(base) is cls and list(base.state_dict()) == keys
    assert all(p.requires_grad for p in base.parameters())


def test_every_second_layer_chosen_before_the_experts_came() -> None:
    base = tiny.llama()
    base.activation_checkpointing_enable(every_n_layers=2)
    model = tiny.shake(tiny.adapt(base, {**tiny.METHODS["smora"], "target_modules": tiny.TARGETS["llama"]}))
    calls = count_layer_calls(model)
    tiny.assert_same(loss_and_gradients(model, "llama")[1], loss_and_gradients(tiny.adapted("llama"), "llama")[1])
    assert sorted(set(calls.values())) == [1, 2]


def test_checkpointing_can_be_turned_off_again() -> None:
    model = tiny.checkpointing(tiny.adapted("llama"))
    model._set_gradient_checkpointing(enable=False)
    calls = count_layer_calls(model)
    loss_and_gradients(model, "llama")
    assert set(calls.values()) == {1}


def test_checkpointing_every_second_layer() -> None:
    expected = loss_and_gradients(tiny.adapted("llama"), "llama")[1]
    model = tiny.adapted("llama")
    model.activation_checkpointing_enable(every_n_layers=2)
    calls = count_layer_calls(model)
    tiny.assert_same(loss_and_gradients(model, "llama")[1], expected)
    assert sorted(set(calls.values())) == [1, 2]


def test_the_callers_own_contexts_are_entered_too() -> None:
    entered: list[str] = []

    @contextlib.contextmanager
    def note(name: str) -> Any:
        entered.append(name)
        yield

    expected = loss_and_gradients(tiny.adapted("llama"), "llama")[1]
    kwargs = {"use_reentrant": False, "context_fn": lambda: (note("forward"), note("recompute"))}
    model = tiny.checkpointing(tiny.adapted("llama"), gradient_checkpointing_kwargs=kwargs)
    tiny.assert_same(loss_and_gradients(model, "llama")[1], expected)
    assert entered == ["forward"] * 2 + ["recompute"] * 2


def test_reentrant_checkpointing_is_refused() -> None:
    model = tiny.adapted("llama")
    with pytest.raises(MoeloraError, match="use_reentrant=True gives a routed model wrong gradients"):
        tiny.checkpointing(model, gradient_checkpointing_kwargs={"use_reentrant": True})
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_a_callers_checkpoint_around_a_part_is_not_silent() -> None:
    # torch's checkpoint around a block, without our contexts: the recomputation has no tape, and says so.
    model = tiny.adapted("llama", "smora", losses=LOSSES["smora"])
    block, forward = model.model.layers[0], model.model.layers[0].forward
    block.forward = lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)
    loss = model(**given("llama")).loss
    with pytest.raises(MoeloraError, match="outside its model's own forward"):
        loss.backward()


# State that must not stay behind


@pytest.mark.parametrize("checkpointed", [False, True])
def test_no_tape_stays_behind(checkpointed: bool) -> None:
    model = tiny.adapted("llama", "smora", losses=LOSSES["smora"])
    port = model.moelora.port
    if checkpointed:
        tiny.checkpointing(model)
    loss = model(**given("llama")).loss
    assert port.tape is None
    loss.backward()
    assert port.tape is None
    with moelora.disabled(model):
        model(**tiny.batch())
    assert port.tape is None and port.enabled and not port.collectors


def test_no_tape_stays_behind_after_an_error() -> None:
    model = tiny.adapted("llama", "smora", losses=LOSSES["smora"])
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), moelora.collect(model):
        model(**given("llama"))
    assert model.moelora.port.tape is None and not model.moelora.port.collectors
    handle.remove()
    assert model(**given("llama")).loss.isfinite()


def test_layers_share_one_port() -> None:
    model = tiny.adapted("llama")
    assert {id(layer.port) for layer in routed_layers(model)} == {id(model.moelora.port)}


# Copies, casts, compilers


@pytest.mark.parametrize("method", METHODS)
def test_a_deep_copy_is_equal_and_independent(method: str) -> None:
    model = tiny.adapted("llama", method, losses=LOSSES[method])
    train(model, "llama", 1)
    twin, batch = copy.deepcopy(model), given("llama")
    before = model.eval()(**batch).logits
    assert torch.equal(twin.eval()(**batch).logits, before)
    assert {id(layer.port) for layer in routed_layers(twin)} == {id(twin.moelora.port)} != {id(model.moelora.port)}
    with moelora.disabled(twin):
        assert torch.equal(model(**batch).logits, before)
    train(twin.train(), "llama", 2)
    assert torch.equal(model(**batch).logits, before)
    assert not torch.equal(twin.eval()(**batch).logits, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_base_with_float32_experts(kind: str, dtype: torch.dtype) -> None:
    model = tiny.adapted(kind, "smora", dtype=dtype)
    assert {p.dtype for p in tiny.trainable(model).values()} == {torch.float32}
    out = model(**tiny.batch(kind))
    assert out.logits.dtype == dtype
    out.loss.backward()
    assert all(grad.isfinite().all() for grad in tiny.gradients(model).values())


def test_float64_base_with_float64_experts() -> None:
    model = tiny.adapted("llama", "smora", dtype=torch.float64)
    assert {p.dtype for p in tiny.trainable(model).values()} == {torch.float64}
    assert model(**tiny.batch()).logits.dtype == torch.float64


def test_autocast_leaves_routing_in_float32() -> None:
    model, seen = tiny.adapted("llama", "meteora"), []
    batch = tiny.unlabelled(tiny.batch())
    with torch.autocast("cpu", torch.bfloat16), moelora.collect(model, lambda view, route: seen.append(route)):
        out = model(**batch)
    assert out.logits.dtype == torch.bfloat16
    assert {route.weight.dtype for route in seen} == {torch.float32}
    assert {route.logits.dtype for route in seen} == {torch.float32}


def test_compiled_model_agrees() -> None:
    torch._dynamo.reset()
    method = "smora"
    small = {"options": {"num_hidden_layers": 1}, "target_modules": ["q_proj", "down_proj"]}
    model, batch = tiny.adapted("llama", method, losses=LOSSES[method], **small), given("llama")
    expected = model(**batch)
    expected.loss.backward()
    grads = tiny.gradients(model)
    model.zero_grad()
    # "aot_eager" traces the same graphs as the default backend, without minutes of C++ compilation.
    out = torch.compile(model, backend="aot_eager")(**batch)
    torch.testing.assert_close(out.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-5)
    out.loss.backward()
    for name, grad in tiny.gradients(model).items():
        torch.testing.assert_close(grad, grads[name], rtol=1e-4, atol=1e-5)
    assert model.moelora.port.tape is None


def test_a_checkpointed_graph_that_is_never_used_is_freed() -> None:
    """The graph holds the tape for its recomputed regions; were the tape to hold the graph, both would stay."""
    model = tiny.adapted("llama", "meteora", losses={"balance": 0.1})
    model.train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # renamed in 5.x
    born: list[weakref.ref[Tape]] = []
    port = model.moelora.port
    original = port.on

    def on(tape: Tape) -> Any:
        born.append(weakref.ref(tape))
        return original(tape)

    port.on = on  # type: ignore[method-assign]
    ids = torch.randint(1, 64, (2, 5))
    loss = model(input_ids=ids, labels=ids).loss
    assert born[0]() is not None
    del loss
    assert born[0]() is None
