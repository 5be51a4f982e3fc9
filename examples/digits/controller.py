"""Who decides when seeds germinate, are grafted or culled, and how all ranks do it at the same step.

**The criterion**, in integers, so that the same health gives the same decisions on every machine:
a layer's *signal* (see `METRICS`) and the loss are turned into integers (units of 2**-20) rank by rank and step by
step, and summed over all ranks and the `WINDOW` steps of a window. At the last step of each window

1. if no seed is on probation, and the loss is more than 85/100 of that of the window before, a layer *stopped
   improving* when its signal is more than 98/100 of that of the window before. Of those that have a dormant seed, the
   one whose signal fell least germinates its lowest one: one at a time, so that what follows can be put down to it;
2. a seed that trained for `PROBATION` windows is grafted if the loss is now lower than the pace before its germination
   would have made it, else it is culled. With losses a, b of the last two windows before and a pace of
   q = min(b / a, 1) a window, that is loss < b * q ** PROBATION; multiplied out, so that it stays exact.

Decisions about step s depend on the health of steps <= s alone, never on when a message came: the judge waits until it
has the health of step s from all ranks.

**Why effective_step = s + 2 is never late.** Rank 0 concludes about step s between its forward and its backward of step
s + 1, and goes on only when every rank has accepted. No rank leaves the backward of s + 1 before rank 0 has entered it,
since DistributedDataParallel sums the gradients of all inside. So every rank has accepted before it begins step s + 2.
And rank 0 waits for nothing that waits for rank 0: the health of step s is published before a rank enters step s + 1.
A rank verifies it all the same: it refuses what comes too late, and the run ends with that error.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from digits.meter import Meter
from digits.model import METRICS, SEEDS, STATES

__all__ = ["Controller", "Judge", "Schedule", "Transition"]

WINDOW = 40
"""Steps: about two epochs."""

PROBATION = 3
"""Windows that a seed trains before it is judged."""

UNIT = 1 << 20
LEAD = 2
"""effective_step - step; see the module's proof."""

METHOD = "seeds.transition"
LOSS, SIGNAL = METRICS.index("loss"), METRICS.index("signal")


@dataclass(frozen=True, slots=True)
class Transition:
    """A seed goes into another state when all ranks begin `effective_step`; decided on the health up to `step`."""

    step: int
    effective_step: int
    layer: str
    seed: int
    state: str

    def to_plain(self) -> dict[str, Any]:
        """As a value that travels."""
        return {name: getattr(self, name) for name in self.__slots__}


