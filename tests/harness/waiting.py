"""Waiting on a condition with a deadline: the only way in which a test waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

_POLL_S = 0.005

T = TypeVar("T")


def until(condition: Callable[[], T], *, timeout_s: float = 10.0, what: str = "the condition") -> T:
    """The first true result of `condition`, asked every 5 ms.

    Raises:
        AssertionError: It was still false after `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not (result := condition()):
        assert time.monotonic() < deadline, f"{what} did not come true within {timeout_s:g} s (last: {result!r})"
        pause.wait(_POLL_S)
    return result
