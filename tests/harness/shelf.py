"""A disk for one core of a `Link`: it takes what it is asked for when the test says so."""

from __future__ import annotations

from fabric.core import events
from fabric.core.disk import LoadedBurst
from tests.harness.pair import Link

__all__ = ["Shelf"]


class Shelf:
    """What a spill log would hold; `damaged` are bursts that cannot be read any more."""

    def __init__(self, link: Link, name: str) -> None:
        self.link, self.name = link, name
        self.bursts: dict[tuple[int, int], events.AppendRecords] = {}
        self.damaged: set[int] = set()
        self.unreadable: set[int] = set()
        self._seen = 0

    def asked(self) -> list[object]:
        """The commands that came since the last look."""
        kinds = events.AppendRecords, events.LoadRecords, events.ReleaseRecords
        commands = [command for command in self.link[self.name].reported if type(command) in kinds]
        fresh, self._seen = commands[self._seen :], len(commands)
        return fresh

    def work(self) -> list[str]:
        """Do what was asked, until nothing more is; what that was."""
        done = []
        while commands := self.asked():
            for command in commands:
                done.append(type(command).__name__)
                self._do(command)
        return done

    def refuse(self) -> int:
        """Refuse all writes that were asked for; how many."""
        writes = [command for command in self.asked() if isinstance(command, events.AppendRecords)]
        self.link.do(self.name, events.WriteFailed(writes[0].number, writes[-1].number, "no space left"))
        return len(writes)

    def _do(self, command: object) -> None:
        match command:
            case events.AppendRecords():
                self.bursts[command.feed, command.first] = command
                self.link.do(self.name, events.WriteFinished(command.number))
            case events.LoadRecords(feed, firsts):
                self.link.do(self.name, events.RecordsLoaded(feed, tuple(self._load(feed, first) for first in firsts)))
            case events.ReleaseRecords(feed, below):
                for key, burst in list(self.bursts.items()):
                    if key[0] == feed and burst.first + burst.count <= below:
                        del self.bursts[key]

    def _load(self, feed: int, first: int) -> LoadedBurst:
        burst = self.bursts[feed, first]
        if first in self.damaged:
            return LoadedBurst(first, None, None, lost=True)
        if first in self.unreadable:
            return LoadedBurst(first, None, None)
        return LoadedBurst(first, bytes(burst.frame), {at: bytes(value) for at, value in burst.payloads.items()})
