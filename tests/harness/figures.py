"""What a test measured, for whoever asks; and the tests that only a soak runs."""

from __future__ import annotations

import os
import sys

import pytest

soak = pytest.mark.skipif("TENSOR_FABRIC_SOAK" not in os.environ, reason="a soak: set TENSOR_FABRIC_SOAK=1")


def show(figures: str) -> None:
    """Print figures that a test does not judge; pytest shows them with -s, and beside a failure."""
    sys.stdout.write(figures + "\n")
