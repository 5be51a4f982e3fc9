"""How long does a round trip of 256 bytes take, when the responder waits in `serve()`?

Envelope: two wake-ups (a thread sleeping in epoll, 5-20 us each), two sends, two receives. Raw pyzmq: about 50 us on a
quiet machine and twice that on a loaded one, nearly all of it wake-ups of its IO threads.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from perf.harness import Budget, Contestant, Report, Row, compete, main, measured, teams
from perf.members import enter

METHOD = "perf.echo"


class FabricRequester:
    def __init__(self, *, rank: int, meeting: Path) -> None:
        self.rank, self.meeting = rank, meeting

    def open(self) -> None:
        self.fabric = enter(rank=self.rank, world_size=2, meeting=self.meeting, handlers="step")

    def run(self, *, n: int, size: int) -> dict[str, Any]:
        times, request, clock = [], self.fabric.request, time.monotonic_ns
        for sequence in range(n):
            question = sequence.to_bytes(8, "little") + b"x" * (size - 8)
            start = clock()
            reply = request(METHOD, question, to=1)
            times.append(clock() - start)
            if reply.value != question:
                raise ValueError(f"answer {sequence} is not its question")
        return {"round_trips_ns": times}

    def close(self) -> None:
        self.fabric.close()


class FabricResponder:
    def __init__(self, *, rank: int, meeting: Path) -> None:
        self.rank, self.meeting, self.answered = rank, meeting, 0

    def open(self) -> None:
        self.fabric = enter(rank=self.rank, world_size=2, meeting=self.meeting, handlers="step")

        @self.fabric.respond(METHOD)
        def echo(request: Any) -> Any:  # noqa: ANN401
            self.answered += 1
            return request.value

    def run(self, *, n: int, size: int) -> dict[str, Any]:
        wanted = self.answered + n
        while self.answered < wanted:
            # Short, because `serve` waits its time out even when the last request has come.
            self.fabric.serve(timeout_s=0.2)
        return {}

    def close(self) -> None:
        self.fabric.close()


def run(arguments: argparse.Namespace) -> Report:
    n, size = 300 if arguments.quick else 3000, 256
    contestants = [Contestant("raw", ("perf.raw:Requester", "perf.raw:Responder"))]
    if not arguments.raw_only:
        sides = ("perf.bench_request:FabricRequester", "perf.bench_request:FabricResponder")
        contestants.insert(0, Contestant("fabric", sides))
    with teams(contestants) as players:
        answers = compete(players, {"n": n, "size": size}, rounds=arguments.rounds)
    seen = measured(answers, lambda sides: median(sides[0]["round_trips_ns"]) / 1e3)
    tails = measured(answers, lambda sides: quantiles(sides[0]["round_trips_ns"], n=100)[98] / 1e3)
    row = Row("request", f"{size} B round trip, serve()", "us", seen, Budget(2.0, 1.5, at_most=True))
    row.notes["p99_us"] = {name: median(rounds) for name, rounds in tails.items()}
    return Report([row])


if __name__ == "__main__":
    main(__doc__, run)
