"""What a benchmark says: rows with the numbers of all contestants, bounds and their verdicts, the fit, JSON, tables.

No number here is ever asserted: a table says what was seen, and a row whose spread crosses its bound is undecided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from perf.machine import fingerprint

__all__ = ["Budget", "Fit", "Report", "Row", "fit_two_terms", "markdown", "render", "spread"]


def spread(values: Sequence[float]) -> float:
    """(max - min) / median."""
    middle = median(values)
    return (max(values) - min(values)) / middle if middle else 0.0


@dataclass(frozen=True, slots=True)
class Budget:
    """Bounds of the ratio ours / peer: at least `must` and `aim`, or at most if `at_most`.

    With `peer` "" they bound our own number. A row has a budget for each peer that it is bound by. The source of all of
    them is the table of budgets in `perf/README.md`.
    """

    must: float | None
    aim: float | None = None
    peer: str = "raw"
    at_most: bool = False

    def bounds(self) -> list[tuple[str, float]]:
        """`must` and `aim`, where there is such a bound."""
        return [(grade, bound) for grade, bound in (("must", self.must), ("aim", self.aim)) if bound is not None]

    def verdict(self, bound: float, seen: Sequence[float]) -> str:
        """`held`, `missed`, or `undecided` where the spread crosses the bound."""
        kept = [value <= bound if self.at_most else value >= bound for value in seen]
        return "held" if all(kept) else "undecided" if any(kept) else "missed"

    def words(self, grade: str, bound: float, unit: str) -> str:
        """`must >= 1.3 x zenoh`, or in the row's unit where our own number is bound."""
        return f"{grade} {'<=' if self.at_most else '>='} {bound:g} {f'x {self.peer}' if self.peer else unit}"


@dataclass(slots=True)
class Row:
    """One line of the table: the numbers of all contestants for one case, in `unit`.

    `axes` says where the case lies in a plot, such as the bytes of a message.
    """

    bench: str
    case: str
    unit: str
    values: dict[str, list[float]]
    budgets: Sequence[Budget] = ()
    notes: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, Any] = field(default_factory=dict)

    def ratios(self, peer: str) -> list[float] | None:
        """Ours / peer of each round, or None where one of the two did not play."""
        ours, theirs = self.values.get("fabric"), self.values.get(peer)
        if not ours or not theirs:
            return None
        return [mine / other for mine, other in zip(ours, theirs, strict=True)]

    def verdicts(self) -> list[dict[str, Any]]:
        """Of each bound: its words, what was seen (a ratio, or our own number), and whether it held.

        The verdict is None where the peer or the fabric did not play.
        """
        told = []
        for budget in self.budgets:
            seen = self.ratios(budget.peer) if budget.peer else self.values.get("fabric")
            for grade, bound in budget.bounds():
                verdict = budget.verdict(bound, seen) if seen else None
                words = budget.words(grade, bound, self.unit)
                told.append(
                    {"grade": grade, "bound": words, "seen": median(seen) if seen else None, "verdict": verdict}
                )
        return told

    def to_json(self) -> dict[str, Any]:
        """Plain data: all rounds, medians, spreads and ratios."""
        summary = {
            name: {"median": median(seen), "spread": spread(seen), "rounds": seen} for name, seen in self.values.items()
        }
        ratios = {peer: self.ratios(peer) for peer in self.values if peer != "fabric"}
        row: dict[str, Any] = {"bench": self.bench, "case": self.case, "unit": self.unit, "values": summary}
        row["ratios"] = {peer: median(seen) for peer, seen in ratios.items() if seen}
        return row | {"verdicts": self.verdicts(), "axes": self.axes, "notes": self.notes}


@dataclass(frozen=True, slots=True)
class Fit:
    """cost in seconds = n * `per_item_s` + bytes / `bytes_per_s`; `worst` is the largest relative error of the fit."""

    per_item_s: float
    bytes_per_s: float
    worst: float

    def words(self) -> str:
        """The fit as a formula."""
        rate = f"bytes / {self.bytes_per_s / 1e9:.2f} GB/s" if self.bytes_per_s != float("inf") else "0"
        return f"cost = n * {self.per_item_s * 1e6:.2f} us + {rate} (worst error {self.worst:.0%})"


