"""Every limit and setting, in frozen groups, with its unit in its name and the reason of its default in its docstring.

Objects receive the group that they need. Nothing here reads the environment; `dataclasses.replace` varies one setting.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path

from fabric.errors import ConfigError

__all__ = [
    "BURST_BYTES_MAX",
    "Arena",
    "Delivery",
    "FabricConfig",
    "Guard",
    "Handlers",
    "Inboxes",
    "Letters",
    "Liveness",
    "Policy",
    "Repair",
    "Requests",
    "Retention",
    "Spill",
    "Start",
    "Verify",
    "WhenFull",
    "Work",
    "check_guard",
    "check_policy",
]

KIB, MIB, GIB = 1024, 1024**2, 1024**3

BURST_BYTES_MAX = 64 * KIB
"""Most bytes of records in one burst. A larger value is addressed instead of pushed, so that what PUB may hold
for a stopped subscriber is its high-water mark times this (DESIGN section 5). A wire constant, not a setting."""


class Policy(StrEnum):
    """What a topic promises; chosen by its publisher."""

    RELIABLE = "reliable"
    DURABLE = "durable"
    LATEST = "latest"
    LOSSY = "lossy"


class WhenFull(StrEnum):
    """What `publish` does when what is owed has used up its room."""

    SPILL = "spill"
    BLOCK = "block"
    DROP_OLDEST = "drop_oldest"
    FAIL = "fail"


class Guard(StrEnum):
    """How a publisher looks for values that change between their publication and the end of their retention."""

    OFF = "off"
    SAMPLE = "sample"
    STRICT = "strict"


class Delivery(StrEnum):
    """Whether a subscription is owed what it missed."""

    RELIABLE = "reliable"
    BEST_EFFORT = "best_effort"


class Start(StrEnum):
    """Where a new subscription begins in a feed that exists already."""

    LIVE = "live"
    RETAINED = "retained"
    LAST = "last"


class Handlers(StrEnum):
    """Where handlers of messages and requests run."""

    THREAD = "thread"
    STEP = "step"


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """What a publisher keeps in memory."""

    owed_bytes_max: int = 256 * MIB
    """What subscribers have not acknowledged yet, over all feeds of a member; beyond it `when_full` decides."""
    kept_bytes_max: int = 64 * MIB
    """History that stays for `start="retained"` and late repairs; the oldest gives way at no cost."""
    publish_timeout_s: float = 5.0
    """How long `publish` waits for room under `when_full="block"`; Aeron's time for a slow receiver."""
    absent_s: float = 3600.0
    """How long a subscriber out of reach stays owed, as a durable MQTT session does by default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inboxes:
    """What a subscriber holds."""

    hand_bytes_max: int = 32 * MIB
    """Handed over and not settled yet, for each subscription."""
    hold_bytes_max: int = 32 * MIB
    """Received ahead of order, for each subscription; the highest offset gives way. Half a repair window, and more."""
    ranges_max: int = 1024
    """Settled ranges above the floor of a feed; bounds a cursor."""
    payload_bytes_max: int = 1024 * MIB
    """The largest value that is accepted, in bytes."""
    assembly_bytes_max: int = 128 * MIB
    """Addressed payloads under way at once. Of each peer one record and one request may be, however large."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """How what was missed is fetched."""

    window_bytes: int = 8 * MIB
    """Asked for at once: the credit of a pull."""
    chunk_bytes: int = 2 * MIB
    """A payload travels in pieces of this size; at most 4 MiB, so that no frame takes longer than a heartbeat."""
    retry_ms_first: int = 20
    """An unanswered pull is repeated after this, and then by chance between this and a ceiling that doubles up to
    `retry_ms_max` (reliability notes, section 4.7)."""
    retry_ms_max: int = 1000
    attempts_max: int = 3
    """How often a payload whose checksum is wrong is fetched before it counts as corrupt at its source."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Liveness:
    """Heartbeats and what their absence means."""

    marker_ms: int = 250
    """Period of markers and of heartbeats that list unacknowledged feeds; Aeron's status message takes 200 ms."""
    idle_marker_ms: int = 50
    """A feed that fell idle is marked after this, unless it is acknowledged to its end by then."""
    heartbeat_ms: int = 1000
    """Period of heartbeats when there is nothing to tell."""
    acknowledge_ms: int = 20
    """An acknowledgement waits at most this long for others to share its frame."""
    acknowledge_bytes: int = 4 * MIB
    """... or until so many bytes were handled."""
    suspect_s: float = 4.0
    """Silence after which a peer is suspect."""
    down_s: float = 10.0
    """Silence after which a peer is down; Aeron's image liveness."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """Requests and replies."""

    resend_ms_first: int = 100
    """An unanswered request is sent again after this, and then by chance between this and a ceiling that doubles up to
    `resend_ms_max`; beyond a budget, only at that."""
    resend_ms_max: int = 1000
    pending_max: int = 1024
    """Requests of ours under way."""
    remembered_max: int = 4096
    """Replies kept so that a repeated request is not executed twice; the oldest give way once their deadline passed."""
    remembered_bytes_max: int = 64 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Who runs what, and how much at a time."""

    handlers: Handlers = Handlers.THREAD
    burst_age_ms: float = 1.0
    """A burst that is not full leaves after this."""
    turn_bursts_max: int = 64
    """A turn of the engine ends after so many frames ..."""
    turn_us_max: int = 200
    """... or after so long."""
    training_pause_ms: float = 5.0
    """In a process that trains, the background thread works at most once in this time."""
    parked_ms: float = 2.0
    """The background thread resumes so long after the last waiting thread left."""

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "handlers", Handlers(self.handlers))
        except ValueError:
            raise ConfigError(f"{self.handlers!r} is neither thread nor step", field="work.handlers") from None


