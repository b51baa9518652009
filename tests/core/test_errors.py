"""Errors are ValueErrors of one family, so that callers can catch all of them or one kind."""

from __future__ import annotations

import pytest

from moelora.core import errors


@pytest.mark.parametrize("kind", [errors.ConfigError, errors.TargetError, errors.DataError, errors.AdapterError])
def test_family(kind: type[Exception]) -> None:
    assert issubclass(kind, errors.MoeloraError) and issubclass(kind, ValueError)


def test_a_bad_target_is_a_bad_configuration() -> None:
    assert issubclass(errors.TargetError, errors.ConfigError)
