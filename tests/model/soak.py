# ruff: noqa: T201 - a report is what it is for
"""Plays many schedules of the model.

python -m tests.model.soak --seeds 10000
python -m tests.model.soak --minutes 10
python -m tests.model.soak --first 77 --seeds 1
python -m tests.model.soak --variants
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from tests.model.variants import VARIANTS, classes
from tests.model.words import Violation
from tests.model.world import ModelWorld


def explore(seed: int, name: str | None = None) -> ModelWorld:
    """One schedule, of the model or of a variant of it.

    Raises:
        Violation: an invariant does not hold.
    """
    world = ModelWorld(seed, *classes(name))
    world.run()
    return world


def is_caught(name: str, seed: int) -> str:
    """How a schedule ends for a variant; empty if nothing is wrong."""
    try:
        explore(seed, name)
    except Violation as violation:
        return str(violation.args[0])
    except (AssertionError, KeyError, ValueError, IndexError, RecursionError, AttributeError, TypeError) as error:
        return type(error).__name__  # it went where the intact model never goes
    return ""


def hunt(first: int, seeds: int, wanted: int, names: list[str]) -> int:
    """For each variant, the first seeds that catch it. Returns 1 if one got away."""
    got_away = 0
    for name in names or VARIANTS:
        found: list[int] = []
        kinds, tried = Counter[str](), 0
        for seed in range(first, first + seeds):
            tried += 1
            kind = is_caught(name, seed)
            if kind:
                kinds[kind] += 1
                found.append(seed)
            if len(found) == wanted:
                break
        got_away |= not found
        print(f'    "{name}": {tuple(found) or "GOT AWAY"},  # of {tried} {dict(kinds)}', flush=True)
    return got_away


def main() -> int:
    """Returns 1 if a schedule broke a promise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=0)
    parser.add_argument("--every", type=int, default=100, help="every so many seeds are played twice and compared")
    parser.add_argument("--variants", action="store_true", help="look for seeds that catch each variant")
    parser.add_argument("--wanted", type=int, default=3)
    parser.add_argument("names", nargs="*", help="of variants")
    arguments = parser.parse_args()
    if arguments.variants:
        return hunt(arguments.first, arguments.seeds or 1000, arguments.wanted, arguments.names)
    began, failed, counts, reach = time.monotonic(), Counter[str](), Counter[str](), Counter[str]()
    seed, end = arguments.first, arguments.first + arguments.seeds if arguments.seeds else 2**62
    while seed < end and (not arguments.minutes or time.monotonic() - began < arguments.minutes * 60):
        try:
            world = explore(seed)
            if seed % arguments.every == 0 and ModelWorld(seed).run() != world.digest:
                raise Violation("I15: the same seed gave another history")
            counts.update(world.counts)
            reach.update(name for name, count in world.counts.items() if count)
        except Violation as violation:
            failed[str(violation.args[0])] += 1
            print(f"seed {seed}: {str(violation)[:300]}", flush=True)
        seed += 1
    schedules, took = seed - arguments.first, time.monotonic() - began
    print(f"{schedules} schedules in {took:.0f} s ({schedules / took:.0f}/s), failed: {dict(failed)}")
    for name in sorted(counts):
        print(f"{counts[name]:12d}  {name}, in {reach[name]} schedules")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
