"""Topics, patterns, seeds: what they may look like, and when a pattern matches.

A topic is dotted, `layers.encoder.3.health`: segments of `[A-Za-z0-9_][A-Za-z0-9_-]*`, at most 255 bytes in all, so
that the names of torch modules fit. A pattern is a topic in which `*` stands for one segment and `**` for any number
of them, none included, anywhere.
"""

from __future__ import annotations

import re
from functools import lru_cache

from fabric.errors import SeedError, TopicError

__all__ = [
    "PATTERN_CACHE_SIZE",
    "SEED_END",
    "TOPIC_BYTES_MAX",
    "WILDCARDS_MAX",
    "Pattern",
    "check_seed",
    "check_topic",
    "compile_pattern",
]

TOPIC_BYTES_MAX = 255
"""Longest topic or pattern in bytes: a length fits into one byte on the wire."""

WILDCARDS_MAX = 4
"""Most `**` in one pattern; nobody needs more, and it bounds what is compiled for a peer."""

PATTERN_CACHE_SIZE = 1024
"""Most compiled patterns kept; the least recently used gives way."""

SEED_END = 2**63
"""Seeds are 0 <= seed < SEED_END: they travel as signed 64-bit columns."""

_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*\Z")


def check_topic(topic: str) -> str:
    """Return `topic`, or raise `TopicError` that names what is wrong with it."""
    for segment in _segments(topic):
        if not _SEGMENT.match(segment):
            raise TopicError(f"segment {segment[:40]!r} is not [A-Za-z0-9_][A-Za-z0-9_-]*", topic=topic[:80])
    return topic


def check_seed(seed: int) -> int:
    """Return `seed` as an int, or raise `SeedError`: a seed is an integer in 0 <= seed < 2**63 and never a bool."""
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise SeedError(f"it is of type {type(seed).__name__}", seed=seed)
    number = int(seed.__index__())
    if not 0 <= number < SEED_END:
        raise SeedError("seeds are 0 <= seed < 2**63", seed=seed)
    return number


class Pattern:
    """A compiled pattern.

    `matches(topic)` costs well below a microsecond; publishers ask once for each feed and keep the answer.
    """

    __slots__ = ("_match", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        first, *between = _parts(text)
        if len(between) > WILDCARDS_MAX:
            raise TopicError(f"more than {WILDCARDS_MAX} ** in one pattern", topic=text[:80])
        # The earliest match of what stands between two ** is as good as any, so only the last ** may look back: the
        # time to match is in proportion to the topic, whatever the pattern.
        expression = first + "".join(rf"(?>(?:[^.]+\.)*?{part})" for part in between[:-1])
        if between:
            expression += r"(?:[^.]+\.)*" + between[-1]
        self._match = re.compile(expression + r"\Z").match

    def matches(self, topic: str) -> bool:
        """Whether this pattern matches the (well-formed) topic."""
        return self._match(topic + ".") is not None

    def __repr__(self) -> str:
        return f"Pattern({self.text!r})"


def _parts(text: str) -> list[str]:
    """The regular expressions before, between and after the `**` of a pattern; two that touch are one."""
    parts, is_open = [""], False
    for segment in _segments(text):
        if segment == "**":
            parts += [] if is_open else [""]
        elif segment == "*":
            parts[-1] += r"[^.]+\."
        elif _SEGMENT.match(segment):
            parts[-1] += re.escape(segment) + r"\."
        else:
            raise TopicError(f"segment {segment[:40]!r} is neither a name nor * nor **", topic=text[:80])
        is_open = segment == "**"
    return parts


@lru_cache(maxsize=PATTERN_CACHE_SIZE)
def compile_pattern(text: str) -> Pattern:
    """The compiled pattern, from a bounded cache. Raises `TopicError`."""
    return Pattern(text)


def _segments(text: str) -> list[str]:
    if not isinstance(text, str):
        raise TopicError(f"a topic is a str, not {type(text).__name__}", topic=str(text)[:80])
    if not text or len(text.encode("utf-8", "surrogatepass")) > TOPIC_BYTES_MAX:
        raise TopicError(f"a topic has 1 to {TOPIC_BYTES_MAX} bytes", topic=text[:80])
    return text.split(".")
