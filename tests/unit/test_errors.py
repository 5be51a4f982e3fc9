"""The error tree: one root, typed fields, and all of them survive a process pool."""

from __future__ import annotations

import builtins
import copy
import inspect
from typing import Any

import pytest

from fabric import errors
from fabric.errors import FabricError, WaitTimeoutError, shortened

LEAVES = [getattr(errors, name) for name in errors.__all__]
FIELDS: dict[str, Any] = dict(
    **dict.fromkeys(["field", "topic", "kind", "where", "peer", "known", "state", "queue", "reason", "what"], "text"),
    **dict.fromkeys(["seed", "size", "limit", "used", "ours", "theirs", "owner", "caller", "opened_in", "used_in"], 3),
    **dict.fromkeys(["segment", "position", "feed", "first", "end"], 4),
    directory="text",
    line="train.py:7",
    waited_s=2.5,
)


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: leaf.__name__)
def test_an_error_keeps_its_fields_and_survives_copying_between_processes(leaf: type[FabricError]) -> None:
    error = leaf("some detail", **FIELDS)
    again = copy.copy(error)
    assert type(again) is leaf
    assert (again.detail, again.fields, str(again)) == ("some detail", FIELDS, str(error))
    assert again.waited_s == 2.5  # type: ignore[attr-defined]
    assert "{" not in str(error)


def test_all_errors_have_one_root_and_are_listed() -> None:
    found = {value for _, value in inspect.getmembers(errors, inspect.isclass) if issubclass(value, FabricError)}
    assert found == set(LEAVES)
    assert errors.__all__ == sorted(errors.__all__)
    assert not {leaf.__name__ for leaf in LEAVES} & set(dir(builtins))


def test_builtin_kinds_stay_catchable() -> None:
    assert issubclass(WaitTimeoutError, TimeoutError)
    assert issubclass(errors.ConfigError, ValueError)
    assert issubclass(errors.UnknownPeerError, LookupError)


def test_only_waiting_and_fullness_can_be_tried_again() -> None:
    assert {leaf.__name__ for leaf in LEAVES if leaf.retriable} == {
        "WaitTimeoutError",
        "ReceiveTimeoutError",
        "SubscribeTimeoutError",
        "JoinTimeoutError",
        "QueueFullError",
        "CircuitOpenError",
        "RequestTimeoutError",
        "SpillFullError",
        "SpillLockedError",
        "LetterStoreFullError",
        "LetterStoreLockedError",
    }


def test_a_list_in_a_message_is_cut() -> None:
    assert shortened([1, 2, 3]) == "1, 2, 3"
    assert shortened(list(range(10)), most=8) == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"
