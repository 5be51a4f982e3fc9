"""Segments of shared memory: anonymous, sealed, with slots of one size. How one is made, checked, mapped and announced.

A segment begins with its generation table, one u64 for each slot, which only its writer changes; 0 means free. Numbers
are little-endian in the packets and native in the table: both sides run on one host.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import mmap
import os
import resource
import socket
import stat
import struct
import weakref
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from transports.base import TransportError

__all__ = [
    "SLOT_BYTES_MIN",
    "Kind",
    "Layout",
    "MalformedSegmentError",
    "Place",
    "Segment",
    "check_segment",
    "create_segment",
    "is_of_this_user",
    "is_within_share",
    "map_segment",
    "pack_greeting",
    "pack_packet",
    "populate",
    "slot_class",
    "unpack_greeting",
    "unpack_packet",
]

PAGE: Final = mmap.PAGESIZE
SLOT_BYTES_MIN: Final = 64 * 1024
"""Bytes of the smallest slot: what is smaller travels in a burst."""

GENERATION_BYTES: Final = 8
SLOTS_MAX: Final = 1 << 20
"""Slots of a segment that a reader takes for possible; a writer with default limits makes 1,024 at most."""

PACKET_BYTES_MAX: Final = 512
"""Longest packet of either side: a greeting with a name of 255 bytes is the longest there is."""

DESCRIPTORS_SHARE: Final = 0.8
"""Share of RLIMIT_NOFILE beyond which no descriptor is taken in: libzmq aborts when an ipc accept finds none left."""

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | 0x10 | fcntl.F_SEAL_SEAL
"""0x10 is F_SEAL_FUTURE_WRITE (linux/fcntl.h), which the module has no name for: what is mapped stays writable, and
nothing else ever becomes so, in any process."""

_DONTFORK: Final = 10
_POPULATE_WRITE: Final = 23
"""MADV_DONTFORK and MADV_POPULATE_WRITE (linux/mman.h; the latter from 5.14 on)."""

_SHARED: Final = 1
_FAILED: Final = ctypes.c_void_p(-1).value


class MalformedSegmentError(TransportError):
    """What a peer handed over is no segment, or not the one that it announced."""


class Place(NamedTuple):
    """Where a piece of an arena lies, and of which use of that slot it is."""

    segment: int
    slot: int
    generation: int
    """Never 0, never used twice in one arena, increasing."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What there is to know of a segment before it is mapped."""

    number: int
    slot_bytes: int
    slots: int

    @property
    def start(self) -> int:
        """Where the first slot begins, in bytes: behind the table, on a page of its own."""
        return -(-self.slots * GENERATION_BYTES // PAGE) * PAGE

    @property
    def size(self) -> int:
        """Bytes of address space."""
        return self.start + self.slots * self.slot_bytes


def slot_class(size: int) -> int:
    """The size of the slot that serves `size` bytes: a power of two and some sixteenths of it, in whole pages.

    A value of 2**n bytes has a head, too, so that a quarter would be lost with quarters.
    """
    if size <= SLOT_BYTES_MIN:
        return SLOT_BYTES_MIN
    step = 1 << ((size - 1).bit_length() - 5)
    if step < PAGE:
        step = PAGE
    return -(-size // step) * step


class Segment:
    """A segment as it is mapped here. `memory` is read-only unless it is our own."""

    __slots__ = ("dropped", "layout", "number", "readable", "slot_bytes", "slots", "start", "table", "views")

    def __init__(self, layout: Layout, memory: memoryview) -> None:
        self.layout = layout
        self.number, self.slot_bytes, self.slots, self.start = (
            layout.number,
            layout.slot_bytes,
            layout.slots,
            layout.start,
        )
        self.readable = memory.toreadonly()
        self.table = memory[: layout.slots * GENERATION_BYTES].cast("Q")
        self.views = 0
        """How many views were handed out of which the death has not been told."""
        self.dropped = False
        """Whether its writer has closed it."""


@functools.cache
def _libc() -> Any:  # noqa: ANN401 - a library has no type
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mmap.restype = ctypes.c_void_p
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


def map_segment(descriptor: int, size: int, *, writable: bool) -> memoryview:
    """Map all of a segment; it is unmapped when the last view of the result dies. Raises OSError.

    Not by `mmap.mmap`, for three reasons. It keeps a descriptor of its own for each mapping, 500 in a job with 64
    members on a host. A forked child inherits that descriptor, and with it the memory. And in such a child, which does
    not inherit the mapping itself, the collector would unmap whatever lies at that address by then.
    """
    libc = _libc()
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    address = libc.mmap(None, size, protection, _SHARED, descriptor, 0)
    if address == _FAILED:
        raise OSError(ctypes.get_errno(), "mmap")
    # A forked child has no lease: what it sees would change under it, so it shall not see it.
    libc.madvise(address, size, _DONTFORK)
    owner = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(owner, _unmap, libc, address, size, os.getpid()).atexit = False
    memory = memoryview(owner).cast("B")
    return memory if writable else memory.toreadonly()


def _unmap(libc: Any, address: int, size: int, process: int) -> None:  # noqa: ANN401
    if os.getpid() == process:
        libc.munmap(address, size)


def populate(room: object, offset: int, size: int) -> bool:
    """Enter pages that are there into our page table, without the GIL; False where the kernel cannot (before 5.14)."""
    address = ctypes.addressof(ctypes.c_ubyte.from_buffer(room, offset))  # type: ignore[arg-type]
    return bool(_libc().madvise(address, size, _POPULATE_WRITE) == 0)


def create_segment(layout: Layout) -> tuple[int, memoryview]:
    """A new segment, its descriptor and all of it writable; only the table has memory so far. Raises OSError."""
    descriptor = os.memfd_create("tensor-fabric", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, layout.size)
        os.posix_fallocate(descriptor, 0, layout.start)
        memory = map_segment(descriptor, layout.size, writable=True)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor, memory


def check_segment(descriptor: int, layout: Layout) -> None:
    """Raise MalformedSegmentError unless the descriptor is the announced segment, and can never shrink.

    A mapping of what shrinks would end this process with SIGBUS.
    """
    try:
        status = os.fstat(descriptor)
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError as error:
        raise MalformedSegmentError(f"no memory that can be sealed: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode) or status.st_size != layout.size:
        raise MalformedSegmentError(f"{status.st_size} bytes where {layout.size} were announced")
    if not seals & fcntl.F_SEAL_SHRINK:
        raise MalformedSegmentError("a segment that may shrink")


def is_of_this_user(connection: socket.socket) -> bool:
    """Whether the process at the other end runs as the same user."""
    user = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
    return bool(user == os.geteuid())


def is_within_share(descriptor: int) -> bool:
    """Whether a descriptor that was just opened leaves enough for others. The lowest free number is always taken."""
    return descriptor < resource.getrlimit(resource.RLIMIT_NOFILE)[0] * DESCRIPTORS_SHARE


# The packets: a greeting from the reader, then segments and drops from the writer, and what is gone from the reader.

_MAGIC: Final = b"TFAR"
_VERSION: Final = 1
_GREETING: Final = struct.Struct("<4sBBHQ")
_PACKET: Final = struct.Struct("<4sBBHIIQ")
_NAME_BYTES_MAX: Final = 255


class Kind:
    """What a packet says."""

    GREETING = 1
    """The reader: its name and incarnation."""
    SEGMENT = 2
    """The writer: a segment; its descriptor travels with the packet."""
    DROP = 3
    """The writer: a segment is closed."""
    GONE = 4
    """The reader: it has no mapping of a dropped segment any more."""


def pack_greeting(name: str, incarnation: int) -> bytes:
    """The first packet of a reader. Raises ValueError for a name of more than 255 bytes."""
    encoded = name.encode()
    if len(encoded) > _NAME_BYTES_MAX:
        raise ValueError(f"a name of {len(encoded)} bytes; at most {_NAME_BYTES_MAX}")
    return _GREETING.pack(_MAGIC, _VERSION, Kind.GREETING, len(encoded), incarnation) + encoded


def unpack_greeting(packet: bytes) -> tuple[str, int]:
    """Name and incarnation. Raises MalformedSegmentError."""
    try:
        magic, version, kind, length, incarnation = _GREETING.unpack_from(packet)
        name = packet[_GREETING.size :].decode()
    except (struct.error, UnicodeDecodeError) as error:
        raise MalformedSegmentError("no greeting") from error
    if (magic, version, kind) != (_MAGIC, _VERSION, Kind.GREETING):
        raise MalformedSegmentError("no greeting of this version")
    if length != len(packet) - _GREETING.size or length > _NAME_BYTES_MAX:
        raise MalformedSegmentError("a greeting of another length")
    return name, incarnation


def pack_packet(kind: int, layout: Layout) -> bytes:
    """Any other packet."""
    return _PACKET.pack(_MAGIC, _VERSION, kind, 0, layout.number, layout.slots, layout.slot_bytes)


def unpack_packet(packet: bytes) -> tuple[int, Layout]:
    """Kind and layout, as any other packet has them. Raises MalformedSegmentError."""
    try:
        magic, version, kind, _, number, slots, slot_bytes = _PACKET.unpack(packet)
    except struct.error as error:
        raise MalformedSegmentError(f"a packet of {len(packet)} bytes") from error
    if (magic, version) != (_MAGIC, _VERSION) or kind not in (Kind.SEGMENT, Kind.DROP, Kind.GONE):
        raise MalformedSegmentError("a packet of another kind or version")
    if not 1 <= slots <= SLOTS_MAX or slot_bytes % PAGE or not SLOT_BYTES_MIN <= slot_bytes < 1 << 47:
        raise MalformedSegmentError(f"{slots} slots of {slot_bytes} bytes")
    return kind, Layout(number, slot_bytes, slots)
