"""Expressions that others wrote: matched as Python and PEFT do, in bounded time and memory, or refused."""

from __future__ import annotations

import gc
import itertools
import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from regex import _main

from moelora.core.errors import AdapterError
from moelora.io import patterns as io
from moelora.io.patterns import Budget
from tests.io.written import peak, reset_peak

HERE = Path("adapter_config.json")
LIMIT = 0.3 + 0.4  # the budget, and what one step may take beyond it


UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:q_proj|up_proj|down_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|ffn)\.(?:(?:q_proj|up_proj|down_proj)))"
)


def rule(pattern: str) -> Callable[[str], bool]:
    return Budget(HERE).pattern("target_modules", pattern)


def resolve(patterns: dict[str, Any], module: str) -> Any:
    return Budget(HERE).lookup("rank_pattern", patterns, None, 1)(module)


def refused(action: Callable[[], object]) -> str:
    started = time.process_time()
    with pytest.raises(AdapterError) as caught:
        action()
    assert time.process_time() - started < LIMIT
    text = str(caught.value)
    assert text.startswith("adapter_config.json: ") and "expected" in text and text.isprintable() and len(text) < 400
    return text


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        (r".*\.(q|v)_proj", ["a.q_proj", "a.b.v_proj"], ["q_proj", "a.k_proj", "a.q_proj.b"]),
        (r"model\.layers\.\d{1,2}\.mlp", ["model.layers.3.mlp", "model.layers.31.mlp"], ["model.layers.310.mlp"]),
        (r"(?!.*lm_head).*proj", ["a.proj"], ["lm_head.proj"]),
        (r"(?i)A\.B", ["a.b", "A.b"], ["axb"]),
        (UNSLOTH, ["model.layers.0.mlp.up_proj", "language.mlp.up_proj"], ["vision.mlp.up_proj"]),
        (r"[a-c]+", ["abc"], ["abcd", ""]),
        (r"\w+\.\d+", ["h.11"], ["h.", "h.x"]),
        (r"a$", ["a"], ["a\n"]),
        ("", [""], ["a"]),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_expressions_match_whole_paths(pattern: str, yes: list[str], no: list[str]) -> None:
    matches = rule(pattern)
    assert all(map(matches, yes)) and not any(map(matches, no))


PIECES = [
    "a",
    "b",
    r"\.",
    ".",
    "_",
    r"\d",
    r"\w",
    "[ab]",
    "[^a]",
    "[a-z.]",
    "a?",
    "b*",
    "a+?",
    r"\b",
    "^",
    "$",
    "a{2}",
    "b{1,}",
]
EXPRESSION = st.recursive(
    st.sampled_from(PIECES),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"({pair[0]}|{pair[1]})"),
        st.tuples(st.sampled_from(["(", "(?:", "(?=", "(?!"]), inner, st.sampled_from([")", ")*", ")+", ")?"])).map(
            "".join
        ),
    ),
    max_leaves=6,
)
MODULE = st.from_regex(r"[ab_0]{1,3}(\.[ab_0]{1,3}){0,3}", fullmatch=True)


@settings(max_examples=300)
@given(EXPRESSION, MODULE)
def test_the_engine_agrees_with_pythons_own(pattern: str, module: str) -> None:
    assume(pattern.count("(") < 6)  # Python's may hang
    try:
        expected = re.fullmatch(pattern, module) is not None
        wanted = re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error:
        refused(lambda: rule(pattern))
        return
    assert rule(pattern)(module) == expected
    assert (resolve({pattern: 1}, module) == 1) == wanted


NAMES = st.tuples(
    st.sampled_from(["", "^", ".*", ".*.", r".*\."]), st.text(r"ab.\\-_", max_size=5), st.sampled_from(["", "$"])
)


@settings(max_examples=400)
@given(st.lists(NAMES, max_size=4), MODULE)
def test_names_match_as_in_peft(names: list[tuple[str, str, str]], module: str) -> None:
    table = {before + name.replace("\\", "\\.") + end: place for place, (before, name, end) in enumerate(names)}
    budget = Budget(HERE)
    expected = table.get(get_pattern_key(table.keys(), module))
    assert budget.lookup("rank_pattern", table, None, 1)(module) == expected
    assert budget.rules <= sum(not re.sub(r"[\^$*.\\]", "", pattern) for pattern in table)  # the engine is not asked