class Verify(StrEnum):
    """How a value that is read in shared memory is compared with what was published."""

    SAMPLE = "sample"
    ALWAYS = "always"
    OFF = "off"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arena:
    """Shared memory, for large values between members of one host."""

    enabled: bool = True
    """Without it large values travel by socket."""
    bytes_max: int = 768 * MIB
    """All of it, for each member that publishes: what may be owed and kept, and as much again that readers look at.
    Beyond it values travel by socket. It is taken from the system as it is needed."""
    verify: Verify = Verify.SAMPLE
    """`sample` sums 64 KiB of each value, spread over it, at both ends; `always` all of it; `off` compares nothing.
    Descriptor, generation, bounds and length are always checked."""

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "verify", Verify(self.verify))
        except ValueError:
            raise ConfigError(f"{self.verify!r} is none of {', '.join(Verify)}", field="arena.verify") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Spill:
    """The continuation of retention on disk (reliability notes, sections 5.2 and 5.5)."""

    directory: Path | None = None
    """Under which each member makes a directory of its own; private (0700), and on a disk of this host. Default: one of
    this user among the temporary files. What is in it is not needed once its member ends."""
    bytes_max: int = 8 * GIB
    """Of all its files, preallocated room included: 128 segments, eight seconds of outage at 1 GB/s."""
    segment_bytes: int = 64 * MIB
    """A segment is closed when it is full; what is handled leaves the disk by whole segments. 64 MiB take 30 to 60 ms
    to write, and a scan of one in recovery as long."""
    segment_age_s: float = 60.0
    """... or when it is so old: bounds how long handled records stay."""
    age_s: float = 86_400.0
    """What nobody fetched for a day is given up, and reported as a gap."""
    free_bytes_min: int = 1 * GIB
    """Stays free on the file system: the job's own checkpoints come first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Letters:
    """The store of dead letters (reliability notes, section 5.6). A full one takes none: lanes wait."""

    rows_max: int = 10_000
    """Letters: more than anybody reads, and what a member keeps of each in memory stays below 25 MB."""
    bytes_max: int = 256 * MIB
    """Of their values, metadata and details, 512 bytes for each letter included; the file takes up to a quarter
    more."""
    record_bytes_max: int = 1 * MIB
    """A larger value lies in the spill log; the store has so much of its head, its size and its checksum."""
    value_bytes_max: int = 256 * MIB
    """Of a still larger value only the head is kept: such a letter cannot be redriven. Below 4 GiB. A redrive reads it
    into memory, on the thread that also writes to the disk: 256 MiB take a quarter of a second."""
    values_bytes_max: int = 1 * GIB
    """Of all values of letters in the spill log, an eighth of that; beyond it only heads are kept."""
    detail_bytes_max: int = 2048
    """Of the text that says what went wrong; the rest is cut."""
    notices_max: int = 1000
    """Notices of gaps and of records that never became messages; the oldest give way, counted."""
    waiting_max: int = 10_000
    """Letters that wait in memory for a store which refuses; of parked lanes half of that. Beyond it records wait where
    they were delivered, and hold their room: but for what is redriven, nothing runs that could not become a letter."""
    remembered_max: int = 10_000
    """Letters of a member with state that were handled or given up, whose records its next lives do not handle again;
    at most 512 bytes on disk for each, beside `bytes_max`. The oldest are forgotten, counted."""
    redriven_at_once_max: int = 256
    """Letters on their way back to their handlers at once ..."""
    redriven_bytes_max: int = 8 * MIB
    """... and their bytes; one letter always goes."""
    same_reason_max: int = 100
    """So many messages of one handler in a row that die of one reason are a fault of the handler, not of the messages:
    it pauses, and what is owed waits at its publishers instead of filling the store."""
    pause_s: float = 30.0
    """... for so long; then one message is tried. The reset timeout of common circuit breakers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FabricConfig:
    """All settings of one member."""

    listen: str = "ipc"
    """`"ipc"` (members of one host), or `"tcp://ADDRESS"`, with `:PORT` for a fixed control port. Loopback and
    ipc are the defaults; every other address, a wildcard included, must be named here."""
    wildcard: bool = False
    """Whether `listen` may name every interface."""
    runtime_directory: Path | None = None
    """For the cards that observers find; private (0700). Default: the user's runtime directory."""
    subscribe_timeout_s: float = 10.0
    """How long `subscribe` waits for the confirmation of live peers."""
    retention: Retention = field(default_factory=Retention)
    inboxes: Inboxes = field(default_factory=Inboxes)
    repair: Repair = field(default_factory=Repair)
    liveness: Liveness = field(default_factory=Liveness)
    requests: Requests = field(default_factory=Requests)
    work: Work = field(default_factory=Work)
    arena: Arena = field(default_factory=Arena)
    spill: Spill = field(default_factory=Spill)
    letters: Letters = field(default_factory=Letters)
    install_signal_handler: bool = True
    """Whether `join` in the main thread installs a SIGTERM handler over the default one."""

    def __post_init__(self) -> None:
        groups = (self.retention, self.inboxes, self.repair, self.liveness, self.requests, self.work, self.spill)
        for group in (*groups, self.letters, self.arena):
            _require_positive(group)
        if self.spill.bytes_max < 2 * self.spill.segment_bytes:
            raise ConfigError("less than two segments: the one in use and its spare", field="spill.bytes_max")
        if self.letters.value_bytes_max >= 4 * GIB:
            raise ConfigError("below 4 GiB", field="letters.value_bytes_max")
        if self.repair.chunk_bytes > 4 * MIB:
            raise ConfigError("at most 4 MiB", field="repair.chunk_bytes")
        if self.subscribe_timeout_s <= 0:
            raise ConfigError("must be positive", field="subscribe_timeout_s")


