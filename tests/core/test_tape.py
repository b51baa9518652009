"""Tape and Port: what a layer may know of a pass, what is recorded, and what a recomputation replays."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from moelora.core.errors import DataError, MoeloraError
from moelora.core.route import Route
from moelora.core.tape import Port, Site, Tape, View

SITE = Site("layer", 0, 5, 7)
DECODER = Site("decoder.layer", 1, 5, 7, stream="decoder")
MASK = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]).bool()


def look(tape: Tape, *shape: int, site: Site = SITE) -> View:
    return tape.view(site, torch.Size(shape))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.self_attn.q_proj", True),
        ("transformer.h.1.attn.c_proj", True),
        ("transformer.h.1.crossattention.c_attn", True),
        ("transformer.h.1.attn.attention.out_proj", True),
        ("decoder.block.0.layer.1.EncDecAttention.o", True),
        ("encoder.layer.0.attention.self.query", True),
        ("encoder.layer.0.attention.output.dense", True),
        ("transformer.attentions.3.q_lin", True),
        ("model.layers.2.linear_attn.in_proj", True),
        ("model.layers.0.self_attn.gate_proj", True),
        ("model.layers.0.mlp.gate_proj", False),
        ("transformer.h.1.mlp.c_proj", False),
        ("encoder.layer.0.intermediate.dense", False),
        ("encoder.layer.0.output.dense", False),
        ("encoder.cross_attention.mlp.dense1", False),
        ("attention_model.layers.0.mlp.up_proj", False),
        ("model.layers.0.self_attn.experts.0.w1", False),
        ("backbone.layers.0.mixer.in_proj", False),
        ("pooler.dense", False),
        ("attention", False),
    ],
)
def test_attention_is_known_by_the_name_of_the_module_around_a_layer(name: str, expected: bool) -> None:
    assert Site(name, 0, 5, 7).in_attention == expected


def test_no_mask_means_all_tokens_count() -> None:
    view = look(Tape(), 2, 4)
    assert view.mask is None and view.task is None and view.shape == (2, 4)


def test_mask_of_a_plain_batch() -> None:
    assert torch.equal(look(Tape(mask={"input": MASK}), 2, 4).mask, MASK.reshape(-1))


def test_mask_of_a_cached_decode_covers_the_last_tokens() -> None:
    tape = Tape(mask={"input": MASK})
    assert look(tape, 2, 1).mask.tolist() == [True, True]
    assert look(tape, 2, 3).mask.tolist() == [True] * 6
    longer = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()  # right padding
    assert look(Tape(mask={"input": longer}), 2, 2).mask.tolist() == [True, False, True, True]


@pytest.mark.parametrize("shape", [(2,), (2, 5), (3, 4), (2, 4, 6), (8,), ()])
def test_mask_of_something_that_is_not_the_sequence_is_none(shape: tuple[int, ...]) -> None:
    assert look(Tape(mask={"input": MASK}), *shape).mask is None


def test_encoder_and_decoder_have_their_own_masks() -> None:
    tape = Tape(mask={"input": MASK, "decoder": MASK[:, :3].flip(1)})
    assert torch.equal(look(tape, 2, 4).mask, MASK.reshape(-1))
    assert torch.equal(look(tape, 2, 3, site=DECODER).mask, MASK[:, :3].flip(1).reshape(-1))
    assert look(Tape(mask={"input": MASK}), 2, 3, site=DECODER).mask is None


def test_task_per_sequence_is_spread_over_its_tokens() -> None:
    tape = Tape(task=torch.tensor([4, 9]))
    assert look(tape, 2, 3).task.tolist() == [4, 4, 4, 9, 9, 9]
    assert look(tape, 2).task.tolist() == [4, 9]
    assert look(tape, 2, 1, 2).task.tolist() == [4, 4, 9, 9]


def test_task_per_token() -> None:
    tape = Tape(task=torch.tensor([[1, 1, 2], [3, 3, 3]]))
    assert look(tape, 2, 3).task.tolist() == [1, 1, 2, 3, 3, 3]
    assert look(tape, 2, 1).task.tolist() == [2, 3]  # the newest token's, while decoding
    assert look(tape, 2).task.tolist() == [2, 3]


def test_task_of_another_batch_size_is_unknown() -> None:
    tape = Tape(task=torch.tensor([4, 9]))
    assert look(tape, 6).task is None and look(tape).task is None


def test_task_of_a_shape_without_sequences() -> None:
    assert look(Tape(task=torch.tensor(4))).task.tolist() == [4]  # one token and its task
    assert look(Tape(task=torch.tensor(4)), 2, 3).task is None
    assert look(Tape(task=torch.arange(6).view(1, 2, 3)), 1, 2, 3).task.tolist() == list(range(6))


# Answers


ANSWERS = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0]]).bool()


def test_only_all_is_the_view_itself() -> None:
    view = look(Tape(mask={"input": MASK}), 2, 4)
    assert view.only("all") is view


def test_only_answers_narrows_the_mask() -> None:
    view = look(Tape(mask={"input": MASK}, answers={"input": ANSWERS | ~MASK}), 2, 4)
    assert torch.equal(view.only("answers").mask, (ANSWERS & MASK).reshape(-1))
    assert torch.equal(view.mask, MASK.reshape(-1))  # as it was
    bare = look(Tape(answers={"input": ANSWERS}), 2, 4)
    assert bare.mask is None and torch.equal(bare.only("answers").mask, ANSWERS.reshape(-1))


def test_answers_are_those_of_the_views_own_stream() -> None:
    tape = Tape(mask={"input": MASK}, answers={"decoder": ANSWERS[:, :3]})
    assert torch.equal(look(tape, 2, 3, site=DECODER).only("answers").mask, ANSWERS[:, :3].reshape(-1))
    encoder = look(tape, 2, 4)
    assert encoder.only("answers") is encoder  # no answer is predicted there: all its real tokens count


def test_states_that_are_no_tokens_have_no_answers() -> None:
    pooled = look(Tape(mask={"input": MASK}, answers={"input": ANSWERS}), 2)
    assert pooled.answers is None and pooled.only("answers") is pooled


def test_only_answers_needs_labels() -> None:
    with pytest.raises(DataError, match=r"tokens: answers needs labels \[B, S\] in the batch"):
        look(Tape(mask={"input": MASK}), 2, 4).only("answers")


# What is kept for the tokens that follow


def test_what_a_site_keeps_is_its_own_and_without_a_graph() -> None:
    tape = Tape(past={0: torch.ones(2, 3)})
    first, second = look(tape, 2, 4), look(tape, 2, 4, site=DECODER)
    assert torch.equal(first.past, torch.ones(2, 3)) and second.past is None
    second.keep(torch.zeros(2, 3, requires_grad=True) * 2)
    assert tape.kept.keys() == {1} and not tape.kept[1].requires_grad
    assert second.past is None  # it is for the next pass


def test_a_recomputation_keeps_nothing() -> None:
    tape = Tape()
    with tape.replay([]):
        look(tape, 2, 4).keep(torch.ones(2))
    assert not tape.kept


def test_a_view_counts_as_a_call() -> None:
    tape = Tape()
    look(tape, 2, 4, site=DECODER)
    assert tape.called == {1} and not tape.read


# The plan


def test_a_plan_is_that_of_the_views_tokens() -> None:
    plan = torch.arange(24.0).view(2, 2, 2, 3)
    assert torch.equal(look(Tape(plan=plan), 2, 2).plan, plan.view(4, 2, 3))
    with pytest.raises(MoeloraError, match="call the whole model, not a part"):
        _ = look(Tape(), 2, 2).plan
    with pytest.raises(MoeloraError, match=r"'layer' reads \(4,\) states and the model has \(2, 2\) tokens"):
        _ = look(Tape(plan=plan), 4).plan


def test_terms_and_loads_are_recorded_per_name_and_site() -> None:
    tape = Tape()
    first, second = look(tape, 2, 4), look(tape, 2, 4, site=DECODER)
    first.add("z", torch.tensor(1.0))
    second.add("z", torch.tensor(2.0))
    first.count(torch.tensor([1.0, 0.0]))
    first.count(torch.tensor([2.0, 5.0]))  # a layer that a model calls twice in one pass
    second.count(torch.tensor([7.0]))
    assert [term.item() for term in tape.terms["z"]] == [1, 2]
    assert {site: load.tolist() for site, load in tape.load.items()} == {0: [3, 5], 1: [7]}


def test_observer_sees_the_route() -> None:
    seen: list[tuple[View, Route]] = []
    tape = Tape(observer=lambda view, route: seen.append((view, route)))
    view, route = look(tape, 2, 4), Route(torch.ones(8, 1), 1)
    view.observe(route)
    assert seen == [(view, route)]


def test_replay_repeats_choices_in_order_and_records_nothing() -> None:
    seen: list[Route] = []
    tape = Tape(observer=lambda view, route: seen.append(route))
    view, choices = look(tape, 2, 4), []
    with tape.remember(choices):
        first = [view.once(lambda: torch.tensor([1])), view.once(lambda: torch.tensor([2]))]
    with tape.replay(choices):
        assert not tape.recording
        again = [view.once(never), view.once(never)]
        view.add("z", torch.tensor(1.0))
        view.count(torch.tensor([1.0]))
        view.observe(Route(torch.ones(8, 1), 1))
    assert again == first
    assert tape.recording and not tape.terms and not tape.load and not seen


def never() -> Tensor:
    raise AssertionError("a replayed choice was computed again")


def test_once_outside_a_region_just_chooses() -> None:
    view = look(Tape(), 1)
    assert [view.once(lambda i=i: torch.tensor(i)).item() for i in range(3)] == [0, 1, 2]


def test_regions_remember_their_own_choices() -> None:
    tape = Tape()
    view, one, two = look(tape, 1), [], []
    with tape.remember(one):
        view.once(lambda: torch.tensor(1))
        with tape.remember(two):
            view.once(lambda: torch.tensor(2))
        view.once(lambda: torch.tensor(3))
    assert [c.item() for c in one] == [1, 3] and [c.item() for c in two] == [2]
    with tape.replay(two):
        assert view.once(never).item() == 2
    with tape.replay(one):
        assert [view.once(never).item() for _ in range(2)] == [1, 3]


def test_port_holds_the_innermost_tape_and_lets_go() -> None:
    port, outer, inner = Port(), Tape(), Tape()
    assert port.tape is None
    with port.on(outer):
        with port.on(inner) as current:
            assert current is inner and port.tape is inner
        assert port.tape is outer
    assert port.tape is None


def test_port_lets_go_after_an_error() -> None:
    port = Port()
    with pytest.raises(KeyError), port.on(Tape()):
        raise KeyError
    assert port.tape is None
    with port.on(Tape()):  # and can be used again
        pass


def test_port_refuses_a_second_thread_while_busy() -> None:
    port, found = Port(), []

    def enter() -> None:
        try:
            with port.on(Tape()):
                found.append("entered")
        except MoeloraError as error:
            found.append(str(error))

    def run() -> None:
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()

    with port.on(Tape()) as tape:
        run()
        assert port.tape is tape  # the pass that was there first goes on undisturbed
    assert len(found) == 1 and "another thread" in found[0] and "torchrun" in found[0]
    run()
    assert found[1] == "entered"  # one after the other is fine


def test_contexts_of_a_region_replay_the_tape_of_its_forward() -> None:
    port, tape = Port(), Tape()
    with port.on(tape):
        forward, recompute = port.contexts()
        with forward:
            chosen = port.tape.view(SITE, torch.Size((1,))).once(lambda: torch.tensor([5]))
    with port.on(Tape()):  # another forward came in between
        pass
    with recompute:
        assert port.tape is tape
        assert port.tape.view(SITE, torch.Size((1,))).once(never) is chosen
    assert port.tape is None


def test_contexts_outside_a_forward_do_nothing() -> None:
    forward, recompute = Port().contexts()
    with forward, recompute:
        pass


def test_a_region_can_be_recomputed_twice() -> None:
    # Two backward passes over one graph (retain_graph=True) recompute the region twice, in the same context object.
    port = Port()
    with port.on(Tape()):
        forward, recompute = port.contexts()
        with forward:
            port.tape.view(SITE, torch.Size((1,))).once(lambda: torch.tensor([5]))
    for _ in range(2):
        with recompute:
            assert port.tape.view(SITE, torch.Size((1,))).once(never).item() == 5
