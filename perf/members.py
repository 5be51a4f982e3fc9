"""How a benchmark's process enters a fabric: the one place that knows about rendezvous, links and settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["enter"]


def enter(*, rank: int, world_size: int, meeting: Path, link: str = "ipc", handlers: str = "thread") -> Any:  # noqa: ANN401
    """Join the job that meets in this directory.

    `link`: `ipc`, or `tcp` to let members of one host talk as two hosts would, which share no memory.
    `handlers`: `thread` or `step`.
    """
    from fabric import join
    from fabric.config import Arena, FabricConfig, Handlers, Retention, Work

    config = FabricConfig(
        listen="tcp://127.0.0.1" if link == "tcp" else "ipc",
        arena=Arena(enabled=link != "tcp"),
        work=Work(handlers=Handlers(handlers)),
        # Four of the largest tensors, as many as the raw peer's high-water mark lets in.
        retention=Retention(owed_bytes_max=1 << 30),
    )
    return join(config, rank=rank, world_size=world_size, rendezvous=f"file://{meeting}")
