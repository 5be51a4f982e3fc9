"""The ten lines of the README: every rank publishes a tensor at each step and hears all others.

torchrun --standalone --nproc-per-node 2 examples/hello.py
"""

from __future__ import annotations

import torch

from fabric import join

layer = torch.nn.Linear(512, 512)


def train_one_step() -> torch.Tensor:
    """Stands for yours; the norm of each unit's gradient, float32 (512,)."""
    layer.zero_grad()
    layer(torch.rand(64, 512)).square().mean().backward()
    assert layer.weight.grad is not None
    return layer.weight.grad.norm(dim=1)


with join() as fabric:  # torchrun gives identity and rendezvous
    inbox = fabric.subscribe("layers.**.health")  # ready when it returns: nothing published later is missed
    for step in range(100):
        health = train_one_step()  # any tensor
        fabric.publish("layers.encoder.3.health", health, seed=17, metadata={"step": step})  # a snapshot
        for message in inbox.drain():  # what is here now; never waits
            print(message.source, message.topic, message.seed, message.sequence, message.value.mean())
