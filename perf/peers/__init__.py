"""The libraries beside which the fabric is measured: one module each, with its settings and why in its docstring.

Each has a `Writer` and a `Reader` (`base.py` says what they must do), some a `Caller` and an `Answerer`. A benchmark's
sides (`perf/sides.py`) are written once, over these. What is missing on a machine is skipped by name.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from perf.harness import Contestant
from perf.report import Report

__all__ = ["PEERS", "Peer", "cast", "load", "missing"]


@dataclass(frozen=True, slots=True)
class Peer:
    """A library: its module here, what it needs on the machine, and what its messages are by kind of work.

    `share`: of the records that others send in a round it sends so much, since it would take minutes otherwise.
    `shared`: see `Contestant`.
    """

    module: str
    modules: tuple[str, ...]
    programs: tuple[str, ...] = ()
    records: str = ""
    arrays: str = ""
    requests: str = ""
    share: float = 1.0
    shared: str = ""


BY_HAND = "no repair, no snapshot"
PEERS = {
    "fabric": Peer(
        "perf.ours",
        ("fabric",),
        records="delivered or reported as a gap, ordered by lane, acknowledged, checksummed; bytes copied out",
        arrays="delivered or reported, ordered by lane, acknowledged, a snapshot; a read-only view",
        requests="sent again until answered, executed at most once",
    ),
    "raw": Peer(
        "perf.peers.pyzmq",
        ("zmq",),
        records=f"PUSH/PULL: delivered while the connection lives, ordered by connection; copied out; {BY_HAND}",
        arrays=f"PUSH/PULL, to several readers PUB/SUB: as records; sent from the caller's memory; a view; {BY_HAND}",
        requests="DEALER/ROUTER: one frame each way, once",
    ),
    "raw pub": Peer("perf.peers.pyzmq", ("zmq",), records="PUB/SUB, unbounded so that it drops nothing; copied out"),
    "raw nodrop": Peer("perf.peers.pyzmq", ("zmq",), records="XPUB_NODROP: waits for the slowest", arrays="the same"),
    "raw safe": Peer("perf.peers.pyzmq", ("zmq",), arrays="PUSH/PULL with a summed snapshot that the reader verifies"),
    "raw tcp": Peer("perf.peers.pyzmq", ("zmq",), arrays="as raw, over tcp"),
    "zenoh": Peer(
        "perf.peers.zenoh_peer",
        ("zenoh",),
        records="reliable, congestion BLOCK: delivered while the session lives, ordered by publisher; copied out",
        arrays="over shared memory on one host; copied in, and out (its Python has no view of what it received)",
        requests="a query, answered once; sent once",
    ),
    "iceoryx2": Peer(
        "perf.peers.iceoryx2_peer",
        ("iceoryx2",),
        records="shared memory, waits for the slowest, ordered by publisher; copied in and out; notified, not polled",
        arrays="shared memory, waits for the slowest; copied in, a borrowed view out; notified, not polled",
    ),
    "gloo": Peer(
        "perf.peers.gloo",
        ("torch",),
        arrays="send/recv, to several readers broadcast, over tcp; both sides take part in each; into a given tensor",
        requests="a tensor each way, both sides know its size",
    ),
    "torch rpc": Peer(
        "perf.peers.torch_rpc",
        ("torch",),
        arrays="an acknowledged call for each, four under way; copied out",
        requests="a call, answered once; sent once",
    ),
    "torch queue": Peer(
        "perf.peers.torch_queue",
        ("torch",),
        records="a pipe: delivered while both live, ordered by sender; pickled, copied out",
        arrays="a copy made in new shared memory, handed over as a file descriptor; a view that both may change",
        share=0.25,
        shared="perf.peers.torch_queue:queues",
    ),
    "nats": Peer(
        "perf.peers.nats_peer",
        ("nats",),
        ("nats-server",),
        records="core: fire and forget through a broker, a slow reader is cut off; ordered by publisher; copied out",
        requests="request/reply through a broker; sent once",
        share=0.25,
    ),
    "redis": Peer(
        "perf.peers.redis_peer",
        ("redis", "hiredis"),
        ("redis-server",),
        records="pub/sub: fire and forget through a broker; ordered; copied out; 256 in a pipeline",
        share=0.25,
    ),
    "redis stream": Peer(
        "perf.peers.redis_peer",
        ("redis", "hiredis"),
        ("redis-server",),
        records="XADD/XREADGROUP: kept by a broker until read, in its memory; ordered; copied out; 256 in a pipeline",
        arrays="XADD/XREADGROUP: kept by a broker until read, in its memory; ordered; copied in and out",
        share=0.125,
    ),
    "memcpy": Peer("perf.peers.memcpy", ("numpy",), arrays="np.copyto through four warm shared slots, in one process"),
}
STYLES = {
    "raw pub": {"style": "pub"},
    "raw nodrop": {"style": "nodrop"},
    "raw safe": {"style": "safe"},
    "raw tcp": {"link": "tcp"},
    "redis stream": {"style": "stream"},
}
"""Options of a library's second and third way."""
LOSES = "loses records once its buffer is full, though its writer is set to retry until delivered (0.10.0)"
"""Why iceoryx2 takes no part where records come as fast as they can."""
ESSENTIAL = ("fabric", "raw")
"""They break a benchmark; the others are left out."""


def load(library: str, name: str) -> Any:  # noqa: ANN401 - a class
    """The class `name` of this library."""
    return getattr(importlib.import_module(PEERS[library].module), name)


def missing(library: str) -> str | None:
    """Why it cannot play here, or None."""
    peer = PEERS[library]
    for module in peer.modules:
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    for program in peer.programs:
        if shutil.which(program) is None:
            return f"{program} is not on PATH"
    return None


def cast(
    arguments: argparse.Namespace,
    report: Report,
    libraries: Iterable[str],
    sides: tuple[str, ...],
    what: str,
    **options: Any,  # noqa: ANN401
) -> list[Contestant]:
    """A contestant of each library that is here and asked for; the others are named in the report.

    `what`: the kind of work, `records`, `arrays` or `requests`, by which its messages are described there.
    """
    found = []
    for library in libraries:
        wanted = not arguments.only or library in arguments.only.split(",")
        if not wanted or (arguments.raw_only and library == "fabric"):
            continue
        why = missing(library)
        if why:
            report.skipped[library] = why
            continue
        peer = PEERS[library]
        report.semantics.setdefault(what, {})[library] = getattr(peer, what)
        settings = {**options, "library": library, **STYLES.get(library, {})}
        share = peer.share if what == "records" else 1.0
        optional = library not in ESSENTIAL
        found.append(Contestant(library, sides, settings, optional=optional, share=share, shared=peer.shared))
    return found
