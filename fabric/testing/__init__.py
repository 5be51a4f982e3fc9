"""A whole job in one process, to test what you build on the fabric: members without processes, time without waiting, faults
without luck.

    from fabric.testing import FaultPlan, World

    with World(seed=7, plan=FaultPlan(loss=0.2, delay_ms=5)) as world:
        trainer, reader = world.join(0), world.join(1)
        inbox = reader.subscribe("layers.*.loss")
        for step in range(10):
            trainer.publish("layers.0.loss", {"step": step, "loss": 1 / (step + 1)})
        trainer.flush()                                     # a fifth of all frames is lost; none of the messages is
        assert [message.value["step"] for message in inbox.drain()] == list(range(10))
"""

from fabric.testing.checker import Checker, Violation
from fabric.testing.history import History
from fabric.testing.world import World
from transports import FaultPlan

__all__ = ["Checker", "FaultPlan", "History", "Violation", "World"]
