"""Members in one process and one thread, on a clock that does not tick by itself, over a network that fails as told.

Whoever waits, in `receive`, `request`, `flush` or `World.run`, lets the world go on: each member takes its turn,
handlers and tasks run, and when all are idle the clock jumps to whatever is due next. All chance comes from the seed,
so the same program with the same seed sees the same history.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from fabric.client import Fabric
from fabric.config import FabricConfig, Handlers
from fabric.core import events
from fabric.core.events import Card
from fabric.core.wire import VERSION
from fabric.engine.dispatch import Dispatcher
from fabric.engine.loop import Engine
from fabric.engine.sharing import Sharing
from fabric.engine.storing import recovered
from fabric.errors import (
    BrokenError,
    ClosedError,
    ConfigError,
    InternalError,
    JoinTimeoutError,
    SpillLockedError,
    shortened,
)
from fabric.storage.state import MemberState
from fabric.testing.arenas import ArenaHub, ArenaPlan, FakeArena, FakeMappings
from fabric.testing.disks import FakeDisk
from fabric.testing.history import History
from fabric.testing.stores import DiskPlan, KeptLetters, WorldStore
from fabric.testing.watching import WatchedFabric
from transports import FaultPlan, MemoryHub, MemoryTransport

__all__ = ["World"]

S = 1_000_000_000
EPOCH_NS = 1_700_000_000 * S
"""What a world's wall clock shows when it begins; any moment would do, as long as it is always the same."""
ROUNDS_MAX = 20_000
"""Rounds at one moment of the clock: more than any burst of work needs, few enough to find a loop soon."""


class _Waits:
    """Waiting is letting the world go on."""

    def __init__(self, world: World) -> None:
        self._world = world

    def until(self, engine: Engine, is_over: Callable[[], bool], deadline_ns: int, *, patient: bool = False) -> None:
        """Pump all members until it is over or the time has come."""
        self._world._pump(is_over, deadline_ns)

    def attended(self, engine: Engine) -> None:
        """There is no background thread to keep away."""

    def submitted(self, engine: Engine) -> None:
        """The next round sees to it."""

    def close(self) -> None:
        """Nothing sleeps here."""


class _Membership:
    """What a member of a world gives back when it leaves."""

    state_directory: Path | None = None

    def __init__(self, world: World, engine: Engine) -> None:
        self._world, self._engine = world, engine

    def mark_training(self, step: int) -> None:
        """There is no background here that could be in the way."""

    def close(self) -> None:
        """Leave."""
        self._engine.close(0.0)
        self._world._left(self._engine.card)


@dataclass(slots=True, eq=False)
class _Member:
    fabric: Fabric
    engine: Engine
    dispatcher: Dispatcher
    store: WorldStore

    def work(self, now_ns: int) -> bool:
        """Take a turn, if there is anything for it and nobody up the stack is in one; and run one handler."""
        engine, busy = self.engine, False
        if not engine.closed and (engine.due_ns <= now_ns or engine.transport.is_ready()) and not engine.lock.locked():
            engine.turn()
            busy = True
        busy = self.store.work(now_ns) or busy
        if engine.broken is not None:
            raise engine.broken
        return self.dispatcher.run_one() or busy

    def dues_ns(self) -> list[int]:
        """When there is something to do for it."""
        dues = (self.engine.transport.next_due_ns(), self.dispatcher.due_ns(), self.store.next_due_ns())
        return [self.engine.due_ns, *(due for due in dues if due is not None)]


@dataclass(slots=True, eq=False)
class _Task:
    """A function that runs again and again; not while it runs already."""

    owner: Fabric | None
    function: Callable[[], object]
    period_ns: int
    due_ns: int
    running: bool = False


