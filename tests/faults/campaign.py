"""The fault campaign: a small run is attacked in every way we know, and a table says what came.

It exits 1 if an attack was not survived, and says how to repeat it. Attacks are drawn by a seed.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from tabulate import tabulate

from tests.faults import damage, folders, kills, machine
from tests.faults.common import Attempt, NotTriedError, Place

# the longest first
_PARTS: dict[str, Callable[..., Iterable[Attempt]]] = {
    "files-0": partial(damage.attack, part=0),
    "files-1": partial(damage.attack, part=1),
    "kills": lambda place, rng, quick: kills.attack(place, rng, kills=5 if quick else 24),
    "folders": folders.attack,
    "disk": machine.full_disk,
    "two": machine.two_runs,
    "hosts": machine.hosts,
}


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a part of it, two minutes at most")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (0)")
    parser.add_argument("--only", nargs="+", choices=_PARTS, default=list(_PARTS), help="parts")
    options = parser.parse_args()
    began = time.monotonic()
    place = Place(Path(tempfile.mkdtemp(prefix="mdn-faults-")))
    os.environ["XDG_CACHE_HOME"] = str(place.root / "cache")  # what commands compile and keep
    place.prepare()
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        work = partial(_try, place, options.seed, options.quick)
        results = list(pool.map(work, options.only))
    attempts = [attempt for tried, _ in results for attempt in tried]
    print(table(attempts))
    for name, (_, reason) in zip(options.only, results, strict=True):
        if reason is not None:
            print(f"{name}: not tried: {reason}")
    failed = [attempt for attempt in attempts if attempt.failure is not None]
    if failed:
        print(f"{len(failed)} not survived, as said above; the files are in {place.root}")
        print(f"again: python -m tests.faults --seed {options.seed}{' --quick' * options.quick}")
    else:
        shutil.rmtree(place.root)
    print(f"seed {options.seed}, {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


def table(attempts: Iterable[Attempt]) -> str:
    """Kinds of attacks, tried and survived."""
    tried, survived = Counter[str](), Counter[str]()
    for attempt in attempts:
        tried[attempt.kind] += 1
        survived[attempt.kind] += attempt.failure is None
    rows = [(kind, count, survived[kind]) for kind, count in sorted(tried.items())]
    rows.append(("all", tried.total(), survived.total()))
    return tabulate(rows, headers=("attack", "tried", "survived"), tablefmt="github")


def _try(place: Place, seed: int, quick: bool, name: str) -> tuple[list[Attempt], str | None]:
    """The attacks of one part, or why there were none."""
    began = time.monotonic()
    rng, attempts = random.Random(f"{seed} {name}"), list[Attempt]()
    try:
        for attempt in _PARTS[name](place, rng, quick=quick):
            attempts.append(attempt)
            if attempt.failure is not None:
                print(f"NOT SURVIVED {attempt.kind}\n  {attempt.what}\n  {attempt.failure}")
                sys.stdout.flush()
    except NotTriedError as reason:
        return attempts, str(reason)
    print(f"{name}: {len(attempts)} attacks, {time.monotonic() - began:.0f} s", file=sys.stderr)
    return attempts, None
