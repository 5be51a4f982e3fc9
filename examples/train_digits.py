"""Two ranks train a network with dormant seeds, and talk about it through the fabric while they do.

    torchrun --standalone --nproc-per-node 2 examples/train_digits.py

Every step, every rank publishes the health of each layer, a tensor of (seeds, metrics), on `layers.<name>.health`. A
controller on rank 0 hears all of it, finds layers that stopped improving, and asks all ranks to open, graft or cull a
seed, which all do at the same step. First the same network trains from the same start without growing, so that there is
something to compare with. The result is whatever it is.

`digits/model.py` has the network, `digits/controller.py` the criterion and the proof that no rank is ever late.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from digits.controller import METHOD, Controller, Schedule, Transition
from digits.meter import Meter, Witness
from digits.model import SeededNet
from digits.model import digits as load_digits
from digits.report import Ticker, plot, show, write_json
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fabric import join

BATCH = 32
"""Images of one rank in one step."""

LEARNING_RATE = 3e-3
EVALUATE_EVERY = 20


@dataclass(slots=True)
class Run:
    """What one training run showed on one rank."""

    accuracy: list[tuple[int, float]] = field(default_factory=list)
    traffic: list[int] = field(default_factory=list)
    transitions: list[Transition] = field(default_factory=list)
    step_ns: int = 0
    steps: int = 0


class Talk:
    """All that a rank says and hears during training. The fabric's share of a step is what `meter` shows."""

    def __init__(self, fabric: Any, model: SeededNet, rank: int, ranks: int) -> None:  # noqa: ANN401
        self.fabric, self.layers, self.ranks = fabric, model.layers, ranks
        self.meter, self.schedule = Meter(), Schedule()
        self.published = self.published_bytes = self.health_bytes = 0
        self.applied: list[Transition] = []
        fabric.respond(METHOD)(lambda request: self.schedule.accept(request.value))
        self.witness = Witness(fabric, self.meter)
        self.controller = Controller(fabric, self.layers, ranks, self.meter) if rank == 0 else None
        self.reports = fabric.subscribe("run.report") if rank == 0 else None
        # Nobody trains before everybody listens.
        dist.barrier()

    def begin(self, step: int) -> None:
        """Apply what is due, and tell it on the seed's own lane."""
        for transition in self.schedule.begin(step):
            self.layers[transition.layer].move(transition.seed, transition.state)
            self.applied.append(transition)
            topic, plain = f"layers.{transition.layer}.transition", transition.to_plain()
            with self.meter:
                self.fabric.publish(topic, plain, seed=transition.seed, metadata={"step": step})
            self.published += 1

    def before_backward(self, step: int) -> None:
        """Rank 0 concludes about the step before."""
        if self.controller is not None:
            self.controller.conclude(step - 1)

    def end(self, step: int, loss: Tensor) -> int:
        """Publish the health of this step and take what is here; how many messages that was."""
        healths = {name: layer.health(loss) for name, layer in self.layers.items()}
        with self.meter:
            for name, health in healths.items():
                self.fabric.publish(f"layers.{name}.health", health, metadata={"step": step})
            self.fabric.step(step)
        self.published += len(healths)
        self.published_bytes += sum(health.nbytes for health in healths.values())
        self.health_bytes = self.published_bytes // ((step + 1) * len(healths))
        if self.controller is not None:
            self.controller.take()
        return self.witness.take()

    def report(self, rank: int, run: Run) -> dict[str, Any]:
        """This rank's account, after it has heard all that was said."""
        health = self.ranks * len(self.layers) * run.steps
        missing = self.witness.wait_for(health + self.ranks * len(self.applied), timeout_s=20)
        if self.controller is not None:
            self.controller.finish()
        return {
            "rank": rank,
            "published": self.published,
            "published_bytes": self.published_bytes,
            "received": self.witness.received,
            "received_bytes": self.witness.healths * self.health_bytes,
            "lanes": self.witness.lanes,
            "out_of_order": self.witness.broken,
            "missing": missing,
            "late": self.schedule.late,
            "fabric_ns": self.meter.spent_ns,
            "waited_ns": self.controller.waited_ns if self.controller is not None else 0,
            "step_ns": run.step_ns,
            "applied": [transition.to_plain() for transition in self.applied],
        }

    def exchange(self, report: dict[str, Any]) -> list[dict[str, Any]]:
        """The reports of all ranks, on rank 0; nothing elsewhere."""
        self.fabric.publish("run.report", report)
        heard = []
        if self.reports is not None:
            heard = [self.reports.receive(timeout_s=30).value for _ in range(self.ranks)]
            self.reports.drain()
        # Nobody leaves before all is heard.
        dist.barrier()
        return sorted(heard, key=lambda account: account["rank"])


