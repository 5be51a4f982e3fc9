# ruff: noqa: T201 - a report is what it is for
"""Plays many worlds.

python -m tests.simulation.soak --seeds 10000
python -m tests.simulation.soak --minutes 10 --disk
python -m tests.simulation.soak --minutes 10 --arena
python -m tests.simulation.soak --first 77 --seeds 1 --verbose
python -m tests.simulation.soak --variants
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import traceback
from collections import Counter

from fabric.testing import Violation
from tests.simulation.arena_variants import ARENA_VARIANTS
from tests.simulation.book_variants import BOOK_VARIANTS
from tests.simulation.draw import DISK, SHARED
from tests.simulation.play import play
from tests.simulation.variants import VARIANTS, broken

VARIANT_REST_S = 20.0
"""A broken fabric that is not at rest by now will not be; most of the intact ones are within a second."""


def hunt(first: int, seeds: int, wanted: int, names: list[str]) -> int:
    """For each broken variant, the first seeds that catch it. Returns 1 if one got away."""
    got_away = 0
    variants = ARENA_VARIANTS if first & SHARED else VARIANTS | BOOK_VARIANTS
    for name in names or list(variants):
        found: list[str] = []
        kinds, tried, began = Counter[str](), 0, time.monotonic()
        for seed in range(first, first + seeds):
            tried += 1
            started = time.monotonic()
            try:
                with broken(variants[name]):
                    play(seed, rest_s=VARIANT_REST_S)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is what we look for
                took = time.monotonic() - started
                play(seed, rest_s=VARIANT_REST_S)  # the intact core passes
                kinds[str(error)[:3] if isinstance(error, Violation) else type(error).__name__] += 1
                found.append(f"{seed} ({took:.1f} s)")
                if len(found) == wanted:
                    break
        got_away |= not found
        print(
            f"{name}: {', '.join(found) or 'GOT AWAY'} of {tried} {dict(kinds)} {time.monotonic() - began:.0f} s",
            flush=True,
        )
    return got_away


def main() -> int:
    """Returns 1 if a world broke a promise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=0)
    parser.add_argument("--disk", action="store_true", help="worlds whose topics spill")
    parser.add_argument("--arena", action="store_true", help="worlds whose members share memory")
    parser.add_argument("--every", type=int, default=50, help="every so many seeds are played twice and compared")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument(
        "--variants", action="store_true", help="look for seeds that catch each deliberately broken variant"
    )
    parser.add_argument("--wanted", type=int, default=3)
    parser.add_argument("names", nargs="*", help="of variants")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    first = seed = arguments.first | DISK * arguments.disk | SHARED * arguments.arena
    if arguments.variants:
        return hunt(first, arguments.seeds or 500, arguments.wanted, arguments.names)
    began, failed, counts = time.monotonic(), Counter[str](), Counter[str]()
    end = first + arguments.seeds if arguments.seeds else 2**62
    while seed < end and (not arguments.minutes or time.monotonic() - began < arguments.minutes * 60):
        try:
            outcome = play(seed)
            if seed % arguments.every == 0 and play(seed).digest != outcome.digest:
                raise AssertionError("I15: the same seed gave another history")
            counts.update(outcome.counts)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what we look for
            failed[f"{type(error).__name__}: {str(error)[:3]}"] += 1
            print(f"seed {seed}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            if arguments.verbose:
                traceback.print_exc()
        seed += 1
    worlds, took = seed - first, time.monotonic() - began
    print(f"{worlds} worlds in {took:.0f} s ({worlds / took:.1f}/s), failed: {dict(failed)}")
    for name in sorted(counts) if arguments.verbose or not failed else ():
        print(f"{counts[name]:12d}  {name}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
