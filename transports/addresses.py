"""Where a transport may listen, and what an address from elsewhere may look like. No socket is opened here."""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transports.base import AddressError, Endpoints

__all__ = ["Site", "check_endpoint", "close_if_connected", "is_v6", "parse_listen"]

MAX_IPC_PATH = 100
"""Bytes of a socket's path. The kernel takes 107; the rest is left to whoever mounts the directory elsewhere."""

_MAX_ENDPOINT = 256
_HOST = r"(?:\[[0-9A-Fa-f:.]+(?:%[A-Za-z0-9_.-]+)?\]|[A-Za-z0-9_.-]+)"
_TCP = re.compile(rf"tcp://{_HOST}:([0-9]{{1,5}})")
_IPC = re.compile(r"ipc://(/[^\x00-\x1f\x7f]+)")


def check_endpoint(address: str) -> str:
    """The address itself, if it is one that `connect` takes: `ipc:///absolute/path` or `tcp://HOST:PORT`.

    Raises AddressError. Abstract ipc names are refused because they have no permissions (anybody may bind them).
    """
    if len(address) <= _MAX_ENDPOINT:
        tcp = _TCP.fullmatch(address)
        if tcp is not None and 0 < int(tcp.group(1)) < 65536:
            return address
        ipc = _IPC.fullmatch(address)
        if ipc is not None and len(os.fsencode(ipc.group(1))) <= 107:
            return address
    raise AddressError(f"{address[:80]!r} is no address to connect to")


def is_v6(address: str) -> bool:
    """Whether a tcp address has a literal IPv6 host."""
    return address.startswith("tcp://[")


def parse_listen(listen: str, *, wildcard: bool) -> tuple[str, int] | None:
    """Host and CONTROL port (0: any) to listen on; None for ipc.

    Raises AddressError for anything that is not `ipc`, `tcp://ADDRESS` or `tcp://ADDRESS:PORT` with a literal address,
    and for an address that means every interface unless `wildcard`.
    """
    if listen == "ipc":
        return None
    match = re.fullmatch(r"tcp://(\[[^\]]+\]|[^:\[\]]+)(?::([0-9]{1,5}))?", listen)
    if match is None or int(match.group(2) or 0) > 65535:
        raise AddressError(f"{listen[:80]!r}: listen on 'ipc', 'tcp://ADDRESS' or 'tcp://ADDRESS:PORT'")
    host, port = match.group(1), int(match.group(2) or 0)
    if host == "*":
        host = "0.0.0.0"
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError as error:
        raise AddressError(f"{host[:80]!r} is no literal address; names may resolve to more than was meant") from error
    if address.is_unspecified and not wildcard:
        raise AddressError(
            f"{listen!r} listens on every interface; name one, or allow it with SocketLimits(wildcard=True)"
        )
    return (f"[{address}]" if address.version == 6 else str(address)), port


@dataclass(slots=True)
class Site:
    """Where one transport binds: its addresses, and the files that it leaves to remove."""

    addresses: Endpoints
    files: tuple[Path, ...] = ()
    directory: Path | None = None
    """Set if the directory was made for this transport alone and goes with it."""

    @classmethod
    def choose(cls, listen: str, directory: Path | None, name: str, *, wildcard: bool) -> Site:
        """Decide where to bind. Makes the directory for ipc. Raises AddressError."""
        tcp = parse_listen(listen, wildcard=wildcard)
        if tcp is not None:
            host, port = tcp
            return cls(Endpoints(f"tcp://{host}:0", f"tcp://{host}:{port}", f"tcp://{host}:0"))
        own = directory is None
        home = Path(tempfile.mkdtemp(prefix="fabric-")) if directory is None else private_directory(directory)
        try:
            return cls._in_directory(home, name, own)
        except AddressError:
            if own:
                shutil.rmtree(home, ignore_errors=True)
            raise

    @classmethod
    def _in_directory(cls, home: Path, name: str, own: bool) -> Site:
        # Hashed, because a name may be long or strange; salted, because binding silently takes over an existing file.
        stem = hashlib.blake2b(name.encode() + secrets.token_bytes(16), digest_size=8).hexdigest()
        data, control, bulk = files = tuple(home.absolute() / f"{stem}.{kind}" for kind in "dcb")
        if len(os.fsencode(data)) > MAX_IPC_PATH:
            raise AddressError(
                f"the path of {str(home)[:80]!r} is too long for sockets; at most {MAX_IPC_PATH - 19} bytes"
            )
        for file in files:
            check_endpoint(f"ipc://{file}")
        return cls(Endpoints(f"ipc://{data}", f"ipc://{control}", f"ipc://{bulk}"), files, home if own else None)

    def clear(self) -> None:
        """Remove the socket files, and the directory if it was made for them."""
        for file in self.files:
            file.unlink(missing_ok=True)
        if self.directory is not None:
            shutil.rmtree(self.directory, ignore_errors=True)


def private_directory(directory: Path) -> Path:
    """The directory, made if need be, if it belongs to this user alone.

    Raises AddressError for a symbolic link, another owner, or access for others: whoever may write there can take over
    a member's addresses, and whoever may connect can exhaust its descriptors.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.lstat()
    except OSError as error:
        raise AddressError(f"no directory for sockets at {str(directory)[:80]!r}: {error.strerror}") from error
    if not stat.S_ISDIR(status.st_mode):
        raise AddressError(f"{str(directory)[:80]!r} is no directory of its own (a link, perhaps)")
    if status.st_uid != os.geteuid():
        raise AddressError(f"{str(directory)[:80]!r} belongs to another user")
    if status.st_mode & 0o077:
        raise AddressError(f"{str(directory)[:80]!r} is open to others; it needs mode 0700")
    return directory


def close_if_connected(descriptor: int, addresses: set[str]) -> None:
    """Close a descriptor if it is a socket at, or to, one of the addresses."""
    try:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            return
        handle = socket.socket(fileno=descriptor)
    except OSError:
        return
    names = set()
    for name in (handle.getsockname, handle.getpeername):
        with contextlib.suppress(OSError):
            names.add(_spelled(name()))
    if names & addresses:
        handle.close()
    else:
        handle.detach()


def _spelled(name: Any) -> str:  # noqa: ANN401 - the address tuple of any socket family
    if isinstance(name, tuple) and len(name) >= 2:
        return f"tcp://[{name[0]}]:{name[1]}" if ":" in str(name[0]) else f"tcp://{name[0]}:{name[1]}"
    return f"ipc://{name}"