def train(
    arguments: argparse.Namespace,
    rank: int,
    ranks: int,
    tick: Callable[[int], None],
    fabric: Any = None,  # noqa: ANN401
) -> tuple[Run, Talk | None]:
    """One run from the start that `--seed` gives; with a fabric it grows, without it does not."""
    torch.manual_seed(arguments.seed)
    model = SeededNet()
    images, labels, test_images, test_labels = load_digits(arguments.seed)
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(parallel.parameters(), lr=LEARNING_RATE)
    order = torch.Generator().manual_seed(arguments.seed)
    talk = Talk(fabric, model, rank, ranks) if fabric is not None else None
    run = Run(steps=arguments.steps)
    for step in range(arguments.steps):
        start = time.perf_counter_ns()
        if talk is not None:
            talk.begin(step)
        mine = torch.randint(len(images), (ranks, BATCH), generator=order)[rank]
        loss = nn.functional.cross_entropy(parallel(images[mine]), labels[mine])
        if talk is not None:
            talk.before_backward(step)
        _improve(model, optimizer, loss)
        if talk is not None:
            run.traffic.append(talk.end(step, loss.detach()))
        run.step_ns += time.perf_counter_ns() - start
        if rank == 0 and (step % EVALUATE_EVERY == 0 or step == arguments.steps - 1):
            run.accuracy.append((step, _accuracy(model, test_images, test_labels)))
        tick(step)
    return run, talk


def _improve(model: SeededNet, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Backward, mask, step."""
    optimizer.zero_grad(set_to_none=False)
    loss.backward()  # type: ignore[no-untyped-call]  # torch does not type it
    for layer in model.layers.values():
        layer.mask_gradients()
    optimizer.step()


@torch.no_grad()
def _accuracy(model: SeededNet, images: Tensor, labels: Tensor) -> float:
    """Share of the held-out images that are recognised."""
    return (model(images).argmax(1) == labels).float().mean().item()


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train digits with dormant seeds; run it with torchrun.")
    parser.add_argument("--seed", type=int, default=0, help="of the data's split, the start and the batches")
    parser.add_argument("--steps", type=int, default=1200, help="of each of the two runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="directory of the plot")
    parser.add_argument("--json", type=Path, help="also write what was found to this file")
    parser.add_argument("--no-plot", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Both runs, then the table and the plot on rank 0."""
    arguments = parse()
    # Two ranks on two cores: a second thread each would only get in the way.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    with Ticker(2 * arguments.steps) if rank == 0 else nullcontext(lambda _what, _step: None) as tick:
        plain, _ = train(arguments, rank, ranks, lambda step: tick("without growth", step))
        with join() as fabric:
            grown, talk = train(arguments, rank, ranks, lambda step: tick("with growth", step), fabric)
            assert talk is not None
            reports = talk.exchange(talk.report(rank, grown))
    if rank == 0:
        result = {
            "seed": arguments.seed,
            "steps": arguments.steps,
            "ranks": ranks,
            "accuracy": {"without": plain.accuracy, "with": grown.accuracy},
            "traffic": grown.traffic,
            "step_ns_without": plain.step_ns,
            "transitions": [transition.to_plain() for transition in talk.applied],
            "reports": reports,
        }
        show(result)
        if arguments.json:
            write_json(result, arguments.json)
        if not arguments.no_plot:
            print(f"plot: {plot(result, arguments.out)}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