def _require_positive(group: object) -> None:
    for setting in fields(group):  # type: ignore[arg-type]  # each group is a dataclass
        value = getattr(group, setting.name)
        if isinstance(value, int | float) and value <= 0 and value is not False:
            raise ConfigError(f"must be positive, not {value}", field=f"{type(group).__name__.lower()}.{setting.name}")


def check_policy(policy: str, when_full: str | None) -> tuple[Policy, WhenFull]:
    """The policy and what happens when its room is used up, or `ConfigError`.

    `reliable` takes `spill` (the default), `block`, `drop_oldest`, `fail`; `durable` takes `block` (the default) and
    `fail`; `latest` and `lossy` take none.
    """
    try:
        chosen = Policy(policy)
    except ValueError:
        raise ConfigError(f"{policy!r} is none of {', '.join(Policy)}", field="policy") from None
    if chosen in (Policy.LATEST, Policy.LOSSY):
        if when_full is not None:
            raise ConfigError(f"{chosen.value!r} topics are never full: leave it out", field="when_full")
        return chosen, WhenFull.DROP_OLDEST
    takes = list(WhenFull) if chosen is Policy.RELIABLE else [WhenFull.BLOCK, WhenFull.FAIL]
    if when_full is None:
        return chosen, takes[0]
    if when_full not in takes:
        raise ConfigError(f"{when_full!r} is none of {', '.join(takes)}", field="when_full")
    return chosen, WhenFull(when_full)


def check_guard(guard: str) -> Guard:
    """The guard of this name, or `ConfigError`."""
    try:
        return Guard(guard)
    except ValueError:
        raise ConfigError(f"{guard!r} is none of {', '.join(Guard)}", field="guard") from None