class World:
    """A small universe of members.

    `plan` says what goes wrong on the way, `disk` what goes wrong on disk; default: nothing. `config` is what members
    join with; handlers always run in `step` mode, and the world runs them. `world_size` is the number of ranks. With
    `checked` the core's invariants are asserted after every event of every member, which costs about as much as the
    events themselves. With `state` ranks have state, which outlives them: one that joins again after `kill`, `stop` or
    `lose_power` serves what its last life left, has its dead letters, and knows which messages were in hand. With
    `arena` members of one host share memory; it says what goes wrong there.

    `history` holds all that was published, received, lost and buried; `Checker(world.history).judge()` compares.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        plan: FaultPlan | None = None,
        disk: DiskPlan | None = None,
        arena: ArenaPlan | None = None,
        config: FabricConfig | None = None,
        world_size: int = 2,
        checked: bool = True,
        state: bool = False,
    ) -> None:
        self.seed, self.world_size, self.checked, self.state = seed, world_size, checked, state
        self.now_ns = S
        """The time of this world; it begins at 1 s, because 0 means "never" in many a place."""
        self.hub = MemoryHub(seed=seed, plan=plan, clock=self._clock)
        self.history = History(self._clock)
        self._arenas = ArenaHub(seed, arena, self._clock) if arena is not None else None
        self._config, self._disk = config or FabricConfig(), disk or DiskPlan()
        self._members: list[_Member] = []
        self._tasks: list[_Task] = []
        self._lives: dict[str, int] = {}
        self._disks: dict[str, FakeDisk] = {}
        """With state: the disk of each rank, which outlives its lives."""
        self._letters: dict[str, KeptLetters] = {}
        """... and what outlives them of its dead letters."""
        self._floors: dict[str, FakeDisk] = {}
        """Those disks as the last loss of power left them."""
        self._boots: Counter[str] = Counter()
        self._dead: set[tuple[str, int]] = set()
        self._processes = 0
        self._pids: dict[str, int] = {}
        self._lingering: dict[str, list[Card]] = {}
        """Lives that are over while their processes go on, by name."""
        self._waits = _Waits(self)

    def _clock(self) -> int:
        return self.now_ns

    @property
    def now_s(self) -> float:
        """The time of this world, in seconds."""
        return self.now_ns / S

    @property
    def members(self) -> tuple[Fabric, ...]:
        """Those that live, in the order in which they joined."""
        return tuple(member.fabric for member in self._members)

    # Coming and going.

    def join(
        self,
        member: int | str = 0,
        *,
        host: str = "host-0",
        config: FabricConfig | None = None,
        wait: bool = True,
        timeout_s: float = 10.0,
    ) -> Fabric:
        """Enter as a rank (a number) or as an observer (a name). A name that was here before begins a new life.

        If the old life was not killed it goes on as a zombie, which the others will tell to stop. `host` says who can
        prove whose death: members of one host. Unless `wait` is false, returns when all members that live know this one
        and it knows them.

        Raises:
            ConfigError: The rank is not below `world_size`.
            JoinTimeoutError: Somebody did not answer within `timeout_s` of this world's time.
        """
        card, engine, state = self._open(member, host, config or self._config)
        others = {
            other.engine.card.name: other.engine.card for other in self._members if other.engine.card.name != card.name
        }
        dispatcher = Dispatcher(engine)
        fabric = WatchedFabric(engine, dispatcher, _Membership(self, engine), self.history)
        chance = f"disk {self.seed} {card.name} {card.incarnation}"
        disk = self._disks[card.name] if state is not None else None
        letters = self._letters.setdefault(card.name, KeptLetters()) if state is not None else None
        store = engine.store = WorldStore(engine, self._disk, chance, disk, state, letters)
        self._members.append(_Member(fabric, engine, dispatcher, store))
        if state is not None:
            engine.submit(recovered(state))
            store.read_letters()
        for other in others.values():
            engine.submit(events.PeerAnnounced(other))

        def missing() -> list[str]:
            known = engine.core.members.by_name
            here = [name for name, other in others.items() if (name, other.incarnation) not in self._dead]
            return sorted(name for name in here if name not in known or not known[name].has_met)

        if wait and not engine.until(lambda: not missing(), timeout_s):
            left = f"missing: {shortened(missing())}"
            self.kill(fabric)
            raise JoinTimeoutError("not all members answered", waited_s=timeout_s, state=left)
        return fabric

    def _open(self, member: int | str, host: str, config: FabricConfig) -> tuple[Card, Engine, MemberState | None]:
        rank = None if isinstance(member, str) else member
        if rank is not None and not 0 <= rank < self.world_size:
            raise ConfigError(f"{rank} is no rank of {self.world_size}", field="member")
        name = f"rank-{member}" if rank is not None else str(member)
        self._lives[name] = max(self._lives.get(name, 0) + 1, EPOCH_NS + self.now_ns)
        state = self._take_state(name, host, config) if self.state and rank is not None else None
        transport = MemoryTransport(self.hub, name)
        own = transport.endpoints
        card = Card(
            name=name,
            rank=rank,
            world_size=self.world_size,
            job="world",
            host=host,
            pid=self._pid_of(name),
            version=VERSION,
            incarnation=self._lives[name],
            endpoints=(own.data, own.control, own.bulk),
        )
        config = replace(config, work=replace(config.work, handlers=Handlers.STEP), install_signal_handler=False)
        engine = Engine(card, config, transport, self._clock, self._waits)
        engine.wall_ns = lambda: EPOCH_NS + self.now_ns
        engine.stateless = "" if state is not None else "give World state=True, and end the life before"
        engine.probe = lambda other: (other.name, other.incarnation) in self._dead
        engine.watch = lambda event, commands: self._look(engine, event, commands)
        if self._arenas is not None:
            engine.sharing = _share(engine, self._arenas)
        self.history.begin(engine)
        return card, engine, state

    def _pid_of(self, name: str) -> int:
        """That of a process that goes on, or of a new one."""
        if name not in self._lingering:
            self._processes += 1
            self._pids[name] = self._processes
        return self._pids[name]

    def _take_state(self, name: str, host: str, config: FabricConfig) -> MemberState | None:
        """What earlier lives of a rank left; None while one of them lives on as a zombie and has it."""
        disk = self._disks.setdefault(name, FakeDisk())
        rng = Random(f"state {self.seed} {name} {self._lives[name]}")
        try:
            return MemberState.open(
                Path("/state") / name,
                config.spill,
                name=name,
                boot=f"{host} {self._boots[host]}",
                disk=disk,
                wall_ns=lambda: self._lives[name],
                identity=lambda size: rng.getrandbits(8 * size).to_bytes(size, "little"),
            )
        except SpillLockedError:
            return None

    def _look(self, engine: Engine, event: object, commands: list[Any]) -> None:
        if self.checked:
            engine.core.check_invariants()
        self.history.note(engine, event, commands)

    def kill(self, fabric: Fabric) -> None:
        """End a member without a goodbye, as SIGKILL would: its memory is lost, what it sent may still arrive.

        Twice is once.
        """
        for member in self._members:
            if member.fabric is fabric:
                member.store.kill()
                member.engine.close(0.0)
                self._gone(member.engine.card, killed=True)
                return

    def lose_power(self, host: str = "host-0") -> None:
        """Kill all members of a host, and lose what was not synced to its disks: each write may be there or not."""
        rng = Random(f"power {self.seed} {host} {self._boots[host]}")
        self._boots[host] += 1
        for member in [member for member in self._members if member.engine.card.host == host]:
            name = member.engine.card.name
            self.kill(member.fabric)
            if name in self._disks:
                self._letters[name].lose_power()
                disk, floor = self._disks[name], self._floors.get(name)
                left = disk.crashed(len(disk.steps), lambda _: rng.random() < 0.5, start=floor)
                self._disks[name], self._floors[name] = left, left.copy()

    def stop(self, fabric: Fabric, *, timeout_s: float = 5.0, exits: bool = True) -> None:
        """End a member well: `fabric.close(timeout_s)`. Its process ends, too, if it `exits`.

        Otherwise it goes on, with what it still looks at, until `vanish`, or until a next life that it hosts is killed.
        """
        if not exits:
            self._lingering.setdefault(fabric.name, [])
        fabric.close(timeout_s=timeout_s)
        if exits:
            self.vanish(fabric.name)

    def lingers(self, name: str, incarnation: int) -> bool:
        """Whether this life is over, and its process is not."""
        return any(card.incarnation == incarnation for card in self._lingering.get(name, ()))

    def vanish(self, name: str) -> None:
        """The process of a member that was stopped without its end does end."""
        for card in self._lingering.pop(name, ()):
            self._died(card)

    def close(self) -> None:
        """End all members, without a goodbye."""
        for member in list(self._members):
            self.kill(member.fabric)
        for letters in self._letters.values():
            letters.close()

    def _left(self, card: Card) -> None:
        if card.name in self._lingering:
            self._lingering[card.name].append(card)
        else:
            self._died(card)
        self._gone(card)

    def _died(self, card: Card) -> None:
        self._dead.add((card.name, card.incarnation))
        if self._arenas is not None:
            self._arenas.died(card.name, card.incarnation)

    def _gone(self, card: Card, *, killed: bool = False) -> None:
        if killed:
            self._died(card)
            self.vanish(card.name)
        self._tasks = [task for task in self._tasks if task.owner is None or task.owner._engine.card is not card]
        self._members = [member for member in self._members if member.engine.card is not card]
        self.history.end(card, killed=killed)

    def __enter__(self) -> World:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    # Faults.

    def cut(self, a: Fabric | str, b: Fabric | str, *, both: bool = True) -> None:
        """Lose all that `a` sends to `b` from now on, and unless `both` is false all that `b` sends to `a`."""
        self.hub.cut(_name(a), _name(b))
        if both:
            self.hub.cut(_name(b), _name(a))

    def heal(self, a: Fabric | str, b: Fabric | str) -> None:
        """Undo `cut`, in both directions."""
        self.hub.heal(_name(a), _name(b))
        self.hub.heal(_name(b), _name(a))

    def calm(self) -> None:
        """No more faults from now on: cuts heal, frames arrive at once and in order."""
        self.hub.calm()

    # Time.

    def every(self, seconds: float, function: Callable[[], object], *, owner: Fabric | None = None) -> None:
        """Run a function again and again, the first time at once: an application's loop. It ends with its `owner`.

        It runs whenever somebody waits, so keep it short; a second call does not begin before the first has ended.
        """
        self._tasks.append(_Task(owner, function, max(1, int(seconds * S)), self.now_ns))

    def run(self, seconds: float) -> None:
        """Let the world go on for so long, in its own time."""
        self._pump(lambda: False, self.now_ns + int(seconds * S))

    def until(self, predicate: Callable[[], bool], timeout_s: float = 60.0) -> bool:
        """Let the world go on until the predicate holds; false if it did not within so long, in the world's time."""
        self._pump(predicate, self.now_ns + int(timeout_s * S))
        return predicate()

    def _pump(self, is_over: Callable[[], bool], deadline_ns: int) -> None:
        rounds, began_ns = 0, self.now_ns
        while not is_over() and self.now_ns <= deadline_ns:
            if self._round():
                rounds = rounds + 1 if self.now_ns == began_ns else 0
                began_ns = self.now_ns
                if rounds > ROUNDS_MAX:
                    raise InternalError(f"the world stands still at {self.now_s:.6f} s: somebody works without end")
            elif self.now_ns >= deadline_ns:
                return
            else:
                self.now_ns = min(deadline_ns, self._next_due_ns())

    def _round(self) -> bool:
        """Every member takes a turn and runs at most one handler; then tasks run. Whether there was anything to do."""
        busy = False
        for member in list(self._members):
            busy = member.work(self.now_ns) or busy
        return self._run_tasks() or busy

    def _run_tasks(self) -> bool:
        due = [task for task in self._tasks if task.due_ns <= self.now_ns and not task.running]
        for task in due:
            if task not in self._tasks or task.running:
                continue  # an earlier one ended its owner, or waited, and so let it run
            task.running = True
            try:
                task.function()
            except (ClosedError, BrokenError):
                if task.owner is None or any(member.fabric is task.owner for member in self._members):
                    raise
            finally:
                task.running, task.due_ns = False, self.now_ns + task.period_ns
        return bool(due)

    def _next_due_ns(self) -> int:
        """When anything is due next. What is due already and was not done waits for somebody further up the stack."""
        dues = [task.due_ns for task in self._tasks if not task.running]
        for member in self._members:
            dues += member.dues_ns()
        return min((due for due in dues if due > self.now_ns), default=self.now_ns + S)

    def __repr__(self) -> str:
        return f"World(seed={self.seed}, now={self.now_s:.3f} s, members={[_name(fabric) for fabric in self.members]})"


def _share(engine: Engine, hub: ArenaHub) -> Sharing:
    def address_of(card: Card) -> str:
        return f"{card.name}@{card.incarnation}"

    card = engine.card
    arena = FakeArena(hub, address_of(card), engine.config.arena.bytes_max)
    mappings = FakeMappings(hub, card.name, card.incarnation, own=arena, own_key=address_of(card))
    return Sharing(engine, arena, mappings, address_of)


def _name(member: Fabric | str) -> str:
    return member if isinstance(member, str) else member.name
