"""The asynchronous face has the names of the synchronous one, with the same parameters, awaited."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import fabric
from fabric import aio

CLASSES = ("Fabric", "Publisher", "Subscription")
NOT_AWAITED = {
    "publisher",
    "loan",
    "on",
    "respond",
    "drain",
    "cursor",
    "commit",
    "handled_by",
    "statistics",
    "ledger",
    "orphans",
}
NOT_AWAITED |= {"close_at_exit"}
INSIDE = {"publisher_class", "subscription_class"}
OUTBOX = {"abandon", "close_burst", "close_if_due", "has_left", "shut"}
"""What the engine asks of a publisher; the asynchronous one keeps its outbox to itself."""


def public(kind: type) -> dict[str, Any]:
    return {name: getattr(kind, name) for name in dir(kind) if not name.startswith("_")}


def test_the_asynchronous_face_has_the_same_names() -> None:
    assert sorted(aio.__all__) == sorted(fabric.__all__)


@pytest.mark.parametrize("name", CLASSES)
def test_each_method_has_the_same_signature_and_is_awaited(name: str) -> None:
    theirs = public(getattr(aio, name))
    for member, value in public(getattr(fabric, name)).items():
        if member in INSIDE or (name == "Publisher" and member in OUTBOX):
            continue
        assert member in theirs, f"aio.{name}.{member} is missing"
        if not callable(value):
            continue
        assert parameters(theirs[member]) == parameters(value), f"{name}.{member}"
        awaited = inspect.iscoroutinefunction(theirs[member])
        assert awaited is (member not in NOT_AWAITED), f"{name}.{member}"


@pytest.mark.parametrize("name", ["join", "observe", "adopt"])
def test_entering_takes_the_same_parameters(name: str) -> None:
    assert parameters(getattr(aio, name)) == parameters(getattr(fabric, name))
    assert inspect.iscoroutinefunction(getattr(aio, name))


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    return [(each.name, each.kind, each.default) for each in inspect.signature(function).parameters.values()]


def test_the_same_attributes_are_there() -> None:
    for attribute in ("topic", "policy", "when_full", "next"):
        assert isinstance(getattr(aio.Publisher, attribute), property)
    assert aio.Subscription.__aiter__
    assert aio.Message is fabric.Message
