from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric.errors import ConfigError, RendezvousError
from fabric.rendezvous.boards import Entry, entry_bytes_max
from fabric.rendezvous.cards import CARD_BYTES_MAX, Card
from fabric.rendezvous.lives import Life, is_dead
from tests.harness.cards import a_card

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
FIELDS = tuple(json.loads(a_card().to_json()))

BAD = {
    "job": ["", "x" * 256, "ü" * 128, "line\nbreak", "\x1b[31m", 7, None],
    "name": ["", "\0", b"bytes"],
    "rank": [-1, 2, True, 1.0, "0"],
    "world_size": [0, -1, 65_537, 2.0],
    "incarnation": [-1, 2**64, "1"],
    "host": ["", None],
    "pid": [0, -1, 2**31],
    "version": [-1, 65_536],
    "endpoints": [(), ("a", "b"), ("a", "b", ""), ("a", "b", 3), ("a", "b", "c" * 513), ["a", "b", "c"], "abc"],
}


def test_a_card_survives_json() -> None:
    for card in (a_card(), a_card(rank=None), a_card(job="ü" * 127, name="层" * 85, incarnation=2**64 - 1)):
        assert Card.from_json(card.to_json()) == card
        assert Card.from_json(card.to_json().encode()) == card


def test_the_longest_card_fits_its_bound() -> None:
    longest = a_card(rank=65_535, world_size=65_536, incarnation=2**64 - 1, pid=2**31 - 1, version=65_535)
    # JSON escapes a character of three bytes as six, one of four bytes as twelve.
    longest = replace(longest, job="\U0001f331" * 63, name="\U0001f331" * 63, host="\U0001f331" * 63)
    longest = replace(longest, endpoints=("\U0001f331" * 128, "层" * 170, "é" * 256))
    text = longest.to_json()
    assert len(text) <= CARD_BYTES_MAX
    assert Card.from_json(text) == longest
    assert len(Entry(longest, dict.fromkeys(range(65_536), 2**64 - 1)).to_json()) <= entry_bytes_max(65_536)


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD.items() for value in values])
def test_a_field_out_of_its_bounds_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"card.{field}"):
        a_card(**{field: value})


@pytest.mark.parametrize("field", FIELDS)
def test_a_missing_field_is_refused_by_name(field: str) -> None:
    found = json.loads(a_card().to_json())
    del found[field]
    with pytest.raises(RendezvousError, match=f"no {field}"):
        Card.from_json(json.dumps(found))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"card"', "9" * 5000, "[" * 8000, "x" * (CARD_BYTES_MAX + 1), b"\xff"]
)
def test_what_is_no_card_is_refused(text: str | bytes) -> None:
    with pytest.raises(RendezvousError):
        Card.from_json(text)


def test_fields_of_a_newer_version_are_ignored() -> None:
    found = json.loads(a_card(version=9).to_json()) | {"colour": "green"}
    assert Card.from_json(json.dumps(found)) == a_card(version=9)


@given(changes=st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1))
def test_any_json_in_a_field_gives_a_valid_card_or_a_typed_error(changes: dict[str, Any]) -> None:
    text = json.dumps(json.loads(a_card().to_json()) | changes)
    try:
        card = Card.from_json(text)
    except RendezvousError:
        return
    assert Card.from_json(card.to_json()) == card


@given(found=JSON)
def test_any_json_as_an_entry_gives_a_typed_error(found: Any) -> None:
    with pytest.raises(RendezvousError):
        Entry.from_json(json.dumps(found))


@pytest.mark.parametrize(
    "seen", [None, [], {"-1": 1}, {"٣": 1}, {"x": 1}, {"999": 1}, {"0": -1}, {"0": "1"}, {"0": 1, "1": 1, "00": 1}]
)
def test_an_entry_that_saw_nonsense_is_refused(seen: Any) -> None:
    found = Entry(a_card()).to_fields() | {"seen": seen}
    with pytest.raises(RendezvousError):
        Entry.from_json(json.dumps(found))


def test_an_entry_survives_json() -> None:
    entry = Entry(a_card(), {0: 2**64 - 1, 1: 0}, left=True)
    assert Entry.from_json(entry.to_json()) == entry


def test_this_process_is_alive() -> None:
    life = Life.of(os.getpid())
    assert life is not None
    assert not is_dead(a_card(), life)
    uptime_s = float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])
    assert 0 < life.started / os.sysconf("SC_CLK_TCK") < uptime_s


def test_a_process_is_dead_when_it_has_ended_or_its_number_is_used_again() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        card, life = a_card(pid=child.pid), Life.of(child.pid)
        assert life is not None
        assert not is_dead(card, life)
        assert is_dead(card, replace(life, started=life.started - 1))
        assert child.stdin is not None
        child.stdin.close()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert is_dead(card, life), "a process that waits to be reaped has ended"
    assert is_dead(card, life)


def test_nobody_is_declared_dead_where_the_number_means_nothing() -> None:
    gone = Life("another namespace", 1)
    assert not is_dead(a_card(pid=2**31 - 1), gone)
    assert not is_dead(a_card(pid=2**31 - 1), None)
    ours = Life.of(os.getpid())
    assert ours is not None
    assert not is_dead(a_card(pid=2**31 - 1, host="elsewhere"), ours)
    assert is_dead(a_card(pid=2**31 - 1), ours)


@pytest.mark.parametrize("found", [None, {}, {"namespace": 1, "started": 1}, {"namespace": "n", "started": "1"}])
def test_a_life_that_a_file_does_not_tell_is_none(found: Any) -> None:
    assert Life.from_fields(found) is None