class Judge:
    """Health in, decisions out; no clock, no messages, no floating point in a comparison."""

    def __init__(self, layers: Iterable[str], ranks: int) -> None:
        self._layers, self._ranks = sorted(layers), ranks
        self._heard: dict[int, int] = defaultdict(int)
        self._signals: dict[tuple[str, int], int] = defaultdict(int)
        self._losses: dict[int, int] = defaultdict(int)
        self._states = {layer: ["dormant"] * SEEDS for layer in self._layers}
        self._probation: tuple[str, int, int] | None = None
        """Layer, seed and the window in which it was decided."""

    def hear(self, layer: str, step: int, health: Any) -> None:  # noqa: ANN401 - a tensor of shape (seeds, metrics)
        """Take the health of one layer of one rank."""
        window = step // WINDOW
        self._heard[step] += 1
        self._signals[layer, window] += round(float(health[0, SIGNAL]) * UNIT)
        self._losses[window] += round(float(health[0, LOSS]) * UNIT)

    def is_complete(self, step: int) -> bool:
        """Whether all layers of all ranks told their health of this step."""
        return self._heard[step] == self._ranks * len(self._layers)

    @staticmethod
    def is_boundary(step: int) -> bool:
        """Whether something may be decided about this step."""
        return step % WINDOW == WINDOW - 1

    def decide(self, step: int) -> list[Transition]:
        """The transitions that follow from the health up to this step, a boundary."""
        window = step // WINDOW
        moves = self._judge_probation(window) or self._germinate(window)
        for layer, seed, state in moves:
            self._states[layer][seed] = state
        return [Transition(step, step + LEAD, *move) for move in moves]

    def _judge_probation(self, window: int) -> list[tuple[str, int, str]]:
        if self._probation is None:
            return []
        layer, seed, since = self._probation
        if window - since < PROBATION:
            return []
        self._probation = None
        before, at = self._losses[since - 1], self._losses[since]
        helped = self._losses[window] * before**PROBATION < at * min(at, before) ** PROBATION
        return [(layer, seed, "grafted" if helped else "culled")]

    def _germinate(self, window: int) -> list[tuple[str, int, str]]:
        if self._probation is not None or window == 0 or 100 * self._losses[window] <= 85 * self._losses[window - 1]:
            return []
        stalled = [
            (self._signals[layer, window] * 1000 // max(1, self._signals[layer, window - 1]), layer)
            for layer in self._layers
            if "dormant" in self._states[layer]
            and 100 * self._signals[layer, window] > 98 * self._signals[layer, window - 1]
        ]
        if not stalled:
            return []
        layer = max(stalled)[1]
        seed = self._states[layer].index("dormant")
        self._probation = (layer, seed, window)
        return [(layer, seed, "training")]


class Schedule:
    """What a rank was asked to do at coming steps. Requests come on the fabric's thread, steps on the trainer's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._step = -1
        self._due: dict[int, list[Transition]] = {}
        self.late = 0

    def accept(self, asked: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Take transitions for coming steps, or none of them if the step of one has begun."""
        transitions = [Transition(**plain) for plain in asked]
        if unknown := {transition.state for transition in transitions} - set(STATES):
            raise ValueError(f"no such state: {sorted(unknown)}")
        with self._lock:
            if any(transition.effective_step <= self._step for transition in transitions):
                self.late += 1
                return {"accepted": False, "step": self._step}
            for transition in transitions:
                self._due.setdefault(transition.effective_step, []).append(transition)
            return {"accepted": True, "step": self._step}

    def begin(self, step: int) -> list[Transition]:
        """This step begins; what is due."""
        with self._lock:
            self._step = step
            return self._due.pop(step, [])


class Controller:
    """Listens to all health and asks all ranks for transitions. Lives on rank 0, on the training thread."""

    def __init__(self, fabric: Any, layers: Iterable[str], ranks: int, meter: Meter) -> None:  # noqa: ANN401
        self._fabric, self._ranks, self._meter = fabric, ranks, meter
        self._waited = Meter()
        self._inbox = fabric.subscribe("layers.**.health")
        self._judge = Judge(layers, ranks)
        self.transitions: list[Transition] = []

    @property
    def waited_ns(self) -> int:
        """Wall time in which `conclude` waited for health: mostly for other ranks to compute it."""
        return self._waited.spent_ns

    def take(self) -> None:
        """Take the health that is here; never waits."""
        with self._meter:
            heard = [(message.topic, message.metadata["step"], message.value) for message in self._inbox.drain()]
        for message in heard:
            self._hear(*message)

    def finish(self) -> None:
        """Handle what is left, so that no rank that closes is kept waiting for it."""
        self.take()
        # A message counts as handled at the next call.
        self._inbox.drain()

    def _hear(self, topic: str, step: int, health: Any) -> None:  # noqa: ANN401
        self._judge.hear(topic.removeprefix("layers.").removesuffix(".health"), step, health)

    def conclude(self, step: int) -> None:
        """Decide about this step, if it is a boundary, and have all ranks accept.

        Raises:
            RuntimeError: a rank refused or did not answer. It should be impossible; see the module's proof.
        """
        if step < 0 or not Judge.is_boundary(step):
            return
        while not self._judge.is_complete(step):
            with self._meter, self._waited:
                message = self._inbox.receive(timeout_s=20)
                heard = message.topic, message.metadata["step"], message.value
            self._hear(*heard)
        if decided := self._judge.decide(step):
            self._ask([transition.to_plain() for transition in decided])
            self.transitions += decided

    def _ask(self, plain: list[dict[str, Any]]) -> None:
        with self._meter:
            replies = self._fabric.request_all(METHOD, plain, to=list(range(self._ranks)), timeout_s=20)
        for rank, reply in replies.items():
            if isinstance(reply, Exception):
                raise RuntimeError(f"rank {rank} did not accept {plain}") from reply
            if not reply.value["accepted"]:
                raise RuntimeError(f"rank {rank} had begun step {reply.value['step']} when asked for {plain}")
