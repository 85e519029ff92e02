"""How the programs of a kernel that walks over chunks are launched: whole, or in halves."""

from typing import NamedTuple

from jax.experimental import pallas as pl


class Launch(NamedTuple):
    """Some of the programs of a kernel that walks over chunks.

    Attributes:
      first: number of the first.
      programs: how many.
    """

    first: int
    programs: int


_ROUNDS_IN_HALVES = 3
"""Of whole walks, at most, to be cut."""


def launches(walks: int, resident: int | None) -> list[Launch | None]:
    """One launch of whole walks, or several of halves where that leaves the device less idle.

    A device that runs `resident` programs at once takes `ceil(walks / resident)` rounds, the last
    one with what is left. In halves, twice as many programs take half the time each, and more of
    the rounds are full. Launches end between rounds, so that no second half of a walk is in the
    launch of its first, whose states it continues. Of more than three rounds halves save an eighth
    at most, and each launch is a kernel to compile: those stay whole.

    Args:
      walks: programs over whole walks.
      resident: programs that run at once; None: not known.

    Returns:
      The launches of all `2 * walks` halves, first halves first; or None, the launch of the whole.
    """
    if resident is None or not resident < walks <= _ROUNDS_IN_HALVES * resident:
        return [None]
    rounds = pl.cdiv(2 * walks, resident)
    if rounds == 2 * pl.cdiv(walks, resident):
        return [None]
    size = pl.cdiv(2 * walks, rounds)
    return [Launch(first, min(size, 2 * walks - first)) for first in range(0, 2 * walks, size)]
