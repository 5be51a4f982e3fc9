"""What does a partition cost a stream, and how soon is its subscriber level again?

Two network namespaces, joined by a veth pair, are two hosts with a cable that can be pulled. A publisher sends records
of 4 KiB at 20,000 a second (80 MB/s) to one subscriber over tcp. Then the link goes down, stays down, and comes up
again, while the publisher goes on. Level is the subscriber again when what it receives was published less than 0.2 s
ago.

What is owed meanwhile goes to disk. After the outage the subscriber pulls it from there, beside the stream, at the
*drain rate*: bytes a second from the first record after the outage until it is level. Needs root and iproute2.

Envelope: 30 s are 2.4 GB. Where nothing else limits, they are read back at the rate of tensors over tcp; TCP itself
finds out late that the link is back: its pauses double with each failed try.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from perf.harness import main
from perf.report import Budget, Report, Row

RECORD, RATE, LANES = 4096, 20_000, 8
LEVEL_S, BEFORE_S, AFTER_S, GIVE_UP_S = 0.2, 4.0, 3.0, 120.0
NEAR, FAR = f"tf-{os.getpid()}-a", f"tf-{os.getpid()}-b"
HOSTS = {NEAR: "10.77.0.1", FAR: "10.77.0.2"}
"""Addresses by namespace; another run has others of the same addresses."""
DEVICE = "cable"
MIB = 1024 * 1024


def reason_to_skip() -> str | None:
    """Why there can be no namespaces here."""
    if os.geteuid() != 0:
        return "needs root"
    if not shutil.which("ip"):
        return "needs iproute2"
    try:
        _ip("netns", "add", NEAR)
        _ip("netns", "del", NEAR)
    except subprocess.CalledProcessError:
        return "may make no network namespaces here"
    return None


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextmanager
def namespaces() -> Iterator[None]:
    """Two hosts and a cable."""
    with ExitStack() as stack:
        for name in HOSTS:
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "del", name)
        _ip("link", "add", DEVICE, "netns", NEAR, "type", "veth", "peer", "name", DEVICE, "netns", FAR)
        for name, address in HOSTS.items():
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", DEVICE)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", DEVICE, "up")
        yield


class Side:
    """A process in a namespace; lines of JSON come from it."""

    def __init__(self, host: str, what: str, meeting: Path) -> None:
        command = ["ip", "netns", "exec", host, sys.executable, "-m", "perf.bench_outage", "--side", what]
        self.process = subprocess.Popen(
            [*command, "--meeting", str(meeting), "--address", HOSTS[host]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def tell(self) -> None:
        """Go on."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")

    def hear(self) -> dict[str, Any]:
        """What it says next."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a side ended with {self.process.wait()}")
        return dict(json.loads(line))

    def end(self) -> None:
        with self.process as process:  # which closes its pipes
            process.kill()


def _resident(key: str) -> int:
    """Bytes, from proc(5): `VmRSS` now, `VmHWM` at most."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def _say(**fields: Any) -> None:  # noqa: ANN401
    print(json.dumps(fields), flush=True)


def _enter(arguments: argparse.Namespace, rank: int) -> Any:  # noqa: ANN401 - a fabric
    from fabric import join
    from fabric.config import FabricConfig, Spill

    spill = Spill(directory=arguments.meeting / "disk", bytes_max=32 << 30)
    config = FabricConfig(listen=f"tcp://{arguments.address}", spill=spill)
    return join(config, rank=rank, world_size=2, rendezvous=f"file://{arguments.meeting}", job="outage")