def test_the_first_pattern_in_the_order_of_the_file_wins() -> None:
    table = {"self.attn.q_proj": 1, r"(q|k)_proj": 2, "q_proj": 3, ".*proj": 4}
    found = {name: resolve(table, name) for name in ("l.self_attn.q_proj", "self.attn.k_proj", "q_proj", "o_proj", "x")}
    assert list(found.values()) == [1, 2, 2, 4, None]
    assert resolve(dict(reversed(table.items())), "l.self_attn.q_proj") == 4
    assert resolve({}, "x") is None


@pytest.mark.parametrize(
    "pattern",
    [
        *("(a", "a)", "[", "*a", "a**", "a)|(b", "(?P<a>b)(?P<a>b)", "\\", "a{2}{3}", "(?<=a+)b"),  # not Python's
        *(
            r"\p{L}+",
            r"\X",
            r"(?R)",
            r"(?1)",
            r"(?>a)(?|b)",
            r"\L<x>",
            "(?:a){e<=3}",
            r"\m",
            "(?b)a",
            "(?V1)a",
        ),  # regex's
        *("[[:alpha:]]", "[[a]b]", "[a--b]", "[a&&b]", "[a~~b]", "[a||b]", "[:a:]"),  # read differently
        *(r"(a)\1", r"(?P<n>a)(?P=n)", r"(a)?(?(1)b|c)"),  # groups count differently within another expression
        *("\u00e4", "a\0", "a\nb", r"\u00e4", r"\x61", r"\N{DIGIT ONE}", r"\U0001f600", "[\0-\U0010ffff]"),
        *("a{1000}", "(?:a{50}){9}", "(?:(?:a{10}){10}){2}", "a{1,999}", "a{,9999}", "{", r"\{", "a{x}"),
        "a" * 257,
    ],
    ids=ascii,
)
def test_expressions_that_are_refused(pattern: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(lambda: rule(pattern))
        refused(lambda: resolve({pattern: 1}, "x"))


def test_the_length_that_is_allowed() -> None:
    assert rule("a" * 256)("a" * 256) and resolve({"a" * 256: 1}, "a" * 256) == 1
    refused(lambda: resolve({"a" * 257: 1}, "a"))


HANGING = ["(a|a)*[bc]", "(?:a|aa)+[bc]", "(a|.)*[bc]", "(?:a*?)*?[bc]", "(a*){99}[bc]", "(?:(a)|(.)|(a.))*[bc]"]
HANGING += ["(?:(?!(a|aa)*b)a)*", "(?=(a|a)*[bc])a", "a*" * 100 + "[bc]", "(?:" + "(a)*" * 40 + ")*[bc]"]
HANGING += ["(a|a|a|a|a|a|a|a)*[bc]"]


@pytest.mark.parametrize("pattern", HANGING, ids=lambda pattern: pattern[:20])
def test_expressions_that_backtrack_for_ever(pattern: str) -> None:
    """In time: the budget and a little. In memory: some megabytes, of which only the system knows."""
    budget, module, before = Budget(HERE, 0.1), "a" * 480, reset_peak()
    matches = budget.pattern("target_modules", pattern)
    assert "takes too long" in refused(lambda: matches(module))
    refused(lambda: matches("b"))  # nothing is left
    refused(lambda: budget.pattern("target_modules", "a+")("a"))
    assert peak() - before < 32 << 20


def test_many_expressions_that_each_stay_below_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = {f"(a|a){{13}}[b{place}]": place for place in range(60)}
    budget = Budget(HERE)
    find = budget.lookup("rank_pattern", slow, None, 400)
    assert find("a" * 14) is None  # one by one they are harmless
    text = refused(lambda: [find("a" * 14) for _ in range(400)])
    assert "rank_pattern: found the pattern" in text and "takes too long" in text
    budget = Budget(HERE)
    rules = [budget.pattern("target_modules", f"(a|a){{15}}[b{place}]") for place in range(20)]
    refused(lambda: [matches("a" * 16) for matches in rules * 20])


def test_the_budget_is_one_for_all_keys() -> None:
    budget = Budget(HERE)
    find = budget.lookup("rank_pattern", {"(a|a)*[bc]": 1}, None, 1)
    refused(lambda: find("a" * 400))
    refused(lambda: budget.lookup("alpha_pattern", {"[q]": 1}, None, 1)("q"))


def test_the_number_of_expressions_and_names_is_bounded() -> None:
    refused(lambda: Budget(HERE).lookup("rank_pattern", {f"[a]{i}": 1 for i in range(io.MAX_RULES + 1)}, None, 1))
    budget = Budget(HERE, 60)
    for count in range(io.MAX_RULES):
        budget.pattern("target_modules", f"[a]{count}")
    assert f"more than {io.MAX_RULES}" in refused(lambda: budget.pattern("target_modules", "a+"))
    assert "20001 patterns" in refused(lambda: Budget(HERE).lookup("k", {f"a{i}": 1 for i in range(20_001)}, None, 1))
    assert "101 patterns" in refused(lambda: Budget(HERE).lookup("k", {f"a{i}": 1 for i in range(101)}, None, 10_000))


def test_thousands_of_names_cost_little() -> None:
    """As EVA writes them: a pattern for every module."""
    parts = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
    )
    modules = [f"model.layers.{block}.{part}" for block in range(120) for part in parts]
    budget = Budget(HERE)
    find = budget.lookup("rank_pattern", {name: place for place, name in enumerate(modules)}, None, len(modules))
    assert [find(module) for module in modules] == list(range(len(modules)))
    assert budget.rules == 0 and budget.left > 0.1


