"""iceoryx2: shared memory without a broker.

Settings: a slice of bytes as payload, an event service beside it by which the reader is woken: polling is faster and
burns a core, we compare what is notified with what is notified. Safe overflow is off and the writer retries until
delivered, so that nothing is lost; buffers of 8 arrays or 1,024 records. Bytes are copied into the loan, as we take a
snapshot; an array is read where it lies, until the next is asked for. Its files lie in the meeting directory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import iceoryx2 as iox
import numpy as np

from perf.peers import base
from perf.peers.base import HEADER, Array, Place, await_file, tell_file

PAD = 64
"""Bytes before an array: its header, and so that it is aligned."""
SERVICE = "perf/stream"


def _open(place: Place) -> tuple[Any, Any, Any]:
    """The node, the service, and the service of its events."""
    iox.set_log_level(iox.LogLevel.Error)
    config = iox.config.default()
    config.global_cfg.prefix = iox.FileName.new(f"{place.meeting.name}_")
    config.global_cfg.root_path = iox.Path.new(str(place.meeting / "iox"))
    node = iox.NodeBuilder.new().config(config).create(iox.ServiceType.Ipc)
    name, depth = iox.ServiceName.new(SERVICE), 8 if place.size_max > 1 << 16 else 1024
    service = (
        node.service_builder(name)
        .publish_subscribe(iox.Slice[ctypes.c_uint8])
        .enable_safe_overflow(False)
        .subscriber_max_buffer_size(depth)
        .subscriber_max_borrowed_samples(4)
        .max_publishers(16)
        .max_subscribers(16)
        .open_or_create()
    )
    events = node.service_builder(name).event().max_notifiers(16).max_listeners(16).open_or_create()
    return node, service, events


class Writer(base.Writer):
    """A publisher and a notifier."""

    def open(self) -> None:
        place = self.place
        for number in range(place.readers):
            await_file(place.meeting / f"reader{number}.ready")
        self.node, self.service, events = _open(place)
        retry = iox.BackpressureStrategy.RetryUntilDelivered
        builder = self.service.publisher_builder().initial_max_slice_len(place.size_max + PAD)
        self.publisher = builder.backpressure_strategy(retry).max_loaned_samples(2).create()
        self.notifier = events.notifier_builder().create()

    def write(self, records: Iterable[bytes], *, paced: bool = False) -> None:
        loan, copy, notify = self.publisher.loan_slice_uninit, ctypes.memmove, self.notifier.notify
        for record in records:
            sample = loan(len(record))
            copy(sample.payload_ptr, record, len(record))
            sample.assume_init().send()
            notify()

    def write_arrays(self, items: Iterable[tuple[bytes, Array]]) -> None:
        for header, array in items:
            sample = self.publisher.loan_slice_uninit(PAD + array.nbytes)
            ctypes.memmove(sample.payload_ptr, header, len(header))
            ctypes.memmove(sample.payload_ptr + PAD, array.ctypes.data, array.nbytes)
            sample.assume_init().send()
            self.notifier.notify()


class Reader(base.Reader):
    """A subscriber and a listener."""

    def open(self) -> None:
        self.node, self.service, self.events = _open(self.place)
        self.subscriber = self.service.subscriber_builder().create()
        self.listener = self.events.listener_builder().create()
        self.patience = iox.Duration.from_millis(1000)
        tell_file(self.place.meeting / f"reader{self.place.number}.ready", "")

    def _samples(self, n: int) -> Iterator[Any]:
        receive, left = self.subscriber.receive, n
        while left:
            sample = receive()
            if sample is None:
                self.listener.timed_wait(self.patience)
                continue
            left -= 1
            yield sample

    def read(self, n: int) -> Iterator[bytes]:
        for sample in self._samples(n):
            payload = sample.payload()
            yield ctypes.string_at(payload.data_ptr, payload.number_of_elements)
            sample.delete()

    def read_arrays(self, sizes: Sequence[int]) -> Iterator[tuple[bytes | None, Array]]:
        for sample in self._samples(len(sizes)):
            view = np.frombuffer(sample.payload().as_memory_view(), dtype=np.uint8)
            yield view[: HEADER.size].tobytes(), view[PAD:]
            sample.delete()
