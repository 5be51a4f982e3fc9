"""A cable that is pulled: two network namespaces, a stream over tcp, a link that goes down and comes up again."""

from __future__ import annotations

import pytest

from fabric.config import BURST_BYTES_MAX, Retention
from perf.bench_outage import outage, reason_to_skip
from tests.harness.figures import show
from transports.base import SocketLimits

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

MIB = 1024 * 1024
SKIPPED = reason_to_skip()


@pytest.mark.timeout(120)
@pytest.mark.skipif(SKIPPED is not None, reason=f"network namespaces: {SKIPPED}")
def test_f11_a_partition_loses_nothing_and_holds_nobody_back() -> None:
    # TCP tries again 0.2, 0.6, 1.4, 3.0 and 6.2 s after the first loss: up at 2.8 s, it finds out at once.
    told = outage(2.8, before_s=0.5, after_s=0.5)  # which raises unless all arrive, each lane in order, without a gap
    show(f"partition of 2.8 s: {told}")
    assert told["spilled"] > 0
    assert told["waited"] == 0, "the publisher was held back"
    queue = SocketLimits().data_frames * BURST_BYTES_MAX
    bound = (queue + Retention().owed_bytes_max + Retention().kept_bytes_max) * 5 // 4 + 64 * MIB
    assert told["grown_mib"] * MIB <= bound