def test_names_that_cost_much_are_stopped_as_well() -> None:
    """Names that end with a dot, which is any character, are compared with every module, letter by letter."""
    table = {"a" * 240 + f"{place:05}.": place for place in range(4000)}
    find = Budget(HERE).lookup("rank_pattern", table, None, 250)
    refused(lambda: [find("b." + "a" * 240 + "99999.") for _ in range(250)])


def test_expressions_are_kept_by_no_cache() -> None:
    """The package's own keeps 500 for ever."""
    before = len(_main._cache)
    assert rule("q(a|b)+")("qab") and resolve({"r(a|b)+": 1}, "rab") == 1
    assert len(_main._cache) == before


NESTED = [
    "(?:" + "(a|b)?" * 36 + "){8}",
    "(?:" + "(a)*" * 50 + "){8}",
    "(?:" + "a?" * 100 + "){8}",
    "(a|" * 63 + ")" * 63,
]
NESTED += [
    "((?:" + "(a*|b)?" * 30 + "){3}){2}",
    "(?:" * 40 + "a" + ")*" * 30 + ")" * 10,
    "[a-z]*" * 40,
    "(?=" * 60 + ")" * 60,
]


@pytest.mark.parametrize("pattern", NESTED, ids=lambda pattern: pattern[:16])
def test_compiling_takes_little_time_and_memory(pattern: str) -> None:
    budget, before, begun = Budget(HERE), reset_peak(), time.process_time()
    gc.disable()
    try:
        kept = [budget.pattern("k", f"{pattern}{place}") for place in range(io.MAX_RULES)]
    finally:
        gc.enable()
    assert len(kept) == io.MAX_RULES
    assert time.process_time() - begun < 0.6
    assert peak() - before < 32 << 20


def test_a_busy_machine_refuses_no_honest_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is counted is the time of the thread on the processor, not that of other threads or on the wall."""
    hours = itertools.count(0, 3600)
    for clock in ("perf_counter", "monotonic", "time", "process_time"):
        monkeypatch.setattr(time, clock, lambda: float(next(hours)))
    budget = Budget(HERE)
    matches = budget.pattern("target_modules", r".*\.(q|v)_proj")
    assert all(matches("model.layers.0.self_attn.q_proj") for _ in range(20)) and budget.left > 0.2
