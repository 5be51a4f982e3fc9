"""Where and with what the numbers were seen."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["fingerprint"]

NAMES = (
    "tensor-fabric",
    "pyzmq",
    "numpy",
    "torch",
    "msgpack",
    "xxhash",
    "eclipse-zenoh",
    "iceoryx2",
    "nats-py",
    "redis",
    "hiredis",
)
SETTINGS = {
    "wmem": "/proc/sys/net/ipv4/tcp_wmem",
    "rmem": "/proc/sys/net/ipv4/tcp_rmem",
    "wmem_max": "/proc/sys/net/core/wmem_max",
    "rmem_max": "/proc/sys/net/core/rmem_max",
    "wmem_default": "/proc/sys/net/core/wmem_default",
    "transparent_hugepages": "/sys/kernel/mm/transparent_hugepage/enabled",
    "shmem_hugepages": "/sys/kernel/mm/transparent_hugepage/shmem_enabled",
    "governor": "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor",
}
"""What else decides how fast bytes travel; left out where it cannot be read."""


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _program(*command: str) -> str | None:
    """The first line that a program says, or None where it is missing."""
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return said.strip().partition("\n")[0]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _settings() -> dict[str, str]:
    found = {}
    for name, path in SETTINGS.items():
        try:
            found[name] = " ".join(Path(path).read_text(encoding="ascii").split())
        except OSError:
            continue
    return found


def fingerprint() -> dict[str, Any]:
    """Versions, processor, load, settings of the kernel, and the commit."""
    import zmq

    servers = {"redis-server": _program("redis-server", "--version"), "nats-server": _program("nats-server", "-v")}
    return {
        "versions": {name: _version(name) for name in NAMES} | {"libzmq": zmq.zmq_version()} | servers,
        "python": sys.version.split()[0],
        "kernel": platform.release(),
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load": os.getloadavg(),
        **_settings(),
        "commit": _program("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"),
    }
