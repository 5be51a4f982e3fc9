"""Pictures of a report: throughput over size by library, and the percentiles of latency."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["draw"]


def _lines(rows: list[dict[str, Any]], key: str) -> dict[str, tuple[list[Any], list[float]]]:
    """By library: where its points lie on this axis, and its medians."""
    lines: dict[str, tuple[list[Any], list[float]]] = {}
    for row in rows:
        for name, seen in row["values"].items():
            xs, ys = lines.setdefault(name, ([], []))
            xs.append(row["axes"][key])
            ys.append(seen["median"])
    return lines


def _picture(rows: list[dict[str, Any]], key: str, title: str, path: Path) -> None:
    if not rows:
        return
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, (xs, ys) in _lines(rows, key).items():
        ours = name == "fabric"
        axes.plot(xs, ys, marker="o", markersize=3, linewidth=2.5 if ours else 1, label=name, zorder=3 if ours else 2)
    axes.set_yscale("log")
    if key == "bytes":
        axes.set_xscale("log", base=2)
        axes.set_xlabel("bytes of a message")
    axes.set_ylabel(rows[0]["unit"])
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=90)


def draw(report: dict[str, Any], out: Path) -> None:
    """Write the pictures beside `out`."""
    rows = report["rows"]
    for link in ("ipc", "tcp"):
        found = [row for row in rows if row["bench"] == "tensors" and row["axes"].get("link") == link]
        _picture(found, "bytes", f"tensors over {link}: GB/s at the receiver", out.with_name(f"tensors-{link}.png"))
    records = [row for row in rows if row["bench"] == "records" and "one by one" in row["case"]]
    _picture(records, "bytes", "records, published one by one: a second", out.with_name("records.png"))
    paced = [row for row in rows if row["bench"] == "latency"]
    for size, rate in sorted({(row["axes"]["bytes"], row["axes"]["rate"]) for row in paced}):
        mine = [row for row in paced if (row["axes"]["bytes"], row["axes"]["rate"]) == (size, rate)]
        path = out.with_name(f"latency-{size}-{rate}.png")
        _picture(mine, "percentile", f"age on arrival: {size} B, {rate:,} a second", path)
