"""Operations that wait, as generators."""

from __future__ import annotations

import pytest

from fabric.engine.steps import Steps, Wait, run_steps
from fabric.errors import ClosedError


def never() -> bool:
    return False


def asking(log: list[str]) -> Steps[str]:
    try:
        first = yield Wait(never, 1.0)
        second = yield Wait(never, 2.0, serving=True)
    except ClosedError:
        log.append("closed")
        return "closed"
    finally:
        log.append("left")
    return f"{first} {second}"


def test_an_operation_waits_as_its_face_does_and_gets_the_answers() -> None:
    waits: list[Wait] = []

    def until(wait: Wait) -> bool:
        waits.append(wait)
        return len(waits) == 2

    assert run_steps(asking([]), until) == "False True"
    assert [(wait.timeout_s, wait.serving) for wait in waits] == [(1.0, False), (2.0, True)]


def test_an_error_of_the_wait_goes_through_the_operation() -> None:
    def until(wait: Wait) -> bool:
        raise ClosedError(what="it")

    log: list[str] = []
    assert run_steps(asking(log), until) == "closed"
    assert log == ["closed", "left"]


def test_an_interrupted_operation_is_closed() -> None:
    def until(wait: Wait) -> bool:
        raise KeyboardInterrupt

    log: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run_steps(asking(log), until)
    assert log == ["left"]
