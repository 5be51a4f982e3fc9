"""Dead letters as the application sees them: looking, giving them another chance, giving them up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from fabric.engine.steps import Steps, Wait
from fabric.errors import ConfigError, FabricError, SchemaError, WaitTimeoutError
from fabric.payloads import decode, unpack_metadata
from fabric.storage.letter_rows import LetterRow
from fabric.topics import compile_pattern

if TYPE_CHECKING:
    from fabric.engine.loop import Engine

__all__ = ["DeadLetter", "DeadLetters", "LetterBase", "RedriveReport"]

READ_S = 10.0
"""How long `value` waits for the storage thread, which may have others' writes before it."""


@dataclass(frozen=True, slots=True)
class LetterBase:
    """What both faces share of a dead letter."""

    number: int
    """By which it is known while it lies in the store; ascending in the order of burial."""
    pattern: str
    """The pattern of the handler or subscription that did not handle it."""
    source: str
    topic: str
    incarnation: int
    seed: int
    sequence: int
    offset: int
    reason: str
    """`handler_exhausted`, `undecodable`, `rejected`, or `parked`: it waits behind an older letter of its lane."""
    detail: str
    attempts: int
    """How often a handler had it, redriven attempts included."""
    parked: bool
    """Whether its lane waits for it."""
    buried_ns: int
    """When, in nanoseconds of this member's wall clock."""
    size: int
    """Of its value as it was published, in bytes."""
    cut: str
    """Why only the head of its value is left, so that it cannot come again; empty if it is whole."""
    _engine: Engine = field(repr=False, compare=False)
    _run: Callable[[Steps[Any]], Any] = field(repr=False, compare=False)
    """Waits as its face does."""

    def _reading(self) -> Steps[Any]:
        answered: list[LetterRow | FabricError] = []
        engine = self._engine
        engine.require_open()

        def take(row: LetterRow | FabricError) -> None:
            answered.append(row)
            engine.on_progress()

        engine.letters.read(self.number, take)
        came = yield Wait(lambda: bool(answered), READ_S)
        if not came:
            raise WaitTimeoutError("the letter was not read", waited_s=READ_S, state="the disk does not answer")
        row = answered[0]
        if isinstance(row, FabricError):
            raise row
        if row.is_cut:
            raise SchemaError(f"only {len(row.value)} of {row.size} bytes of the value are left: {row.cut}")
        return decode(row.value_kind, memoryview(row.value)), unpack_metadata(row.metadata)


class DeadLetter(LetterBase):
    """A record that was not handled, and why. Its value lies in the store."""

    __slots__ = ()

    def value(self) -> Any:  # noqa: ANN401 - whatever was published
        """What was published, read from the store.

        Raises `SchemaError` if it cannot be decoded or was `cut`, `LettersDamagedError` if it is gone, `SpillError` if
        the disk cannot read it now, `WaitTimeoutError` after 10 s, `ClosedError`.
        """
        return self._run(self._reading())[0]

    def metadata(self) -> dict[str, Any]:
        """The facts that were published beside the value. Raises as `value`."""
        found: dict[str, Any] = self._run(self._reading())[1]
        return found


L = TypeVar("L", bound=LetterBase)


def _listed(letters: object) -> list[Any]:
    if not isinstance(letters, Iterable):
        raise ConfigError(f"{letters!r} is no dead letter", field="letters")
    return list(letters)


@dataclass(frozen=True, slots=True)
class RedriveReport:
    """What a redrive did, or with `dry_run` would do."""

    dry_run: bool
    queued: tuple[Any, ...]
    """The letters that come again, oldest first."""
    refused: tuple[tuple[Any, str], ...]
    """Those that do not, and why."""
    behind: int
    """Letters that wait behind the queued ones in parked lanes, and follow by themselves once those are handled."""


