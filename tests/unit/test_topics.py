"""Topics, patterns, seeds."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from fabric.errors import SeedError, TopicError
from fabric.topics import TOPIC_BYTES_MAX, WILDCARDS_MAX, Pattern, check_seed, check_topic, compile_pattern


@pytest.mark.parametrize("topic", ["a", "layers.encoder.3.health", "_private", "a-b.c_d", "0", "x" * TOPIC_BYTES_MAX])
def test_the_names_of_modules_are_topics(topic: str) -> None:
    assert check_topic(topic) == topic
    assert Pattern(topic).matches(topic)


@pytest.mark.parametrize(
    "topic",
    [
        "",
        ".",
        "a.",
        ".a",
        "a..b",
        "-a",
        "a b",
        "a\n",
        "a.*",
        "**",
        "é",
        "a/b",
        "x" * (TOPIC_BYTES_MAX + 1),
        "\ud800",
        7,
        b"a",
    ],
)
def test_everything_else_is_refused_by_name(topic: str) -> None:
    with pytest.raises(TopicError) as caught:
        check_topic(topic)
    assert len(caught.value.topic) <= 80


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        ("a.*.c", ["a.b.c", "a.c.c"], ["a.c", "a.b.b.c", "a.b.c.d"]),
        ("a.**", ["a", "a.b", "a.b.c"], ["b", "ab", "b.a"]),
        ("**.c", ["c", "a.c", "a.b.c"], ["c.a", "bc"]),
        ("**", ["a", "a.b.c"], []),
        ("a.**.c", ["a.c", "a.b.c", "a.b.b.c"], ["a", "c", "a.b.c.d"]),
        ("a.**.**.c", ["a.c", "a.b.c"], ["a"]),
        ("*", ["a"], ["a.b"]),
        ("a-b.c", ["a-b.c"], ["aXb.c", "a-bXc"]),
        ("**.*", ["a", "a.b"], []),
    ],
)
def test_a_pattern_matches_whole_topics(pattern: str, matching: list[str], other: list[str]) -> None:
    compiled = compile_pattern(pattern)
    assert [topic for topic in matching if not compiled.matches(topic)] == []
    assert [topic for topic in other if compiled.matches(topic)] == []


def matches_by_hand(pattern: list[str], topic: list[str]) -> bool:
    if not pattern:
        return not topic
    if pattern[0] == "**":
        return any(matches_by_hand(pattern[1:], topic[skip:]) for skip in range(len(topic) + 1))
    return bool(topic) and pattern[0] in ("*", topic[0]) and matches_by_hand(pattern[1:], topic[1:])


def test_all_short_patterns_agree_with_matching_by_hand() -> None:
    topics = [list(topic) for length in range(1, 4) for topic in product("ab", repeat=length)]
    patterns = [list(p) for length in range(1, 4) for p in product(["a", "b", "*", "**"], repeat=length)]
    for pattern in patterns:
        compiled = Pattern(".".join(pattern))
        for topic in topics:
            assert compiled.matches(".".join(topic)) == matches_by_hand(pattern, topic), (pattern, topic)


@pytest.mark.parametrize("pattern", ["", "a.", "a.***", "*a", "a b", "**a.b", "\0"])
def test_a_malformed_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(TopicError):
        compile_pattern(pattern)


def test_the_number_of_double_wildcards_is_bounded_and_neighbours_count_once() -> None:
    assert Pattern(".".join(["**"] * 50)).matches("a.b")
    assert Pattern(".a.".join(["**"] * WILDCARDS_MAX)).matches("a.a.a")
    with pytest.raises(TopicError, match="more than 4"):
        Pattern(".a.".join(["**"] * (WILDCARDS_MAX + 1)))


def test_a_pattern_is_compiled_once_and_shows_its_text() -> None:
    assert compile_pattern("a.**") is compile_pattern("a.**")
    assert repr(compile_pattern("a.**")) == "Pattern('a.**')"


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, np.int64(7), np.uint8(3)])
def test_integers_below_two_to_the_63_are_seeds(seed: int) -> None:
    assert check_seed(seed) == int(seed)
    assert type(check_seed(seed)) is int


@pytest.mark.parametrize("seed", [-1, 2**63, True, 1.0, "1", None, np.float32(1)])
def test_everything_else_is_no_seed(seed: int) -> None:
    with pytest.raises(SeedError):
        check_seed(seed)