def fit_two_terms(points: Sequence[tuple[float, float, float]]) -> Fit:
    """Least squares of the relative error over (n, bytes, seconds); neither term may be negative.

    Relative, because the seconds reach over three decades and the small sizes say most about the first term.
    """
    sums = [0.0] * 5
    for n, size, cost in points:
        u, v = n / cost, size / cost
        sums = [old + new for old, new in zip(sums, (u * u, u * v, v * v, u, v), strict=True)]
    uu, uv, vv, u1, v1 = sums
    det = uu * vv - uv * uv
    a, c = ((u1 * vv - v1 * uv) / det, (v1 * uu - u1 * uv) / det) if det else (u1 / uu, 0.0)
    if a < 0:
        a, c = 0.0, v1 / vv
    elif c < 0:
        a, c = u1 / uu, 0.0
    worst = max(abs(n * a + size * c - cost) / cost for n, size, cost in points)
    return Fit(a, 1 / c if c else float("inf"), worst)


@dataclass(slots=True)
class Report:
    """What a benchmark found: its rows and fits, who was left out and why, and which benchmarks broke.

    `semantics`: by kind of work (`records`, `arrays`, `requests`) and library, what a delivered message is.
    """

    rows: list[Row] = field(default_factory=list)
    fits: dict[str, Fit] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    semantics: dict[str, dict[str, str]] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    def add(self, other: Report) -> None:
        """Take what another one found."""
        self.rows += other.rows
        self.fits |= other.fits
        self.skipped |= other.skipped
        for what, words in other.semantics.items():
            self.semantics.setdefault(what, {}).update(words)

    def to_json(self) -> dict[str, Any]:
        """Plain data with the fingerprint."""
        fits = {
            name: {"per_item_s": fit.per_item_s, "bytes_per_s": fit.bytes_per_s, "worst": fit.worst}
            for name, fit in self.fits.items()
        }
        rows = [row.to_json() for row in self.rows]
        told = {"skipped": self.skipped, "semantics": self.semantics, "broken": self.broken}
        return {"fingerprint": fingerprint(), "rows": rows, "fits": fits, **told}


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _cells(row: Row) -> list[str]:
    """One row as text: case, unit, fabric, raw, ratio, peers with the ratio to each, bounds."""

    def shown(name: str) -> str:
        seen = row.values.get(name)
        return f"{_number(median(seen))} ±{spread(seen) * 50:.0f} %" if seen else "-"

    others = []
    for name in row.values:
        if name not in ("fabric", "raw"):
            ratios = row.ratios(name)
            others.append(f"{name} {shown(name)}" + (f" ({median(ratios):.2f} x)" if ratios else ""))
    ratios = row.ratios("raw")
    ratio = f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})" if ratios else "-"
    bounds = [f"{told['bound']}: {told['verdict'] or 'not played'}" for told in row.verdicts()]
    return [row.bench, row.case, row.unit, shown("fabric"), shown("raw"), ratio, ", ".join(others), ", ".join(bounds)]


HEAD = ["bench", "case", "unit", "fabric", "raw pyzmq", "ratio (range)", "others (ours / theirs)", "bounds"]


def render(report: Report) -> str:
    """The table and the fits as text. `±` is half the spread (max - min) in per cent of the median."""
    lines = [HEAD, *(_cells(row) for row in report.rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "  ".join("-" * width for width in widths))
    text += [f"fit {name}: {fit.words()}" for name, fit in report.fits.items()]
    text += [f"skipped {who}: {why}" for who, why in report.skipped.items()]
    return "\n".join(text)


def markdown(report: Report) -> str:
    """The same as a page: conditions, table, who was left out, and what a delivered message is to each library."""
    where = fingerprint()
    versions = ", ".join(f"{name} {version}" for name, version in where.pop("versions").items() if version)
    text = ["# Benchmarks, as last run", "", "Seen with: " + versions + "."]
    text += ["", ", ".join(f"{name} {value}" for name, value in where.items()) + ".", ""]
    text += ["Medians of interleaved rounds, times at the receiver; `±` is half of (max - min). `perf/README.md` says"]
    text += ["how to read a row.", ""]
    lines = [HEAD, ["---"] * len(HEAD), *(_cells(row) for row in report.rows)]
    text += ["| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines]
    text += ["", *(f"- fit {name}: {fit.words()}" for name, fit in report.fits.items())]
    text += [f"- skipped {who}: {why}" for who, why in report.skipped.items()]
    text += [f"- broken: {line}" for line in report.broken]
    for what, libraries in report.semantics.items():
        text += ["", f"What a row of {what} means:", ""]
        text += [f"- {name}: {words}" for name, words in libraries.items()]
    return "\n".join(text) + "\n"
