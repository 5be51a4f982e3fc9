"""Writes the golden frames: one file for each kind of frame. Run once; the files are the specification afterwards.

python -m tests.data.make_golden
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fabric.core.wire import (
    ADDRESSED,
    NONE,
    Kind,
    Slot,
    encode_burst,
    encode_control,
    encode_descriptor,
    encode_marker,
    feed_id,
    member_id,
)

HERE = Path(__file__).parent
FEED = feed_id("rank-0", 7, "layers.0.health")
SOURCE, INCARNATION = member_id("rank-0"), 7
CARD = ("rank-0", 1, 4, "training", "boot-1", 4711, 1, "ipc://data", "ipc://control", "ipc://bulk")

FIELDS: dict[Kind, tuple[Any, ...]] = {
    Kind.HELLO: (*CARD, 9, [(3, "layers.**", "live", "reliable", True, [(FEED, 17)], "trainer")]),
    Kind.REGISTER: (3, "layers.*.health", "retained", "best_effort", False, [(FEED, 17)], ""),
    Kind.REGISTERED: (3, 1, [(FEED, "layers.0.health", "reliable", 5, 9, 2, 7, 6, 0)]),
    Kind.UNREGISTER: (3, True),
    Kind.ACKNOWLEDGE: ([(3, FEED, 17)],),
    Kind.PULL: (FEED, 12, 8388608, [(5, 6), (8, 17)]),
    Kind.JOIN: ([(FEED, 99)],),
    Kind.HEARTBEAT: ([(FEED, 17)], 9),
    Kind.UNKNOWN: (3,),
    Kind.STATUS: ("layers.0.health", 6),
    Kind.FIN: ("layers.0.health", 6, 7, FEED, 0, 17, True),
    Kind.FENCED: (8,),
    Kind.BYE: ([(FEED, 17, True)], True),
    Kind.BOOKS: (12, [(3, FEED, 5, 17, 9, 2, False, [("handled", 5), ("not_asked", 1)])]),
    Kind.BOOKED: (12, True),
    Kind.REQUEST: (1, 1, "evaluate", 1, 10000, 2, b"\x80", b"value"),
    Kind.ACCEPTED: (1,),
    Kind.REPLY: (1, False, 2, b"answer"),
    Kind.FETCH: (FEED, 17, 1048576, 4194304, 3, True),
    Kind.HOLDS: ([(FEED, 3, True, 17, [(5, 6)])],),
    Kind.LEASED: ([(FEED, 3)],),
    Kind.RECALL: ([(FEED, 9)],),
    Kind.ROSTER_ASK: (*CARD, 9),
    Kind.ROSTER: ([(*CARD, 7)],),
    Kind.REPAIR: (FEED, 12),
    Kind.AVAILABLE: (FEED, 12, 2, 17, [(5, 6)]),
    Kind.CHUNK: (FEED, 17, 1048576, 3, 0x0123456789ABCDEF),
    Kind.MISSING: (FEED, 17, 3),
}


def frames() -> dict[str, bytes]:
    """Every golden frame by the name of its file."""
    plain = (FEED, INCARNATION, 5, 1_700_000_000_000_000_000, [17, 18, 17], [2, 0, 3], [4, NONE, 5], [1, 2, 3])
    descriptor = encode_descriptor(1 << 20, 0x0123456789ABCDEF)
    slot = encode_descriptor(1 << 20, 0x0123456789ABCDEF, 16, Slot(2, 5, 41))
    addressed = (FEED, INCARNATION, 8, 1_700_000_000_000_000_000, [17], [4], [7], [ADDRESSED | 1], [descriptor])
    data = {
        "data_burst": encode_burst(*plain, [b"first", b"", b"third"]),
        "data_burst_with_metadata": encode_burst(
            *plain, [b"first", b"", b"third"], [b"\x81\xa4step\x07", b"", b"\x80"]
        ),
        "data_burst_addressed": encode_burst(*addressed),
        "data_burst_in_arena": encode_burst(*addressed[:-1], [slot]),
        "data_marker": encode_marker(FEED, INCARNATION, 17, 1_700_000_000_000_000_000, [99, 2**64 - 1]),
    }
    link = {kind: "control" if kind < Kind.REPAIR else "bulk" for kind in Kind}
    control = {
        f"{link[kind]}_{kind.name.lower()}": encode_control(kind, SOURCE, INCARNATION, *fields)
        for kind, fields in FIELDS.items()
    }
    return data | control


def main() -> None:
    """Write them all."""
    for name, frame in frames().items():
        (HERE / f"{name}.bin").write_bytes(frame)


if __name__ == "__main__":
    main()
