"""Regular expressions that others wrote: matched in bounded time and memory, or refused."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import regex

from moelora.io.files import fail, short

MAX_PATTERN, MAX_RULES, MAX_MATCHES = 256, 64, 1_000_000  # characters; expressions; patterns times modules
MAX_UNROLLED = 2048  # characters, times all {counts} of an expression: the engine writes repetitions out
SECONDS = 0.3  # of the processor, to match all expressions; to compile one of such length takes 3 ms
MAX_LETTERS = 10_000_000  # of names, compared with module paths
COUNTS = re.compile(r"\{(\d{0,3})(?:,(\d{0,3}))?\}")
FOREIGN = re.compile(r"[^ -~]|\[\[|\[:|--|&&|~~|\|\||\\[1-9NuUx]|\(\?(?:P[=>]|\()")
"""What the two engines may read differently: other than ASCII, sets of sets, references to groups."""
SIMPLER = "list the modules by name"
NAMED = re.compile(r"(\^|\.\*)?((?:[A-Za-z0-9_-]|\\?\.)+)\$?")


class Budget:
    """The work that all patterns of one adapter may cause together."""

    def __init__(self, path: Path, seconds: float = SECONDS) -> None:
        self.path, self.left, self.rules, self.letters = path, seconds, 0, 0

    def pattern(self, key: str, pattern: str) -> Callable[[str], bool]:
        """Whether a module path matches ``pattern`` as a whole, in Python's syntax. Raises AdapterError.

        The function raises AdapterError once the time is spent.
        """
        return self._rule(key, pattern)

    def lookup(self, key: str, patterns: dict[str, Any], default: Any, modules: int) -> Callable[[str], Any]:
        """A function from one of so many module paths to its value: that of the first pattern that matches its end.

        PEFT's rule is ``re.match(rf"(.*\\.)?({pattern})$", module)``, in the order of the file. Names, with ``.`` for
        any character, are compared without the engine, so that thousands of them cost little.
        """
        if len(patterns) * max(modules, 50) > MAX_MATCHES:
            fail(self.path, key, f"{len(patterns)} patterns for {modules} modules", "fewer", "merge the patterns")
        table = [(*self._ending(key, pattern), value) for pattern, value in patterns.items()]
        return lambda module: next(
            (value for end, rule, value in table if module.endswith(end) and rule(module)), default
        )

    def _ending(self, key: str, pattern: str) -> tuple[str, Callable[[str], bool]]:
        """(what a module path that matches ends with, whether one that does so matches)."""
        found = NAMED.fullmatch(pattern) if len(pattern) <= MAX_PATTERN else None
        if found is None:
            return "", self._rule(key, pattern, r"(.*\.)?({})")
        anchor, name = found[1], found[2].replace("\\", "")
        literal = re.split(r"\\?\.", found[2])[-1]
        wild = [place for place, letter in enumerate(found[2].replace("\\.", "!")) if letter == "."]

        def matches(module: str) -> bool:
            start = len(module) - len(name)
            border = start == 0 or anchor == ".*" or (anchor is None and module[start - 1 : start] == ".")
            if start < 0 or not border:
                return False
            self.letters += len(name)
            if self.letters > MAX_LETTERS:
                fail(self.path, key, "patterns that take too long", "fewer or shorter ones", "merge the patterns")
            end = list(module[start:])
            for place in wild:
                end[place] = "."
            return end == list(name)

        return literal, matches

    def _rule(self, key: str, pattern: str, around: str = "{}") -> Callable[[str], bool]:
        """Whether a module path matches a pattern within ``around``."""
        text = short(pattern)
        if len(pattern) > MAX_PATTERN:
            fail(self.path, key, f"a pattern of {len(pattern)} characters", f"at most {MAX_PATTERN}", SIMPLER)
        self.rules += 1
        if self.rules > MAX_RULES:
            fail(self.path, key, f"more than {MAX_RULES} regular expressions", "fewer", SIMPLER)
        if (foreign := FOREIGN.search(pattern)) is not None:
            fail(self.path, key, f"{short(foreign[0])} in the pattern {text}", "a plain expression", SIMPLER)
        unrolled, counts = len(pattern), COUNTS.findall(pattern)
        for low, high in counts:
            unrolled *= max(int(low or 0), int(high or 0), 1)
        if len(counts) != pattern.count("{") or unrolled > MAX_UNROLLED:
            fail(self.path, key, f"the pattern {text}", "few and small {counts}", SIMPLER)
        try:
            re.compile(pattern)  # refuses what is the other module's own syntax
            rule = regex.compile(around.format(pattern), regex.VERSION0, cache_pattern=False)
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            fail(self.path, key, f"the pattern {text}", f"a regular expression ({short(str(error))})", SIMPLER)

        def matches(module: str) -> bool:
            begun, found = time.thread_time(), False
            try:
                found = self.left > 0 and rule.fullmatch(module, timeout=max(self.left, 1e-3)) is not None
                self.left -= time.thread_time() - begun
            except (TimeoutError, MemoryError):
                self.left = 0.0
            if self.left <= 0:
                fail(self.path, key, f"the pattern {text}, which takes too long", "a simple one", SIMPLER)
            return found

        return matches
