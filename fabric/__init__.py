"""Tensor Fabric: the processes of a training job move tensors and commands to each other, in order, without a broker.

    from fabric import join

    with join() as fabric:                                  # under torchrun; or alone
        inbox = fabric.subscribe("layers.**.health")
        fabric.publish("layers.0.health", tensor, seed=17)
        for message in inbox.drain():
            print(message.source, message.sequence, message.value.mean())

The package, from the top: `joining` enters, `client` and `aio` are the two faces, `engine` drives, `core` is the
protocol without IO, `payloads` turns values into bytes, `rendezvous` finds the others, `testing` simulates a whole
job. Below it all lies the package `transports`. ARCHITECTURE.md explains; PROTOCOL.md specifies the bytes.
"""

from fabric.client import CloseReport, Fabric, PeerInfo, Publisher
from fabric.config import FabricConfig
from fabric.engine.inbox import Gap
from fabric.errors import FabricError
from fabric.joining import adopt, join, observe
from fabric.letters import DeadLetter, DeadLetters, RedriveReport
from fabric.message import Message, Reply, Request
from fabric.observe.ledger import Ledger
from fabric.payloads import register
from fabric.storage.orphans import Orphan
from fabric.subscription import Subscription

__all__ = [
    "CloseReport",
    "DeadLetter",
    "DeadLetters",
    "Fabric",
    "FabricConfig",
    "FabricError",
    "Gap",
    "Ledger",
    "Message",
    "Orphan",
    "PeerInfo",
    "Publisher",
    "RedriveReport",
    "Reply",
    "Request",
    "Subscription",
    "adopt",
    "join",
    "observe",
    "register",
]
