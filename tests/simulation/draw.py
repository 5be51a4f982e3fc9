"""What a random world is made of: options and faults, all drawn from one seed.

Swarm testing: every world draws its own sizes, policies and faults, many of them off, so that rare pairs meet.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from fabric.config import Arena, FabricConfig, Inboxes, Liveness, Repair, Requests, Retention, Spill, Work
from fabric.testing import ArenaPlan, DiskPlan, FaultPlan

KIB = 1024
DISK = 1 << 40
"""Seeds with this bit have topics that spill. So the worlds of the others stay what they were."""
SHARED = 1 << 41
"""Seeds with this bit have members that share memory."""


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic of one publisher: its policy, what is published on it, and when it begins (in steps)."""

    name: str
    policy: str
    when_full: str | None
    lanes: int
    rate: float
    burst: int
    sizes: tuple[int, ...]
    begins: int


@dataclass(frozen=True, slots=True)
class Profile:
    """A subscription, and how its application reads."""

    pattern: str
    start: str
    seeds: tuple[int, ...] | None
    delivery: str
    style: str
    """`drain`, `many`, `manual` or `handler`."""
    pace_s: float
    most: int
    """Messages in one go; in hand at once, if `manual`."""
    trouble: float
    """Probability that a message is rejected, or that a handler raises."""
    begins: int


@dataclass(frozen=True, slots=True)
class Options:
    """One world."""

    steps: int
    pause_s: float
    plan: FaultPlan
    config: FabricConfig
    hosts: int
    publishers: tuple[tuple[Topic, ...], ...]
    readers: tuple[tuple[Profile, ...], ...]
    """Of each member, publishers first."""
    requests: float
    """Probability of one in each step."""
    faults: tuple[tuple[str, int], ...]
    """Names of what may happen in a step, and their weights."""
    revive: float
    """Probability that a member that is down comes back in a step."""
    disk: DiskPlan = field(default_factory=DiskPlan)
    arena: ArenaPlan | None = None


def draw(seed: int) -> Options:
    """The options of this seed."""
    rng = Random(f"options {seed}")
    pick = rng.choice
    publishers = tuple(_topics(rng, number) for number in range(pick([1, 1, 2, 3])))
    members = len(publishers) + pick([1, 1, 2, 3])
    readers = tuple(
        tuple(
            _profile(rng, len(publishers))
            for _ in range(pick([0, 0, 1]) if member < len(publishers) else pick([1, 1, 2]))
        )
        for member in range(members)
    )
    options = Options(
        steps=pick([20, 40, 80]),
        pause_s=pick([0.005, 0.05, 0.3]),
        plan=_plan(rng),
        config=_config(rng),
        hosts=pick([1, 1, members]),
        publishers=publishers,
        readers=readers,
        requests=pick([0, 0, 0.1, 0.4]),
        faults=(
            ("nothing", 40),
            ("kill_publisher", pick([0, 0, 1, 3])),
            ("stop_publisher", pick([0, 0, 1, 3])),
            ("replace_publisher", pick([0, 0, 0, 2])),
            ("kill_reader", pick([0, 0, 1, 3])),
            ("stop_reader", pick([0, 0, 0, 2])),
            ("close_subscription", pick([0, 0, 1])),
            ("cut", pick([0, 0, 2, 4])),
        ),
        revive=pick([0.05, 0.3]),
    )
    options = _with_disk(options, seed) if seed & DISK else options
    return _with_arenas(options, seed) if seed & SHARED else options


def _with_disk(options: Options, seed: int) -> Options:
    """Memory is small, so that much is spilled; the disk may be slow, small and now and then full."""
    rng = Random(f"disk {seed}")
    pick = rng.choice
    publishers = tuple(
        tuple(
            replace(topic, when_full="spill") if topic.policy == "reliable" and rng.random() < 0.8 else topic
            for topic in topics
        )
        for topics in options.publishers
    )
    config = replace(
        options.config,
        retention=replace(options.config.retention, owed_bytes_max=pick([2 * KIB, 40 * KIB, 200 * KIB])),
        spill=Spill(
            segment_bytes=pick([4 * KIB, 256 * KIB]),
            bytes_max=pick([600 * KIB, 64 * KIB * KIB]),
            segment_age_s=pick([0.5, 60.0]),
            free_bytes_min=1,
        ),
    )
    disk = DiskPlan(delay_ms=pick([0, 1, 60]), refusals=pick([0, 0, 0.1, 0.5]), damage=pick([0, 0, 0.3]))
    return replace(options, publishers=publishers, config=config, disk=disk)


