"""Operations that wait, written once for both faces: a generator yields what it waits for, and its face waits.

The synchronous face waits with `Engine.until`, the asynchronous one on its event loop. A generator that is given up,
because its thread was interrupted or its task cancelled, is closed: what it undoes in `finally` is undone.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import NamedTuple, TypeAlias, TypeVar

from fabric.errors import FabricError

__all__ = ["Steps", "Wait", "run_steps"]

T = TypeVar("T")


class Wait(NamedTuple):
    """Wait until `is_over()`, at most `timeout_s`; what is sent back says whether it came.

    `serving`: step handlers of this member run meanwhile.
    """

    is_over: Callable[[], bool]
    timeout_s: float
    serving: bool = False


Steps: TypeAlias = Generator[Wait, bool, T]


def run_steps(steps: Steps[T], until: Callable[[Wait], bool]) -> T:
    """Run an operation on this thread, waiting with `until`; its errors go through the operation."""
    try:
        wait = next(steps)
        while True:
            try:
                came = until(wait)
            except FabricError as error:
                wait = steps.throw(error)
            else:
                wait = steps.send(came)
    except StopIteration as end:
        result: T = end.value
        return result
    finally:
        steps.close()
