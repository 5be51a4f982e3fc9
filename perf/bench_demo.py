"""What does the fabric take from a step of `make demo`, a training step of a few milliseconds?

Two ranks train the demo's network with DistributedDataParallel over gloo. Every step each publishes the health of both
layers, float32 of (4, 6), and takes what is here; both hear both ranks: two records out and four in. Counted is the
wall time of these calls on the training thread. `raw` does the same with a PUB and a SUB: one frame a record, nothing
acknowledged, repaired or checked.

Envelope: a step evicts what the step before left in the caches, and every call begins cold. Warm, raw pyzmq needs 2 us
to send and 1.5 us to receive a small frame; between these steps some ten times as much.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import mean
from typing import Any

from perf.harness import Answers, Contestant, compete, main, measured, teams
from perf.members import enter
from perf.peers.pyzmq_work import RawMesh
from perf.report import Budget, Report, Row

RANKS, BATCH = 2, 32


class FabricTalk:
    def __init__(self, rank: int, meeting: Path, layers: list[str]) -> None:
        self.fabric = enter(rank=rank, world_size=RANKS, meeting=meeting)
        self.inbox = self.fabric.subscribe("layers.**.health")
        self.topics = [f"layers.{layer}.health" for layer in layers]

    def exchange(self, healths: list[Any], step: int) -> int:
        """Publish all of them, then take what is here: how many messages."""
        for topic, health in zip(self.topics, healths, strict=True):
            self.fabric.publish(topic, health, metadata={"step": step})
        self.fabric.step(step)
        return sum(message.value.ndim == 2 for message in self.inbox.drain())

    def close(self) -> None:
        self.fabric.close()


class RawTalk:
    def __init__(self, rank: int, meeting: Path, layers: list[str]) -> None:
        self.mesh = RawMesh(rank=rank, meeting=meeting, ranks=RANKS, topics=len(layers))
        self.mesh.open(True)
        self.mesh.await_listeners(RANKS)

    def exchange(self, healths: list[Any], step: int) -> int:
        for layer, health in enumerate(healths):
            self.mesh.publish(layer, health.numpy())
        return self.mesh.drain()

    def close(self) -> None:
        self.mesh.close()


class Rank:
    """A rank that trains on random digits and talks."""

    def __init__(self, *, rank: int, meeting: Path, library: str) -> None:
        self.rank, self.meeting, self.library = rank, meeting, library
        self.step = 0

    def open(self) -> None:
        import torch
        from torch import distributed
        from torch.nn.parallel import DistributedDataParallel

        from examples.digits.model import SeededNet

        torch.set_num_threads(1)
        torch.manual_seed(0)
        place = f"file://{self.meeting}/gloo"
        distributed.init_process_group("gloo", init_method=place, rank=self.rank, world_size=RANKS)
        self.model = SeededNet()
        self.parallel = DistributedDataParallel(self.model)
        self.optimizer = torch.optim.Adam(self.parallel.parameters())
        self.images, self.labels = torch.rand(1024, 64), torch.randint(10, (1024,))
        self.talk = (FabricTalk if self.library == "fabric" else RawTalk)(
            self.rank, self.meeting, list(self.model.layers)
        )
        distributed.barrier()

    def run(self, *, steps: int) -> dict[str, Any]:
        calls_ns = taken = 0
        start = time.monotonic_ns()
        for _ in range(steps):
            loss = self._train()
            healths = [layer.health(loss) for layer in self.model.layers.values()]
            began = time.monotonic_ns()
            taken += self.talk.exchange(healths, self.step)
            calls_ns += time.monotonic_ns() - began
            self.step += 1
        return {"calls_us": calls_ns / steps / 1e3, "step_us": (time.monotonic_ns() - start) / steps / 1e3}

    def _train(self) -> Any:  # noqa: ANN401 - a tensor
        import torch

        mine = torch.randint(len(self.images), (BATCH,))
        loss = torch.nn.functional.cross_entropy(self.parallel(self.images[mine]), self.labels[mine])
        self.optimizer.zero_grad(set_to_none=False)
        loss.backward()
        for layer in self.model.layers.values():
            layer.mask_gradients()
        self.optimizer.step()
        return loss.detach()

    def close(self) -> None:
        from torch import distributed

        self.talk.close()
        distributed.destroy_process_group()


def run(arguments: argparse.Namespace) -> Report:
    contestants = [
        Contestant(library, ("perf.bench_demo:Rank",) * RANKS, {"library": library})
        for library in (["raw"] if arguments.raw_only else ["fabric", "raw"])
    ]
    with teams(contestants) as players:
        answers = compete(players, {"steps": 50 if arguments.quick else 300}, rounds=arguments.rounds)

    def calls_us(ranks: Answers) -> float:
        return mean(rank["calls_us"] for rank in ranks)

    row = Row(
        "demo", "calls of a step, two ranks", "us", measured(answers, calls_us), [Budget(150, peer="", at_most=True)]
    )
    for name, rounds in answers.items():
        row.notes[name] = {"step_us": mean(rank["step_us"] for ranks in rounds for rank in ranks)}
    return Report([row])


if __name__ == "__main__":
    main(__doc__, run)
