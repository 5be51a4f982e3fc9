"""The ledger: what became of every record that somebody was owed. Immutable, and it can be printed.

    owed = handled + dead-lettered + gap + dropped by a named reason + not asked for + acknowledged + in flight

`acknowledged` stands only in what a publisher knows of a reader: records that are settled, but the reader has not told
how yet; it tells once in a second, and before it leaves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

__all__ = ["Ledger", "LedgerRow", "Totals", "Unknown"]

ROWS_SHOWN_MAX = 40


@dataclass(frozen=True, slots=True)
class Totals:
    """Records, by what became of them."""

    owed: int = 0
    """From where a subscription joined a feed to where that feed is, as far as it is known."""
    handled: int = 0
    dead_lettered: int = 0
    gap: int = 0
    """Can no longer be had, and reported as such."""
    dropped: int = 0
    """For a named reason: superseded, expired, best effort, lost at source, given up."""
    not_asked: int = 0
    """Filtered out by `seeds`."""
    acknowledged: int = 0
    """Settled, and not told yet how."""
    in_flight: int = 0
    """On the way, or in the subscriber's hand."""

    @property
    def settled(self) -> int:
        """All that came to its end."""
        return self.owed - self.in_flight

    @property
    def balanced(self) -> bool:
        """Whether the terms add up to what is owed."""
        ends = self.handled + self.dead_lettered + self.gap + self.dropped + self.not_asked
        return self.owed == ends + self.acknowledged + self.in_flight and self.in_flight >= 0

    def __add__(self, other: Totals) -> Totals:
        return Totals(*(a + b for a, b in zip(self._terms(), other._terms(), strict=True)))

    def _terms(self) -> tuple[int, ...]:
        ends = (self.handled, self.dead_lettered, self.gap, self.dropped, self.not_asked)
        return (self.owed, *ends, self.acknowledged, self.in_flight)

    def __str__(self) -> str:
        names = ("owed", "handled", "dead-lettered", "gap", "dropped", "not asked for", "acknowledged", "in flight")
        terms = [f"{count:,} {name}" for name, count in zip(names, self._terms(), strict=True) if count]
        return ", ".join(terms) or "nothing owed"


@dataclass(frozen=True, slots=True)
class Unknown:
    """Offsets `first <= offset < end` of a feed of which it is not known whether `subscriber` handled all of them.

    `state` is that of the member which could: `dead`, `left`, `down`, `suspect` or `up`. `end` is None where it is not
    known how far the feed went: its publisher ended without saying so.
    """

    source: str
    topic: str
    subscriber: str
    subscription: int
    first: int
    end: int | None
    state: str

    def __str__(self) -> str:
        end = "?" if self.end is None else self.end
        who = f"{self.subscriber}#{self.subscription} ({self.state})"
        return f"{self.source}/{self.topic} {self.first}..{end} for {who}"


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """One feed for one subscription."""

    source: str
    """The publisher's name; empty for the sum of feeds that ended long ago."""
    topic: str
    incarnation: int
    """Which life of the publisher."""
    subscriber: str
    subscription: int
    state: str
    """`open`, `ended` (its publisher is over, and all of it is settled), `closed` (the subscription is), `left` (of a
    reader that is about to tell its last books), `lost` (of one that is over, and did not), `resting` (of a named one
    that nobody has open), `sum`."""
    peer: str
    """The state of the member at the other side, as in `PeerInfo`."""
    first: int
    """The join offset."""
    end: int
    floor: int
    """Every offset below it is settled."""
    totals: Totals
    reasons: Mapping[str, int] = field(default_factory=dict)
    """The ends that occurred, by the names that `statistics()` and the dead letters use."""
    unknown: tuple[Unknown, ...] = ()
    """Ranges of which nothing is known although somebody is owed them. They keep the ledger from balancing."""
    known_unknown: Unknown | None = None
    """The member at the other side is over, and nobody can say more: where its feed ended (reported to the application
    as an open gap), or what it handled of ours before it died. The dead are owed nothing, so this is in balance."""
    kept: Unknown | None = None
    """This member closed, and what it had not heard of is on its disk: its next life goes on from there. In balance."""
    feeds: int = 1
    """How many feeds this row sums up."""

    @property
    def balanced(self) -> bool:
        """Whether the terms add up, and nothing is unknown that is owed."""
        return self.totals.balanced and not self.unknown

    def __str__(self) -> str:
        who = f"{self.source}/{self.topic} -> {self.subscriber}#{self.subscription}"
        who = who if self.source else f"{self.feeds} older feeds"
        return f"{who} [{self.state}] {self.first}..{self.end}: {self.totals}"


@dataclass(frozen=True, slots=True)
class Ledger:
    """The books of one member at one moment: of what it reads, and of who reads from it."""

    member: str
    rows: tuple[LedgerRow, ...] = ()

    @property
    def totals(self) -> Totals:
        """The sum of all rows."""
        return sum((row.totals for row in self.rows), Totals())

    @property
    def balanced(self) -> bool:
        """Whether every row balances."""
        return all(row.balanced for row in self.rows)

    @property
    def unknown(self) -> tuple[Unknown, ...]:
        """All ranges of which nothing is known although somebody is owed them."""
        return tuple(unknown for row in self.rows for unknown in row.unknown)

    @property
    def known_unknowns(self) -> tuple[Unknown, ...]:
        """What nobody can say any more, of members that are over."""
        return tuple(row.known_unknown for row in self.rows if row.known_unknown is not None)

    @property
    def kept(self) -> tuple[Unknown, ...]:
        """What this member, which closed, has on disk for its next life to serve."""
        return tuple(row.kept for row in self.rows if row.kept is not None)

    def explain(self) -> str:
        """A line for each row that does not add up, and each range that is unknown or kept; else that all is well."""
        return "\n".join(self._findings()) or f"the books of {self.member} balance: {self.totals}"

    def _findings(self) -> Iterator[str]:
        for row in self.rows:
            if not row.totals.balanced:
                yield f"does not add up: {row}"
        for unknown in self.unknown:
            yield f"nothing is known of {unknown}"
        for unknown in self.known_unknowns:
            yield f"nobody can say any more: {unknown}"
        for kept in self.kept:
            yield f"kept for the next life: {kept}"

    def __str__(self) -> str:
        verdict = "balanced" if self.balanced else "NOT balanced"
        lines = [f"ledger of {self.member}, {verdict}: {self.totals}", *map(str, self.rows[:ROWS_SHOWN_MAX])]
        if len(self.rows) > ROWS_SHOWN_MAX:
            lines.append(f"... and {len(self.rows) - ROWS_SHOWN_MAX} more rows")
        return "\n".join(lines)
