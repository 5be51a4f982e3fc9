"""A small network whose layers carry dormant seeds, and the data that it learns.

A seed is a two-layer adapter beside its layer. The adapters of all seeds exist from the start, behind a gate:

    dormant    gate 0, gradient masked      it computes nothing and learns nothing
    training   gate 1, gradient unmasked    germinated: on probation
    grafted    gate 1, gradient unmasked    it stays
    culled     gate 0, gradient masked      it is gone

    dormant -> training -> grafted | culled

Since no parameter ever comes or goes, the buckets of DistributedDataParallel stay what they were. The second layer of
an adapter starts at zero, so that opening a gate changes nothing at that moment.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

__all__ = ["METRICS", "SEEDS", "STATES", "SeededLayer", "SeededNet", "digits"]

SEEDS = 4
"""Seeds of each layer."""

WIDTH = 10
"""Units of a hidden layer: too few for the task, so that growing can help."""

ADAPTER = 8
"""Units of a seed's adapter."""

STATES = ("dormant", "training", "grafted", "culled")
OPEN = ("training", "grafted")
ALLOWED = {("dormant", "training"), ("training", "grafted"), ("training", "culled")}

METRICS = ("loss", "signal", "activation", "idle", "share", "gradient")
"""Columns of a layer's health, one row a seed:

loss: this rank's mean loss of the step, the same in all rows · signal: rms of the loss's gradient at the layer's
output, times the batch (what the layer still does wrong) · activation: rms of the output · idle: share of outputs that
are zero · share: rms of the seed's part of the sum / rms of the host's · gradient: rms of the gradient of the seed's
adapter.
"""


class SeededLayer(nn.Module):
    """`relu(host(x) + sum over seeds of gate * up(relu(down(x))))`.

    Parameters: `down` (seeds, adapter, inputs), `up` (seeds, outputs, adapter). `gate` (seeds,) is 0 or 1.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.host = nn.Linear(inputs, outputs)
        self.down = nn.Parameter(torch.randn(SEEDS, ADAPTER, inputs) * (2 / inputs) ** 0.5)
        self.up = nn.Parameter(torch.zeros(SEEDS, outputs, ADAPTER))
        # Not a buffer: those are broadcast in every forward, which would hide a rank that opened a gate too late.
        self.gate = torch.zeros(SEEDS)
        self.states = ["dormant"] * SEEDS
        self._host_part = self._seed_parts = self._output = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inputs) -> (batch, outputs)."""
        hidden = torch.relu(torch.einsum("sai,bi->sba", self.down, x))
        seeds = torch.einsum("soa,sba->sbo", self.up, hidden) * self.gate[:, None, None]
        host = self.host(x)
        output = torch.relu(host + seeds.sum(0))
        if output.requires_grad:
            output.retain_grad()
            self._host_part, self._seed_parts, self._output = host.detach(), seeds.detach(), output
        return output

    def mask_gradients(self) -> None:
        """Make the gradients of closed seeds exactly zero; to be called between `backward` and the optimizer's step."""
        for parameter in (self.down, self.up):
            if parameter.grad is not None:
                parameter.grad.mul_(self.gate[:, None, None])

    def move(self, seed: int, state: str) -> None:
        """Put a seed into another state.

        Raises:
            ValueError: a seed in its present state cannot go there.
        """
        if (self.states[seed], state) not in ALLOWED:
            raise ValueError(f"seed {seed} is {self.states[seed]} and cannot become {state}")
        self.states[seed] = state
        self.gate[seed] = float(state in OPEN)

    @torch.no_grad()
    def health(self, loss: Tensor) -> Tensor:
        """float32 (seeds, metrics) of the last step, from its activations and gradients; see `METRICS`."""
        output, gradient = self._output.detach(), self._output.grad
        down, up = self.down.grad, self.up.grad
        if gradient is None or down is None or up is None:
            raise RuntimeError("health is known after backward only")
        host = self._host_part.square().mean().sqrt()
        batch = output.shape[0]
        layer = torch.stack(
            [loss, gradient.square().mean().sqrt() * batch, output.square().mean().sqrt(), (output == 0).float().mean()]
        )
        share = self._seed_parts.square().mean((1, 2)).sqrt() / host.clamp_min(1e-12)
        moved = (down.square().sum((1, 2)) + up.square().sum((1, 2))) / (down[0].numel() + up[0].numel())
        return torch.cat([layer.expand(SEEDS, -1), share[:, None], moved.sqrt()[:, None]], 1)


class SeededNet(nn.Module):
    """64 pixels -> two seeded layers -> 10 digits."""

    def __init__(self) -> None:
        super().__init__()
        self.seeded = nn.ModuleDict({"stem": SeededLayer(64, WIDTH), "trunk": SeededLayer(WIDTH, WIDTH)})
        self.head = nn.Linear(WIDTH, 10)

    @property
    def layers(self) -> dict[str, SeededLayer]:
        """The layers that carry seeds, by name."""
        return {name: layer for name, layer in self.seeded.items() if isinstance(layer, SeededLayer)}

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 64) -> (batch, 10) logits."""
        for layer in self.seeded.values():
            x = layer(x)
        out: Tensor = self.head(x)
        return out


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1,797 scans of handwritten digits that come with scikit-learn, 8 x 8, split 3 : 1.

    Returns:
        Training images (1,347, 64) in 0..1 and labels, held-out images (450, 64) and labels.
    """
    data: Any = load_digits()
    parts = train_test_split(
        (data.data / 16).astype(np.float32), data.target, test_size=450, stratify=data.target, random_state=seed
    )
    train, test, train_labels, test_labels = (torch.from_numpy(np.ascontiguousarray(part)) for part in parts)
    return train, train_labels, test, test_labels
