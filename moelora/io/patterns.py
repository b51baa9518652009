"""Regular expressions that others wrote: matched in bounded time and memory, or refused."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import regex

from moelora.io.files import fail, short

MAX_PATTERN, MAX_MATCHES, SECONDS = 256, 1_000_000, 0.3  # characters; patterns times modules; for all matches together
COUNTS = re.compile(r"\{(\d{0,2})(,\d{0,2})?\}")
SIMPLER = "list the modules by name"
NAMED = re.compile(r"(\^|\.\*)?((?:[A-Za-z0-9_-]|\\?\.)+)\$?")


class Budget:
    """The time that all patterns of one adapter may take together."""

    def __init__(self, path: Path, seconds: float = SECONDS) -> None:
        self.path, self.left = path, seconds

    def pattern(self, key: str, pattern: str) -> Callable[[str], bool]:
        """Whether a module path matches ``pattern`` as a whole, in Python's syntax. Raises AdapterError.

        The function raises AdapterError once the time is spent.
        """
        text = short(pattern)
        if len(pattern) > MAX_PATTERN:
            fail(self.path, key, f"a pattern of {len(pattern)} characters", f"at most {MAX_PATTERN}", SIMPLER)
        counts = COUNTS.findall(pattern)
        if len(counts) != pattern.count("{") or len(counts) > 2:
            fail(self.path, key, f"the pattern {text}", "at most two {counts}, of two digits each", SIMPLER)
        try:
            re.compile(pattern)  # what Python would refuse, and the other module's own syntax
            rule = regex.compile(pattern)
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            fail(self.path, key, f"the pattern {text}", f"a regular expression ({short(str(error))})", SIMPLER)

        def matches(module: str) -> bool:
            started = time.perf_counter()
            try:
                return rule.fullmatch(module, timeout=max(self.left, 1e-3)) is not None
            except TimeoutError:
                fail(self.path, key, f"the pattern {text}, which takes too long", "a simple one", SIMPLER)
            finally:
                self.left -= time.perf_counter() - started

        return matches

    def lookup(self, key: str, patterns: dict[str, Any], default: Any, modules: int) -> Callable[[str], Any]:
        """A function from one of so many module paths to its value: that of the first pattern that matches its end.

        PEFT's rule is ``re.match(rf"(.*\\.)?({pattern})$", module)``, in the order of the file. Names, with ``.`` for
        any character, are compared without the engine, so that thousands of them cost little.
        """
        if len(patterns) * modules > MAX_MATCHES:
            fail(self.path, key, f"{len(patterns)} patterns for {modules} modules", "fewer", "merge the patterns")
        table = [(self._ending(key, pattern), value) for pattern, value in patterns.items()]
        return lambda module: next((value for matches, value in table if matches(module)), default)

    def _ending(self, key: str, pattern: str) -> Callable[[str], bool]:
        found = NAMED.fullmatch(pattern) if len(pattern) <= MAX_PATTERN else None
        if found is None:
            return self.pattern(key, rf"(.*\.)?({pattern})")
        anchor, rule, length = found[1], re.compile(found[2]), len(found[2].replace("\\", ""))

        def matches(module: str) -> bool:
            start = len(module) - length
            border = start == 0 or anchor == ".*" or (anchor is None and module[start - 1 : start] == ".")
            return start >= 0 and border and rule.fullmatch(module, start) is not None

        return matches
