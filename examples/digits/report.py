"""What a run shows: progress while it lasts, a table and a plot at its end."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

__all__ = ["Ticker", "plot", "show", "write_json"]

COLOURS = {"dormant": "#dddddd", "training": "#f5a623", "grafted": "#3a9d5d", "culled": "#c0392b"}


class Ticker:
    """A progress bar on a terminal; elsewhere one line for each tenth."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        self._bar: Progress | None = None
        if sys.stdout.isatty():
            columns = TextColumn("{task.description:16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
            self._bar = Progress(*columns, console=Console())
            self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Ticker:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, what: str, step: int) -> None:
        """One more step of this run is done."""
        self._done += 1
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=what)
        elif self._done * 10 // self._total > (self._done - 1) * 10 // self._total:
            print(f"{self._done * 100 // self._total:3d} %  {what}, step {step + 1}", flush=True)


def _share(account: dict[str, Any], steps: int) -> str:
    """Time in the fabric, as a share of the step and in microseconds."""
    return (
        f"{100 * account['fabric_ns'] / account['step_ns']:.2f} % ({account['fabric_ns'] / steps / 1e3:.0f} us a step)"
    )


def _order(account: dict[str, Any]) -> str:
    """In words, with what went wrong if anything did."""
    if not account["out_of_order"] and not account["missing"]:
        return f"{account['lanes']} lanes dense, in order"
    return f"BROKEN: {account['out_of_order']} out of order, {account['missing']} missing"


def show(result: dict[str, Any]) -> None:
    """The final table."""
    table = Table(title=f"Digits, {result['ranks']} ranks, {result['steps']} steps, seed {result['seed']}")
    table.add_column("what")
    table.add_column("seen", justify="right")
    for name in ("without", "with"):
        table.add_row(f"held-out accuracy {name} grown seeds", f"{100 * result['accuracy'][name][-1][1]:.2f} %")
    reports, steps = result["reports"], result["steps"]
    keys = ("published", "received", "published_bytes", "received_bytes")
    sent, heard, sent_bytes, heard_bytes = (sum(account[key] for account in reports) for key in keys)
    table.add_row("messages published -> received", f"{sent:,} -> {heard:,}")
    table.add_row("tensor bytes published -> received", f"{sent_bytes:,} -> {heard_bytes:,}")
    table.add_row("step without the fabric", f"{result['step_ns_without'] / steps / 1e6:.2f} ms")
    for account in reports:
        table.add_row(f"rank {account['rank']}: step", f"{account['step_ns'] / steps / 1e6:.2f} ms")
        table.add_row(f"rank {account['rank']}: time in the fabric", _share(account, steps))
        if account["waited_ns"]:
            waited = f"{account['waited_ns'] / steps / 1e3:.0f} us a step"
            table.add_row(f"rank {account['rank']}: of it, waiting for ranks' health", waited)
        table.add_row(f"rank {account['rank']}: order", _order(account))
        table.add_row(f"rank {account['rank']}: transitions asked too late", str(account["late"]))
    same = all(account["applied"] == reports[0]["applied"] for account in reports)
    table.add_row("all ranks made the same transitions", "yes" if same else "NO")
    # Wide enough for every cell also where the output is a file.
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    for move in result["transitions"]:
        print(f"step {move['effective_step']:5d}  {move['layer']}, seed {move['seed']}: {move['state']}")
    if not result["transitions"]:
        print("no layer stopped improving: no seed germinated")


def write_json(result: dict[str, Any], file: Path) -> None:
    """All that was found, as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def plot(result: dict[str, Any], directory: Path) -> Path:
    """Accuracy, transitions and traffic over the steps, as a PNG; its path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, middle, bottom) = pyplot.subplots(
        3, 1, figsize=(9, 8), sharex=True, height_ratios=(3, 2, 1.5), layout="constrained"
    )
    for name, style in (("without", "--"), ("with", "-")):
        steps, shares = zip(*result["accuracy"][name], strict=True)
        top.plot(steps, [100 * share for share in shares], style, label=f"{name} grown seeds")
    top.set(ylabel="held-out accuracy, %", title=f"{result['ranks']} ranks, seed {result['seed']}")
    for move in result["transitions"]:
        top.axvline(move["effective_step"], color=COLOURS[move["state"]], linewidth=0.8)
    top.legend(loc="lower right")
    _draw_seeds(middle, result)
    traffic, width = result["traffic"], max(1, result["steps"] // 100)
    heard = [sum(traffic[first : first + width]) / width for first in range(0, len(traffic), width)]
    bottom.step(range(0, len(traffic), width), heard, where="post", color="#555555")
    bottom.set(ylabel="messages heard\nby rank 0, a step", xlabel="step", ylim=(0, None))
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "train_digits.png"
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
    return file


def _draw_seeds(axes: Any, result: dict[str, Any]) -> None:  # noqa: ANN401
    """One bar a seed that ever moved, coloured by its state."""
    from matplotlib.patches import Patch

    moves = result["transitions"]
    seeds = sorted({(move["layer"], move["seed"]) for move in moves})
    for row, (layer, seed) in enumerate(seeds):
        own = [move for move in moves if (move["layer"], move["seed"]) == (layer, seed)]
        spans = [(0, "dormant"), *((move["effective_step"], move["state"]) for move in own), (result["steps"], "")]
        for (start, state), (end, _) in pairwise(spans):
            axes.barh(row, end - start, left=start, color=COLOURS[state], height=0.7)
    axes.set_yticks(range(len(seeds)), [f"{layer}, seed {seed}" for layer, seed in seeds])
    axes.set_ylabel("seeds that moved")
    axes.legend(
        handles=[Patch(color=colour, label=state) for state, colour in COLOURS.items()],
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=4,
        frameon=False,
    )
