"""The benchmarks' pure half: bounds and their verdicts, who is left out, tables."""

from __future__ import annotations

import argparse
import ast

import pytest

from perf.machine import fingerprint
from perf.peers import PEERS, cast, missing
from perf.report import Budget, Report, Row, markdown, render
from tests.meta.source import ROOT

SIDES = ("perf.sides:ArraySender", "perf.sides:ArrayReceiver")


def everybody(**changed: object) -> argparse.Namespace:
    return argparse.Namespace(**{"only": None, "raw_only": False, **changed})


@pytest.mark.parametrize(
    ("budget", "seen", "verdicts"),
    [
        (Budget(1.5, 2.0), [1.6, 1.7, 1.9], ["held", "missed"]),
        (Budget(1.5), [1.4, 1.6], ["undecided"]),
        (Budget(1.5), [1.5, 1.5], ["held"]),
        (Budget(None, 1.3, peer="zenoh"), [1.2, 1.29], ["missed"]),
        (Budget(2.0, 1.5, at_most=True), [1.6, 2.0], ["held", "missed"]),
        (Budget(2.0, 1.5, at_most=True), [1.4, 2.1], ["undecided", "undecided"]),
    ],
)
def test_each_bound_of_a_budget_has_its_verdict(budget: Budget, seen: list[float], verdicts: list[str]) -> None:
    assert [budget.verdict(bound, seen) for _, bound in budget.bounds()] == verdicts


def test_a_row_is_bound_by_several_peers_and_by_its_own_number() -> None:
    values = {"fabric": [3.0, 4.0], "raw": [1.0, 2.0], "zenoh": [2.0, 2.0]}
    budgets = [Budget(2.5), Budget(1.3, 2, peer="zenoh"), Budget(3.5, peer="", at_most=True), Budget(1, peer="gloo")]
    told = Row("records", "many", "records/s", values, budgets).verdicts()
    assert [(each["bound"], each["seen"], each["verdict"]) for each in told] == [
        ("must >= 2.5 x raw", 2.5, "undecided"),
        ("must >= 1.3 x zenoh", 1.75, "held"),
        ("aim >= 2 x zenoh", 1.75, "undecided"),
        ("must <= 3.5 records/s", 3.5, "undecided"),
        ("must >= 1 x gloo", None, None),
    ]


def test_the_tables_show_every_library_its_ratio_and_who_is_missing() -> None:
    row = Row(
        "tensors", "1 MiB, ipc", "GB/s", {"fabric": [2.0], "raw": [4.0], "zenoh": [1.0]}, [Budget(1, peer="zenoh")]
    )
    report = Report([row], skipped={"gloo": "torch is not installed"}, semantics={"arrays": {"zenoh": "copied out"}})
    page = markdown(report)
    for text in (page, render(report)):
        assert "zenoh 1 ±0 % (2.00 x)" in text
        assert "0.50 (0.50-0.50)" in text
        assert "must >= 1 x zenoh: held" in text
        assert "skipped gloo: torch is not installed" in text
    assert "- zenoh: copied out" in page
    assert report.to_json()["rows"][0]["verdicts"][0]["verdict"] == "held"


def test_reports_add_up() -> None:
    whole = Report(semantics={"arrays": {"raw": "a view"}})
    whole.add(Report([Row("a", "b", "s", {})], skipped={"nats": "gone"}, semantics={"arrays": {"zenoh": "a copy"}}))
    assert (len(whole.rows), whole.skipped) == (1, {"nats": "gone"})
    assert whole.semantics == {"arrays": {"raw": "a view", "zenoh": "a copy"}}


def test_a_missing_library_is_skipped_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "zenoh" else object())
    report = Report()
    found = cast(everybody(), report, ["fabric", "zenoh", "nats"], SIDES, "records")
    assert [(each.name, each.optional) for each in found] == [("fabric", False)]
    assert report.skipped == {"zenoh": "zenoh is not installed", "nats": "nats-server is not on PATH"}
    assert list(report.semantics["records"]) == ["fabric"]


def test_only_those_asked_for_play() -> None:
    names = ["fabric", "raw", "memcpy"]
    assert [each.name for each in cast(everybody(only="raw,fabric"), Report(), names, SIDES, "arrays")] == names[:2]
    assert [each.name for each in cast(everybody(raw_only=True), Report(), names, SIDES, "arrays")] == names[1:]
    assert missing("raw") is None


def test_every_peer_says_what_its_messages_are_and_how_it_is_set() -> None:
    for name, peer in PEERS.items():
        assert peer.records or peer.arrays or peer.requests, name
        text = (ROOT / (peer.module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
        assert len(ast.get_docstring(ast.parse(text)) or "") > 80, name


def test_the_fingerprint_names_what_decides_speed() -> None:
    assert {"versions", "cores", "cpu", "kernel", "load"} <= set(fingerprint())
