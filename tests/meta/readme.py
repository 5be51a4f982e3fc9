"""The runnable examples of a page.

A python block is run when an HTML comment that starts with `runnable` stands right before it. The comment's further
lines are put before the example: what the reader's own program would have.

    <!-- runnable
    import torch
    def train_one_step(): return torch.ones(4)
    -->
    ```python
    ...
    ```
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_BLOCK = re.compile(
    r"<!-- runnable[ \t]*(?P<prelude>\n.*?)?-->\s*```python\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE
)
_COMMAND = re.compile(r"\bmake ([a-z][a-z-]*)")


@dataclass(frozen=True, slots=True)
class Snippet:
    """One example: where it stands, and the program that runs it."""

    line: int
    prelude: str
    code: str

    @property
    def program(self) -> str:
        return f"{self.prelude}\n{self.code}"


def snippets(text: str) -> list[Snippet]:
    return [
        Snippet(text.count("\n", 0, found.start("code")) + 1, (found["prelude"] or "").strip("\n"), found["code"])
        for found in _BLOCK.finditer(text)
    ]


def commands(text: str) -> set[str]:
    """The targets of `make` that code, inline or fenced, names."""
    code = re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL)
    return {name for part in code for name in _COMMAND.findall(part)}
