"""A whole job in one process: members without processes, time without waiting, faults without luck.

Test your own training code with it. Members have the public face that `join` gives; handlers run by themselves.

    from fabric.testing import Checker, FaultPlan, World

    with World(seed=7, plan=FaultPlan(loss=0.2, delay_ms=5)) as world:
        trainer, reader = world.join(0), world.join(1)
        seen = []
        reader.on("layers.*.loss")(lambda message: seen.append(message.value))
        for step in range(10):
            trainer.publish("layers.0.loss", step)
        trainer.flush()                         # a fifth of all frames is lost, none of the messages
        assert seen == list(range(10))
        Checker(world.history).judge()          # order, no duplicate, no silent loss, nothing changed

Whoever waits lets the world go on; `world.run(60)` is a minute of its time and almost none of yours.
`world.kill(trainer)` and `world.join(0)` are a crash and a restart, `world.cut(a, b)` is a broken link, and
`world.every(0.1, function)` an application's loop. The same seed gives the same history, byte for byte.
"""

from fabric.testing.arenas import ArenaPlan
from fabric.testing.checker import Checker, Violation
from fabric.testing.history import History
from fabric.testing.stores import DiskPlan
from fabric.testing.world import World
from transports import FaultPlan

__all__ = ["ArenaPlan", "Checker", "DiskPlan", "FaultPlan", "History", "Violation", "World"]
