"""Settings: their bounds, and the policies that a topic may have."""

from __future__ import annotations

import dataclasses

import pytest

from fabric.config import MIB, FabricConfig, Inboxes, Policy, Repair, Retention, Spill, WhenFull, Work, check_policy
from fabric.errors import ConfigError

GROUPS = ["retention", "inboxes", "repair", "liveness", "requests", "work", "spill"]


def test_the_defaults_are_possible() -> None:
    assert FabricConfig().listen == "ipc"


def numbers() -> list[tuple[str, str]]:
    config = FabricConfig()
    return [
        (group, field.name)
        for group in GROUPS
        for field in dataclasses.fields(getattr(config, group))
        if isinstance(getattr(getattr(config, group), field.name), int | float)
    ]


@pytest.mark.parametrize(("group", "name"), numbers())
@pytest.mark.parametrize("value", [0, -1])
def test_every_number_is_positive_and_named_when_it_is_not(group: str, name: str, value: int) -> None:
    settings = dataclasses.replace(getattr(FabricConfig(), group), **{name: value})
    with pytest.raises(ConfigError) as caught:
        FabricConfig(**{group: settings})
    assert caught.value.field == f"{group}.{name}"


def test_a_chunk_is_at_most_four_mebibytes() -> None:
    FabricConfig(repair=Repair(chunk_bytes=4 * MIB))
    with pytest.raises(ConfigError, match="chunk_bytes"):
        FabricConfig(repair=Repair(chunk_bytes=4 * MIB + 1))


def test_the_spill_log_has_room_for_a_segment_and_its_spare() -> None:
    FabricConfig(spill=Spill(segment_bytes=MIB, bytes_max=2 * MIB))
    with pytest.raises(ConfigError, match=r"spill\.bytes_max"):
        FabricConfig(spill=Spill(segment_bytes=MIB, bytes_max=2 * MIB - 1))


def test_the_time_for_subscribing_is_positive() -> None:
    with pytest.raises(ConfigError, match="subscribe_timeout_s"):
        FabricConfig(subscribe_timeout_s=0)


def test_settings_are_frozen_and_groups_are_named() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        FabricConfig().listen = "tcp://x"  # type: ignore[misc]
    assert (Retention().owed_bytes_max, Inboxes().ranges_max, Work().turn_bursts_max) == (256 * MIB, 1024, 64)


@pytest.mark.parametrize(
    ("policy", "when_full", "chosen"),
    [
        ("reliable", None, (Policy.RELIABLE, WhenFull.SPILL)),
        ("reliable", "block", (Policy.RELIABLE, WhenFull.BLOCK)),
        ("reliable", "fail", (Policy.RELIABLE, WhenFull.FAIL)),
        ("reliable", "drop_oldest", (Policy.RELIABLE, WhenFull.DROP_OLDEST)),
        ("latest", None, (Policy.LATEST, WhenFull.DROP_OLDEST)),
        ("lossy", None, (Policy.LOSSY, WhenFull.DROP_OLDEST)),
    ],
)
def test_what_happens_without_room(policy: str, when_full: str | None, chosen: tuple[Policy, WhenFull]) -> None:
    assert check_policy(policy, when_full) == chosen


@pytest.mark.parametrize(
    ("policy", "when_full", "field"),
    [
        ("fast", None, "policy"),
        ("durable", "spill", "when_full"),
        ("latest", "block", "when_full"),
        ("lossy", "fail", "when_full"),
        ("latest", "spill", "when_full"),
        ("reliable", "explode", "when_full"),
    ],
)
def test_an_impossible_policy_names_the_setting(policy: str, when_full: str | None, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_policy(policy, when_full)
    assert caught.value.field == field
