"""Validation messages: where, what was found, what is expected, and the nearest key."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
from pydantic import Field, ValidationError, field_validator

from moelora.core.errors import ConfigError
from moelora.core.validate import Strict, check, nearest


class Inner(Strict):
    rank: Annotated[int, Field(ge=1)] = 8
    name: str = "a"


class Outer(Strict):
    inner: Inner = Inner()
    many: dict[str, Inner] = {}
    needed: float
    even: int = 0

    @field_validator("even")
    @classmethod
    def _even(cls, value: int) -> int:
        if value % 2:
            raise ValueError(f"expected an even number, found {value}")
        return value


def fault(values: Any, where: str = "top") -> str:
    with pytest.raises(ConfigError) as caught:
        check(Outer, values, where)
    return str(caught.value)


def test_good_values_pass() -> None:
    assert check(Outer, {"needed": 1, "inner": {"rank": 3}}, "top") == Outer(needed=1.0, inner=Inner(rank=3))


def test_unknown_key_names_the_place_and_the_nearest_key() -> None:
    message = fault({"needed": 1.0, "iner": {}})
    assert message.startswith("top: unknown key 'iner'; did you mean 'inner'?")
    assert "known: even, inner, many, needed" in message


def test_unknown_nested_key_offers_the_keys_of_its_own_section() -> None:
    message = fault({"needed": 1.0, "inner": {"rnk": 3}})
    assert message.startswith("top.inner: unknown key 'rnk'; did you mean 'rank'?") and "needed" not in message
    message = fault({"needed": 1.0, "many": {"x": {"nam": "b"}}})
    assert message.startswith("top.many.x: unknown key 'nam'; did you mean 'name'?")


def test_without_a_place_the_message_still_reads_well() -> None:
    assert fault({"needed": 1.0, "iner": {}}, where="").startswith("top level: unknown key 'iner'")


def test_missing_key() -> None:
    assert fault({}) == "top.needed: required, but not given"


def test_wrong_type_says_what_was_found() -> None:
    message = fault({"needed": 1.0, "inner": {"rank": "8"}})
    assert message == "top.inner.rank: input should be a valid integer, found '8'"
    assert "top.needed" in fault({"needed": True}) and "found True" in fault({"needed": True})


def test_range_says_the_limit_and_what_was_found() -> None:
    message = fault({"needed": 1.0, "inner": {"rank": 0}})
    assert message == "top.inner.rank: input should be greater than or equal to 1, found 0"


def test_own_checks_speak_for_themselves() -> None:
    assert fault({"needed": 1.0, "even": 3}) == "top.even: expected an even number, found 3"


def test_several_faults_are_one_line_each() -> None:
    lines = fault({"inner": {"rank": 0}, "bogus": 1}).splitlines()
    assert len(lines) == 3
    assert {line.split(":")[0] for line in lines} == {"top", "top.inner.rank", "top.needed"}


@pytest.mark.parametrize("values", [None, 3, "needed: 1", ["needed"]])
def test_something_else_than_a_mapping(values: Any) -> None:
    assert fault(values) == f"top: expected a mapping of keys to values, found {values!r}"


def test_values_do_not_change_later() -> None:
    with pytest.raises(ValidationError):
        Inner().rank = 3  # type: ignore[misc]


def test_nearest_lists_what_is_known() -> None:
    assert nearest("smra", ["smora", "single"]) == "; did you mean 'smora'? known: single, smora"
    far = nearest("xyz", ["smora", "meteora"])
    assert far.endswith("known: meteora, smora") and "did you mean" not in far
    assert nearest("xyz", []) == ""


def test_nearest_shortens_long_lists() -> None:
    message = nearest("x", [f"name{i:03d}" for i in range(100)])
    assert "name039, ... (100 in all)" in message and "name040" not in message
