"""Values on a device: where they are copied to, and by whom."""

from __future__ import annotations

from fabric.payloads import BufferPool, DeviceQueue, Pending, Plan, PooledBuffer
from fabric.payloads.staging import cuda_queue, pinned_pool

__all__ = ["Devices"]


class Devices:
    """Where values on a device are copied to, and by whom; made when the first one is published."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self.queue: DeviceQueue | None = None
        self.pool: BufferPool | None = None

    def stage(self, planned: Plan) -> tuple[PooledBuffer, Pending | None]:
        """A buffer that the value is being copied into, and what is under way. Raises `StagingError`."""
        if self.queue is None:
            self.queue, self.pool = cuda_queue(), pinned_pool(self._bytes_max)
        assert self.pool is not None, "a queue comes with its pool"
        buffer = self.pool.take(planned.size)
        try:
            return buffer, planned.start(buffer.view, self.queue)
        except BaseException:
            buffer.release()
            raise
