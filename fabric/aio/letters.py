"""Dead letters, awaited: only their values have to be."""

from __future__ import annotations

from typing import Any, ClassVar

from fabric.letters import DeadLetters as AnyLetters
from fabric.letters import LetterBase

__all__ = ["DeadLetter", "DeadLetters"]


class DeadLetter(LetterBase):
    """A record that was not handled, and why. Its value lies in the store."""

    __slots__ = ()

    async def value(self) -> Any:  # noqa: ANN401 - whatever was published
        """What was published, read from the store. Raises as that of the synchronous face."""
        return (await self._run(self._reading()))[0]

    async def metadata(self) -> dict[str, Any]:
        """The facts that were published beside the value. Raises as `value`."""
        found: dict[str, Any] = (await self._run(self._reading()))[1]
        return found


class DeadLetters(AnyLetters[DeadLetter]):
    """The dead letters of a member; nothing here waits but what a letter itself reads."""

    letter_class: ClassVar[type[LetterBase]] = DeadLetter
