"""The publisher's part of the protocol, between two cores."""

from __future__ import annotations

from tests.harness.pair import Link, inbound_of


def test_what_is_published_after_the_subscription_arrives_in_order() -> None:
    link = Link("a", "b")
    link.subscribe("b", "layers.**")
    link.crank()
    for _ in range(5):
        link.publish("a", "layers.0.health", [1, 2, 1])
        link.crank()
    assert link["b"].values("layers.0.health") == [b"%d" % n for n in range(15)]
    link.run(1000)
    assert inbound_of(link["b"], "layers.0.health").floor == 15
    assert link["a"].core.publishing.feeds["layers.0.health"].is_acknowledged