def publish(arguments: argparse.Namespace) -> None:
    """At its pace until a line comes in."""
    import select

    with _enter(arguments, 0) as fabric:
        publisher = fabric.publisher("outage.records")
        publisher.wait_for_subscribers(1, timeout_s=30)
        filling, sent, longest = bytes(RECORD - 8), 0, 0.0
        base, began = _resident("VmRSS"), time.monotonic()
        _say(flows=True)
        while not select.select([sys.stdin], [], [], 0)[0]:
            for _ in range(RATE // 500):
                now = time.monotonic_ns()
                publisher.publish(now.to_bytes(8, "little") + filling, seed=sent % LANES)
                longest = max(longest, (time.monotonic_ns() - now) / 1e6)
                sent += 1
            time.sleep(max(0.0, began + sent / RATE - time.monotonic()))
        seconds = time.monotonic() - began
        publisher.flush(timeout_s=60)
        counts = fabric.statistics()
        _say(
            sent=sent,
            rate=sent / seconds,
            longest_ms=longest,
            waited=counts.get("publish_waited", 0),
            spilled=counts.get("bursts_spilled", 0),
            grown_mib=(_resident("VmHWM") - base) / MIB,
        )


def subscribe(arguments: argparse.Namespace) -> None:
    """Everything; says when it began to lag and when it was level again."""
    with _enter(arguments, 1) as fabric, fabric.subscribe("outage.**") as inbox:
        lanes, received, ordered, late, first_ns = [0] * LANES, 0, True, 0, 0
        for message in inbox:
            ordered &= message.sequence == lanes[message.seed]
            lanes[message.seed] = message.sequence + 1
            received += 1
            if received % 64:
                continue
            now = time.monotonic_ns()
            lag_s = (now - int.from_bytes(message.value[:8], "little")) / 1e9
            if lag_s > 1.0 and not first_ns:
                first_ns, late = now, received
            elif lag_s < LEVEL_S and first_ns:
                drained = (received - late) * RECORD / ((now - first_ns) / 1e9)
                _say(first_ns=first_ns, level_ns=now, drained=drained)
                first_ns = 0
        _say(received=received, ordered=ordered, gaps=len(inbox.gaps))


def outage(seconds: float, *, before_s: float = BEFORE_S, after_s: float = AFTER_S) -> dict[str, Any]:
    """One outage of so many seconds."""
    with ExitStack() as stack:
        stack.enter_context(namespaces())
        meeting = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tf-outage-")))
        publisher, subscriber = (Side(NEAR, "publish", meeting), Side(FAR, "subscribe", meeting))
        for side in (publisher, subscriber):
            stack.callback(side.end)
        publisher.hear()
        time.sleep(before_s)
        _ip("-n", FAR, "link", "set", DEVICE, "down")
        time.sleep(seconds)
        _ip("-n", FAR, "link", "set", DEVICE, "up")
        healed_ns = time.monotonic_ns()
        level = subscriber.hear()
        time.sleep(after_s)
        publisher.tell()
        sent, got = publisher.hear(), subscriber.hear()
    if (got["received"], got["ordered"], got["gaps"]) != (sent["sent"], True, 0):
        raise RuntimeError(f"not all arrived in order: {sent}, {got}")
    level_s = (level["level_ns"] - healed_ns) / 1e9
    first_s = (level["first_ns"] - healed_ns) / 1e9
    return {**sent, **got, "first_s": first_s, "level_s": level_s, "drained": level["drained"]}


def run(arguments: argparse.Namespace) -> Report:
    report, why = Report(), reason_to_skip()
    if why:
        print(f"bench_outage: skipped, {why}", file=sys.stderr)
        return report
    seconds = 4.0 if arguments.quick else 30.0
    told = outage(seconds)
    case = f"{seconds:.0f} s, 4 KiB at 20,000/s"
    bounds = [Budget(30, peer="", at_most=True)]
    level = Row("outage", f"{case}: level after", "s", {"fabric": [told["level_s"]]}, bounds)
    level.notes["fabric"] = told
    drain = Row("outage", f"{case}: drain rate", "MB/s", {"fabric": [told["drained"] / 1e6]})
    blocked = Row("outage", f"{case}: longest publish", "ms", {"fabric": [told["longest_ms"]]})
    report.rows += [level, drain, blocked]
    return report


def _side() -> bool:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--side", choices=["publish", "subscribe"])
    parser.add_argument("--meeting", type=Path)
    parser.add_argument("--address")
    arguments, _ = parser.parse_known_args()
    if arguments.side:
        {"publish": publish, "subscribe": subscribe}[arguments.side](arguments)
    return bool(arguments.side)


if __name__ == "__main__" and not _side():
    main(__doc__, run)
