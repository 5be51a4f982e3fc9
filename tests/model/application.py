"""What uses a subscription in the model: a handler or an iterator, a cursor, dead letters."""

from __future__ import annotations

from collections import Counter

from tests.model.network import World
from tests.model.subscriber import Subscriber
from tests.model.words import Cursor, Key, Profile, Record, Saved


class Application(Subscriber):
    """A handler gets one message of a lane at a time, an iterator may have several in hand.

    With a cursor the acknowledged position is that of the last committed cursor; without, it is the floor. Dead
    letters are written before their offset settles and survive a crash on their own.
    """

    def __init__(self, world: World, name: str, profile: Profile) -> None:
        super().__init__(world, name, profile)
        self.saved: Saved | None = None
        self.letters: dict[Key, Record] = {}
        self.delivered: list[tuple[Record, bool]] = []
        self.gaps, self.open_gaps = [], []
        self.before: set[Key] = set()
        """What earlier sessions, whose places are not saved, handled or reported."""

    def boot(self, peer: int, *, lose_cursor: bool = False) -> None:
        self.up, self.life = True, self.life + 1
        self.redriven, self.attempts, self.handed = set(), Counter[Key](), dict[int, Key]()
        self.begin_session(peer, resumes=bool(self.saved and not lose_cursor))
        if self.saved and not lose_cursor:
            self.committed, delivered, gaps, open_gaps, self.start = self.saved
            del self.delivered[delivered:], self.gaps[gaps:], self.open_gaps[open_gaps:]
            self.drop_redriven(self.committed)
            self.enter(*self.committed[:3])
        else:
            self.saved, self.committed = None, None
            self.before.update([record.key for record, _ in self.delivered], self.gaps)
            self.delivered, self.gaps, self.open_gaps = [], [], []
            self.enter(0, 0)

    def work(self) -> None:
        rng, saving = self.world.rng, self.options.saving
        for _ in range(rng.randint(1, 4) if self.incarnation else 0):
            self.hand_over()
            if self.hand:
                self.finish_one(self.hand[rng.choice(sorted(self.hand))])
        if self.options.redrive and rng.random() < 0.3:
            self.redrive()
        if self.profile.cursor and self.start and rng.random() < saving:
            self.saved = Saved(self.cursor(), len(self.delivered), len(self.gaps), len(self.open_gaps), self.start)
        if self.saved and rng.random() < saving:
            self.commit()
        self.check.state(self)

    def hand_over(self) -> None:
        for offset in sorted(self.hold):
            record = self.hold.get(offset)
            if record is None or len(self.hand) >= self.options.window:
                break
            if not self.ready(record) or not self.fits(offset):
                continue
            if self.has_letter(record.key) or self.is_parked(record):
                if self.is_settled(record.previous) and self.bury(record, "parked"):
                    self.settle(offset)
            else:
                self.counts["handed over above the floor"] += offset > self.floor
                self.hand[offset] = self.hold.pop(offset)
                self.check.handed(self, record)

    def finish_one(self, record: Record) -> None:
        """Acknowledging or rejecting a message settles all that came before it in its lane: `above` stays closed."""
        for earlier in self.earlier_in_lane(record):
            self.handle(earlier)
        if not self.handler_fails(record):
            self.handle(record)
            return
        self.attempts[record.key] += 1
        if self.attempts[record.key] >= self.options.attempts and self.bury(record, "exhausted"):
            self.settle(record.offset)

    def earlier_in_lane(self, record: Record) -> list[Record]:
        in_hand = [other for _, other in sorted(self.hand.items())]
        return [other for other in in_hand if other.lane == record.lane and other.offset < record.offset]

    def handle(self, record: Record) -> None:
        self.delivered.append((record, False))
        self.settle(record.offset)

    def handler_fails(self, record: Record) -> bool:
        if self.network.calm:
            return False
        poisonous = self.world.handler_is_broken and record.value < self.options.poison
        return poisonous or self.world.rng.random() < self.options.transient

    def commit(self) -> None:
        """The application says that this cursor is saved: only now is it told, and are redriven letters deleted."""
        assert self.saved is not None
        self.committed = self.saved.cursor
        self.drop_redriven(self.committed)

    def drop_redriven(self, cursor: Cursor) -> None:
        for key in cursor.redriven:
            self.letters.pop(key, None)
        self.redriven -= cursor.redriven

    # Dead letters.

    def has_letter(self, key: Key) -> bool:
        return key in self.letters

    def bury(self, record: Record, reason: str) -> bool:
        """A record that has a letter, from before a crash, keeps it. A full store takes none: the lane waits."""
        if record.key not in self.letters and len(self.letters) >= self.options.letters:
            return False
        self.counts["letters " + reason] += record.key not in self.letters
        self.letters[record.key] = record
        return True

    def waiting(self) -> dict[Key, Record]:
        return {key: letter for key, letter in self.letters.items() if key not in self.redriven}

    def is_parked(self, record: Record) -> bool:
        """A lane is parked from its oldest waiting letter on, over incarnations: what comes after joins the queue."""
        letters = self.waiting().items() if self.options.on_failure == "park" else ()
        return any(letter.lane == record.lane and key < record.key for key, letter in letters)

    def redrive(self) -> None:
        """The oldest letter of a lane enters the handler again."""
        lanes: dict[int, Key] = {}
        for key, letter in sorted(self.waiting().items()):
            lanes.setdefault(letter.lane, key)
        if not lanes:
            return
        key = lanes[self.world.rng.choice(sorted(lanes))]
        if self.may_redrive(key) and not self.handler_fails(self.letters[key]):
            self.delivered.append((self.letters[key], True))
            self.counts["redriven"] += 1
            self.note_redriven(key)

    def may_redrive(self, key: Key) -> bool:
        """Not before its record is settled in this session: after a crash, what precedes it has to come first."""
        return bool(self.incarnation) and self.cursor().covers(key)

    def note_redriven(self, key: Key) -> None:
        if self.profile.cursor:
            self.redriven.add(key)  # stays in the store until a cursor that says so is saved
        else:
            del self.letters[key]