class DeadLetters(Generic[L]):
    """The dead letters of a member, oldest first; or some of them, after `select`. Nothing here waits.

    It looks anew each time it is asked. After the fabric is closed it shows what was there last.
    """

    letter_class: ClassVar[type[LetterBase]] = DeadLetter

    def __init__(
        self,
        engine: Engine,
        run: Callable[[Steps[Any]], Any],
        wanted: Callable[[LetterRow], bool] | None = None,
    ) -> None:
        self._engine, self._run, self._letters, self._wanted = engine, run, engine.letters, wanted

    def __len__(self) -> int:
        return self._letters.count if self._wanted is None else len(self._rows())

    def __iter__(self) -> Iterator[L]:
        return map(self._show, self._rows())

    def _rows(self) -> list[LetterRow]:
        rows = self._letters.all()
        return rows if self._wanted is None else list(filter(self._wanted, rows))

    def __getitem__(self, index: int) -> L:
        found: L = self._show(self._rows()[index])
        return found

    def select(self, *, topic: str = "**", reason: str | None = None, source: str | None = None) -> DeadLetters[L]:
        """Those whose topic matches a pattern, that died of a reason, or that came from a member.

        Raises `TopicError`.
        """
        pattern, wanted = compile_pattern(topic), self._wanted

        def is_wanted(facts: LetterRow) -> bool:
            return (
                (wanted is None or wanted(facts))
                and pattern.matches(facts.topic)
                and reason in (None, facts.reason)
                and source in (None, facts.source)
            )

        return type(self)(self._engine, self._run, is_wanted)

    @property
    def notices(self) -> tuple[LetterRow, ...]:
        """What was lost without a letter, gaps and unreadable records: the latest, at most `letters.notices_max`."""
        return tuple(self._letters.notices())

    @property
    def error(self) -> FabricError | None:
        """Why letters are not taken now, so that their lanes wait; None if they are."""
        return self._letters.error

    @property
    def waiting(self) -> int:
        """How many records become letters once the store takes them; they are not letters yet, and their lanes wait."""
        return self._letters.waiting

    def redrive(self, letters: L | Iterable[L], *, dry_run: bool = False) -> RedriveReport:
        """Let letters come again: to the handler, or into the inbox, of their pattern.

        It returns at once; what is handled is no letter any more, what dies again stays one. Letters of a parked lane
        come in their place, the oldest first; others late, with `message.redelivered`. With `dry_run` nothing happens.
        Raises `ConfigError` for what is no letter of this member, `ClosedError`, `BrokenError`, `WrongProcessError`.
        """
        self._engine.require_open()
        chosen = {letter.number: letter for letter in self._several(letters)}
        queued, refused, behind = self._letters.redrive(list(chosen), dry_run=dry_run)
        return RedriveReport(
            dry_run,
            tuple(chosen[number] for number in queued),
            tuple((chosen[number], why) for number, why in refused.items()),
            behind,
        )

    def discard(self, letters: L | Iterable[L]) -> int:
        """Give letters up for good; how many there were.

        Those on their way to a handler are not, and stay. Of a parked lane, what waited behind them goes on. It leaves
        the disk a moment later. Raises as `redrive`.
        """
        self._engine.require_open()
        return self._letters.discard(letter.number for letter in self._several(letters))

    def _several(self, letters: L | Iterable[L]) -> list[L]:
        several: list[Any] = [letters] if isinstance(letters, LetterBase) else _listed(letters)
        for letter in several:  # by number, another member's would be taken for one of ours
            if not isinstance(letter, LetterBase) or letter._engine is not self._engine:
                raise ConfigError(f"{letter!r} is no dead letter of this member", field="letters")
        return several

    def _show(self, facts: LetterRow) -> Any:  # noqa: ANN401 - a letter of this face
        return self.letter_class(
            number=facts.id,
            pattern=facts.subscription,
            source=facts.source,
            topic=facts.topic,
            incarnation=facts.incarnation,
            seed=facts.seed,
            sequence=facts.sequence,
            offset=facts.first,
            reason=facts.reason,
            detail=facts.detail,
            attempts=facts.attempts,
            parked=facts.parked,
            buried_ns=facts.buried_ns,
            size=facts.size,
            cut=facts.cut if facts.is_cut else "",
            _engine=self._engine,
            _run=self._run,
        )

    def __repr__(self) -> str:
        return f"DeadLetters({len(self)})"
