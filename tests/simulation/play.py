"""Plays the world of one seed: lets chance act, then lets the faults stop, and asks whether all promises were kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np

from fabric.client import Fabric
from fabric.errors import (
    BrokenError,
    ClosedError,
    QueueFullError,
    RemoteFailureError,
    RequestError,
    SubscribeTimeoutError,
    UnknownPeerError,
)
from fabric.message import Message, Request
from fabric.subscription import Subscription
from fabric.testing import Checker, Violation, World
from tests.simulation.draw import Options, Profile, Topic, draw
from tests.simulation.slots import unfreed

REST_S = 90.0
"""A fabric without faults is at rest by then; most are within a second. Proofs of death take the longest."""
HURRY_S = 0.02
REST_STEP_S = 0.05
"""How often it is looked; looking costs more than the world's own events in between."""


KEPT_MAX = 6
"""Values that one application keeps looking at."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A world that kept its promises."""

    digest: int
    counts: Counter[str]


def play(seed: int, *, rest_s: float = REST_S) -> Outcome:
    """Play one seed. Raises `Violation`, or whatever broke."""
    game = Game(seed, draw(seed), rest_s)
    with game.world:
        return game.play()


class Reader:
    """An application with one subscription."""

    def __init__(self, game: Game, fabric: Fabric, profile: Profile) -> None:
        self.game, self.fabric, self.profile = game, fabric, profile
        self.inbox: Subscription | None = None
        self.hand: list[Message] = []
        self.handles = False
        self.kept: list[tuple[int, Any, bytes]] = []
        """Values that this application looks at for long: until which step, and what they are."""

    def keep(self, message: Message) -> None:
        """Chance says whether, and for how long, the value is still looked at when the message is gone."""
        chance = self.game.whims
        if self.game.options.arena is None or len(self.kept) >= KEPT_MAX or chance.random() < 0.5 or self.game.calm:
            return
        if isinstance(message.value, np.ndarray):
            self.kept.append((self.game.step + chance.choice([1, 3, 30]), message.value, message.value.tobytes()))

    def look(self) -> None:
        """What is looked at must not have changed."""
        for _, value, content in self.kept:
            if value.tobytes() != content:
                raise Violation("I4", f"a value that {self.fabric} looks at has changed")
        self.kept = [one for one in self.kept if one[0] > self.game.step and not self.game.calm]

    @property
    def most(self) -> int:
        """Messages in one go; once the faults are over, all that are here."""
        return 10_000 if self.game.calm else self.profile.most

    def begin(self) -> None:
        """Subscribe, if it works."""
        profile = self.profile
        if profile.style == "handler":
            if not self.handles:
                self.fabric.on(profile.pattern, attempts=3, start=profile.start)(self.handle)
                self.handles = True
            return
        if self.inbox is None:
            self.inbox = self.fabric.subscribe(
                profile.pattern,
                start=profile.start,
                seeds=profile.seeds,
                delivery=profile.delivery,
                acknowledge="manual" if profile.style == "manual" else "auto",
            )
            self.game.world.every(profile.pace_s, self.work, owner=self.fabric)
            if self.game.calm:
                self.hurry()

    def end(self) -> None:
        """Close the subscription."""
        if self.inbox is not None:
            self.inbox.close()
            self.inbox, self.hand = None, []

    def work(self) -> None:
        """Take some messages."""
        inbox = self.inbox
        if inbox is None or inbox._closed:
            return
        try:
            _STYLES[self.profile.style](self, inbox)
        except ClosedError:
            if self.fabric in self.game.world.members and not inbox._closed and not inbox._inbox.ended:
                raise

    def hurry(self) -> None:
        """Once the faults are over nobody is slow any more."""
        lives = self.fabric in self.game.world.members
        if lives and self.inbox is not None and self.profile.pace_s > HURRY_S:
            self.game.world.every(HURRY_S, self.work, owner=self.fabric)

    def drain(self, inbox: Subscription) -> None:
        """Some of what is here."""
        for count, message in enumerate(inbox.drain(), 1):
            self.keep(message)
            if count >= self.most:
                break

    def take_many(self, inbox: Subscription) -> None:
        """What is here at once."""
        if self.has_some(inbox):
            for message in inbox.receive_many(self.most, timeout_s=0.001):
                self.keep(message)
        else:
            next(inbox.drain(), None)

    @staticmethod
    def has_some(inbox: Subscription) -> bool:
        hand = inbox._hand
        return bool(inbox._inbox.items) or (hand is not None and inbox._at + 1 < len(hand.rows))

    def acknowledge(self, inbox: Subscription) -> None:
        """Take some, and settle some of those in hand in any order."""
        rng = self.game.rng
        for _ in range(self.most - len(self.hand)):
            message = next(inbox.drain(), None)
            if message is None:
                break
            self.keep(message)
            self.hand.append(message)
        for _ in range(rng.randint(0, len(self.hand)) if not self.game.calm else len(self.hand)):
            if not self.hand:
                break
            message = self.hand.pop(rng.randrange(len(self.hand)))
            earlier = [other for other in self.hand if _lane(other) == _lane(message) and other.offset < message.offset]
            self.hand = [other for other in self.hand if other not in earlier]
            if not self.game.calm and rng.random() < self.profile.trouble:
                message.reject("chance")
            else:
                message.acknowledge()

    def handle(self, message: Message) -> None:
        """As a handler."""
        self.keep(message)
        if self.game.rng.random() < self.profile.trouble and not self.game.calm:
            raise RuntimeError("chance")