def _with_arenas(options: Options, seed: int) -> Options:
    """Values are large, arenas small, most members on one host."""
    rng = Random(f"arenas {seed}")
    pick = rng.choice
    publishers = tuple(
        tuple(replace(topic, sizes=pick([(70 * KIB,), (20, 70 * KIB), (20, 66 * KIB, 140 * KIB)])) for topic in topics)
        for topics in options.publishers
    )
    config = replace(
        options.config,
        retention=replace(options.config.retention, kept_bytes_max=pick([1, 200 * KIB, 1024 * KIB])),
        arena=Arena(bytes_max=pick([300, 600, 1200, 4000]) * KIB, verify=pick(["sample", "always", "off", "off"])),
    )
    arena = ArenaPlan(
        segment_bytes=pick([1, 256, 1024]) * KIB,
        refusals=pick([0, 0, 0.2]),
        blindness=pick([0, 0, 0.1, 0.5]),
        behind=pick([0, 0, 0.3]),
        death_ms=pick([0, 20, 2000]),
    )
    return replace(options, publishers=publishers, config=config, arena=arena, hosts=pick([1, 1, 1, options.hosts]))


def _topics(rng: Random, number: int) -> tuple[Topic, ...]:
    return tuple(_topic(rng, f"p{number}.t{index}") for index in range(rng.choice([1, 1, 2, 3])))


def _topic(rng: Random, name: str) -> Topic:
    pick = rng.choice
    policy = pick(["reliable", "reliable", "reliable", "latest", "lossy"])
    return Topic(
        name=name,
        policy=policy,
        when_full=pick(["block", "drop_oldest", "fail"]) if policy == "reliable" else None,
        lanes=pick([1, 2, 3, 8]),
        rate=pick([0.3, 0.7]),
        burst=pick([1, 4, 12]),
        sizes=pick([(20,), (20, 200), (20, 9 * KIB), (20, 30 * KIB), (20, 20, 70 * KIB), (20, 100 * KIB)]),
        begins=pick([0, 0, 0, 5, 15]),
    )


def _profile(rng: Random, publishers: int) -> Profile:
    pick = rng.choice
    style = pick(["drain", "drain", "many", "manual", "handler"])
    start = pick(["live", "live", "retained", "last"])
    return Profile(
        pattern=pick(["**", "**", "*.t0", f"p{rng.randrange(publishers)}.**"]),
        start=start,
        seeds=pick([None, None, (0,), (0, 2)]) if style != "handler" else None,
        delivery=pick(["reliable", "reliable", "reliable", "best_effort"]) if style != "handler" else "reliable",
        style=style,
        pace_s=pick([0.003, 0.02, 0.2]),
        most=pick([1, 3, 100]),
        trouble=pick([0, 0, 0.1]),
        begins=pick([0, 0, 5]),
    )


def _plan(rng: Random) -> FaultPlan:
    pick = rng.choice
    return FaultPlan(
        loss=pick([0, 0, 0.05, 0.3]),
        duplication=pick([0, 0, 0.2]),
        delay_ms=pick([0, 0.3, 5, 30]),
        straggler=pick([0, 0, 0.1]),
        data_frames=pick([1, 4, 1000]),
        control_frames=pick([8, 4096]),
        bulk_frames=pick([1, 32]),
    )


def _config(rng: Random) -> FabricConfig:
    pick = rng.choice
    base = FabricConfig(subscribe_timeout_s=pick([0.5, 5.0]))
    groups: dict[str, Any] = {
        "retention": Retention(
            owed_bytes_max=pick([100 * KIB, 300 * KIB, 64 * KIB * KIB]),
            kept_bytes_max=pick([1, 3 * KIB, 200 * KIB, 64 * KIB * KIB]),
            publish_timeout_s=pick([0.05, 0.5]),
            absent_s=pick([3.0, 3600.0, 3600.0]),
        ),
        "inboxes": Inboxes(
            hand_bytes_max=pick([1, 300, 3 * KIB, 32 * KIB * KIB]),
            hold_bytes_max=pick([1, 300, 3 * KIB, 32 * KIB * KIB]),
            ranges_max=pick([1, 3, 1024]),
            assembly_bytes_max=pick([64 * KIB, 128 * KIB * KIB]),
        ),
        "repair": Repair(
            window_bytes=pick([1, 500, 8 * KIB * KIB]),
            chunk_bytes=pick([16 * KIB, 1024 * KIB]),
            retry_ms_max=pick([100, 1000]),
        ),
        "liveness": Liveness(
            acknowledge_ms=pick([1, 20]),
            acknowledge_bytes=pick([100, 4 * KIB * KIB]),
            suspect_s=pick([0.5, 4.0]),
            down_s=pick([2.0, 10.0]),
        ),
        "requests": Requests(),
        "work": Work(turn_bursts_max=pick([1, 4, 64])),
    }
    return replace(base, **groups)
