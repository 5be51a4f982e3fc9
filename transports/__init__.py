"""Buffers between addresses. Knows nothing of topics, feeds or tensors, and imports nothing of `fabric`.

`base` has the contract and the errors, `memory` members in one process with seeded faults. `transports.zeromq` is
imported by name where it is needed, so that nobody pays for zmq who does not use it.
"""

from __future__ import annotations

from transports.base import (
    AddressError,
    Buffer,
    Endpoints,
    Inbound,
    Link,
    PeerUnreachableError,
    Receipt,
    SendBlockedError,
    SocketLimits,
    Transport,
    TransportClosedError,
    TransportError,
)
from transports.memory import FaultPlan, MemoryHub, MemoryTransport

__all__ = [
    "AddressError",
    "Buffer",
    "Endpoints",
    "FaultPlan",
    "Inbound",
    "Link",
    "MemoryHub",
    "MemoryTransport",
    "PeerUnreachableError",
    "Receipt",
    "SendBlockedError",
    "SocketLimits",
    "Transport",
    "TransportClosedError",
    "TransportError",
]