def _lane(message: Message) -> tuple[object, int]:
    return message._feed, message.seed


_STYLES: dict[str, Callable[[Reader, Subscription], None]] = {
    "drain": Reader.drain,
    "many": Reader.take_many,
    "manual": Reader.acknowledge,
}


@dataclass(eq=False)
class Player:
    """One place in the job: whoever lives there now publishes its topics and reads with its profiles."""

    number: int
    topics: tuple[Topic, ...]
    profiles: tuple[Profile, ...]
    fabric: Fabric | None = None
    readers: list[Reader] = field(default_factory=list)
    elders: list[Reader] = field(default_factory=list)
    """Of earlier lives whose process goes on."""


class Game:
    """The world of one seed."""

    def __init__(self, seed: int, options: Options, rest_s: float = REST_S) -> None:
        self.rest_s = rest_s
        self.options, self.rng, self.counts = options, Random(f"play {seed}"), Counter[str]()
        self.calm = False
        self.whims = Random(f"whims {seed}")
        """Chance of what only some worlds have, so that the others stay what they were."""
        topics = [*options.publishers, *[()] * (len(options.readers) - len(options.publishers))]
        self.players = [Player(n, t, p) for n, (t, p) in enumerate(zip(topics, options.readers, strict=True))]
        self.world = World(
            seed,
            plan=options.plan,
            disk=options.disk,
            arena=options.arena,
            config=options.config,
            world_size=len(self.players),
        )
        self.checker = Checker(self.world.history)
        self.zombies: list[tuple[Player, Fabric]] = []
        self.step = 0
        self.number = 0

    def play(self) -> Outcome:
        """All of it."""
        for player in self.players:
            self.start(player)
        self.world.run(self.options.pause_s)
        for step in range(self.options.steps):
            self.step = step
            self.act()
            self.world.run(self.rng.random() * 2 * self.options.pause_s)
            self.checker.inspect()
            self.look()
        self.world.calm()
        self.calm = True
        self.look()
        for reader in [reader for player in self.players for reader in player.readers]:
            reader.hurry()
        for player in self.players:
            self.vanish(player)
            if player.fabric is None and self.rng.random() < 0.8:
                self.start(player)
        self.rest()
        self.step = self.options.steps + 100
        for player in self.players:
            self.subscribe(player)
            self.publish(player, certainly=True)
            self.ask(player)
        self.rest()
        self.checker.judge()
        self.collect()
        return Outcome(self.world.history.digest(), self.counts)

    def rest(self) -> None:
        """I9."""
        world, began = self.world, self.world.now_s
        while left := self.restless():
            if world.now_s - began > self.rest_s:
                raise Violation("I9", "; ".join(left))
            world.run(REST_STEP_S)
        self.counts["rests longer than 5 s"] += world.now_s - began > 5

    def restless(self) -> list[str]:
        """What is not at rest yet."""
        left = self.strangers() + self.checker.unsettled() + self.stragglers() or self.checker.unheard()
        lives = [player.fabric._engine for player in self.players if player.fabric is not None]
        return left or list(unfreed(self.world, lives, [fabric._engine for _, fabric in self.zombies]))

    def look(self) -> None:
        """All applications look at what they kept."""
        for player in self.players:
            for reader in player.readers + player.elders:
                reader.look()

    def vanish(self, player: Player) -> None:
        """The process of a life that was stopped ends, unless the next life is in it."""
        if player.fabric is None:
            player.elders.clear()
            self.world.vanish(f"rank-{player.number}")

    def strangers(self) -> list[str]:
        """Members that have not greeted each other."""
        engines = [player.fabric._engine for player in self.players if player.fabric is not None]
        return [
            f"{a.card.name} and {b.card.name} are strangers"
            for a in engines
            for b in engines
            if (peer := a.core.members.by_name.get(b.card.name)) is None
            or not peer.sees_us
            or peer.incarnation != b.card.incarnation
        ]

    def stragglers(self) -> list[str]:
        """Frames from before the calm: the last faults. One may fill a link that holds one, for seconds."""
        late = self.world.hub.late_frames()
        return [f"{late} frames are still delayed"] if late else []

    def collect(self) -> None:
        """What the runs of a soak add up."""
        for fabric in self.world.members:
            self.counts.update(fabric.statistics())
        for book in self.world.history.subscriptions.values():
            for reading in book.readings.values():
                self.counts["received"] += len(reading.received)
                self.counts["gaps"] += len([lost for lost in reading.lost if lost.end is not None])
                self.counts["open gaps"] += len([lost for lost in reading.lost if lost.end is None])
                self.counts["letters"] += len(reading.letters)
        self.counts["published"] += sum(len(feed.records) for feed in self.world.history.feeds.values())
        self.counts["worlds"] += 1
        self.counts["events"] += self.world.history.events
        self.counts["virtual seconds"] += int(self.world.now_s)

    # Members.

    def start(self, player: Player) -> None:
        """A new life."""
        host = f"host-{player.number % self.options.hosts}"
        player.fabric = self.world.join(player.number, host=host, wait=False)
        player.elders += player.readers
        player.fabric.respond("echo")(lambda request: request.value)
        player.fabric.respond("relay")(self.relay(player))
        player.readers = [Reader(self, player.fabric, profile) for profile in player.profiles]

    def relay(self, player: Player) -> Callable[[Request], Any]:
        """A handler that asks somebody else in turn."""

        def handler(request: Request) -> Any:
            fabric = player.fabric
            if fabric is None:
                raise RuntimeError("gone")
            other = self.players[(player.number + 1) % len(self.players)]
            return fabric.request("echo", request.value, to=other.number, timeout_s=0.3).value

        return handler

    def end(self, player: Player, how: Callable[[Fabric], None], name: str) -> None:
        """The end of a life."""
        if player.fabric is not None:
            self.counts[f"fault: {name}"] += 1
            fabric, player.fabric = player.fabric, None
            how(fabric)
            player.elders = player.elders + player.readers if how == self.leave else []
            player.readers = []

    def leave(self, fabric: Fabric) -> None:
        """A good end of a life whose process goes on."""
        self.world.stop(fabric, exits=False)

    # What happens.

    def act(self) -> None:
        """One step."""
        for player in self.players:
            if player.fabric is None and self.rng.random() < self.options.revive:
                self.start(player)
            self.subscribe(player)
        for player in self.players:
            self.publish(player)
        for player, fabric in self.zombies:
            self.publish_as_zombie(player, fabric)
        if self.rng.random() < self.options.requests:
            self.ask(self.rng.choice(self.players))
        names, weights = zip(*self.options.faults, strict=True)
        getattr(self, self.rng.choices(names, weights)[0])()

    def subscribe(self, player: Player) -> None:
        """Begin what has not begun."""
        for reader in player.readers if player.fabric is not None else ():
            if self.step >= reader.profile.begins:
                try:
                    reader.begin()
                except SubscribeTimeoutError as error:
                    self.counts["subscriptions not confirmed"] += 1
                    # One that died a moment ago may still pass for alive; one that lives has to confirm.
                    missing = set(error.fields["state"].removeprefix("missing: ").split(", "))
                    if self.calm and missing & {
                        other.fabric.name for other in self.players if other.fabric is not None
                    }:
                        raise

    def publish(self, player: Player, *, certainly: bool = False) -> None:
        """Some records on some topics."""
        for topic in player.topics:
            if (
                player.fabric is not None
                and self.step >= topic.begins
                and (certainly or self.rng.random() < topic.rate)
            ):
                publisher = player.fabric.publisher(topic.name, policy=topic.policy, when_full=topic.when_full)
                for _ in range(self.rng.randint(1, topic.burst)):
                    self.number += 1
                    value = self.value(topic, f"{player.fabric.name} {topic.name} {self.number}")
                    try:
                        publisher.publish(value, seed=self.rng.randrange(topic.lanes))
                    except QueueFullError:
                        self.counts["publications refused"] += 1
                        if self.calm:
                            self.rest()
                        break

    def value(self, topic: Topic, text: str) -> object:
        """Something that no other record has."""
        size = self.rng.choice(topic.sizes)
        padded = text.encode().ljust(size, b".")
        if self.options.arena is not None and size > 20:
            return np.frombuffer(padded, np.uint8)  # one that may be looked at where it lies
        return {"text": text, "number": self.number} if size == 20 and self.rng.random() < 0.1 else padded

    def publish_as_zombie(self, player: Player, fabric: Fabric) -> None:
        """A life that was replaced goes on until it hears of it."""
        if fabric in self.world.members and self.rng.random() < 0.5:
            for topic in player.topics:
                try:
                    fabric.publisher(topic.name, policy=topic.policy, when_full=topic.when_full).publish(b"undead")
                except (BrokenError, QueueFullError):
                    self.counts["zombies refused"] += 1

    def ask(self, player: Player) -> None:
        """A request; after the faults it has to be answered."""
        if player.fabric is None:
            return
        method = self.rng.choice(["echo", "echo", "relay"])
        to = self.rng.choice(self.players)
        value = b"?" * self.rng.choice([10, 10, 70_000])
        timeout_s = self.rng.choice([0.2, 2.0])
        try:
            reply = player.fabric.request(method, value, to=to.number, timeout_s=timeout_s)
        except (RequestError, UnknownPeerError, RemoteFailureError) as error:
            self.counts[f"requests: {type(error).__name__}"] += 1
            if self.calm and method == "echo" and to.fabric is not None:
                raise Violation("I9", f"{player.fabric} asked {to.fabric}: {error}") from error
            return
        self.counts["requests answered"] += 1
        if bytes(reply.value) != value:
            raise Violation("I4", "another reply than what was sent")

    # Faults.

    def nothing(self) -> None:
        """Most steps go well."""

    def kill_publisher(self) -> None:
        """SIGKILL."""
        self.end(self.rng.choice(self.players[: len(self.options.publishers)]), self.world.kill, "publisher killed")

    def kill_reader(self) -> None:
        """SIGKILL."""
        self.end(self.rng.choice(self.players[len(self.options.publishers) :]), self.world.kill, "reader killed")

    def stop_publisher(self) -> None:
        """A good end."""
        patience_s = self.rng.choice([0.01, 2.0])
        player = self.rng.choice(self.players[: len(self.options.publishers)])
        self.end(player, lambda fabric: self.world.stop(fabric, timeout_s=patience_s), "publisher stopped")

    def stop_reader(self) -> None:
        """A good end."""
        player = self.rng.choice(self.players[len(self.options.publishers) :])
        lingers = self.options.arena is not None and self.whims.random() < 0.5
        self.end(player, self.leave if lingers else self.world.stop, "reader stopped")

    def replace_publisher(self) -> None:
        """It starts elsewhere while the old one lives."""
        player = self.rng.choice(self.players[: len(self.options.publishers)])
        if player.fabric is not None and len(self.zombies) < 2:
            self.counts["fault: publisher replaced"] += 1
            self.zombies.append((player, player.fabric))
            self.start(player)

    def close_subscription(self) -> None:
        """An application has enough, and later begins anew."""
        player = self.rng.choice(self.players)
        for reader in player.readers if player.fabric is not None else ():
            reader.end()

    def cut(self) -> None:
        """A link fails, in one or both directions, or heals."""
        a, b = (f"rank-{player.number}" for player in self.rng.sample(self.players, 2))
        self.counts["fault: link cut or healed"] += 1
        if self.rng.random() < 0.4:
            self.world.heal(a, b)
        else:
            self.world.cut(a, b, both=self.rng.random() < 0.6)
