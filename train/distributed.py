"""Several processes as one run: who they are, who speaks, and what they agree on."""

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from train.errors import RunError
from train.sections import DistributedConfig


def start(config: DistributedConfig) -> None:
    """Meets the other processes, where the configuration says that there are some.

    To be called before anything else uses JAX.

    Raises:
      RunError: no cluster that JAX recognises, or processes that do not come.
    """
    if not config.enabled and config.coordinator is None:
        return
    try:
        jax.distributed.initialize(config.coordinator, config.processes, config.index)
    except (RuntimeError, ValueError) as error:
        hint = (
            "; name them with --distributed.coordinator HOST:PORT --distributed.processes N "
            "--distributed.index I"
            if config.coordinator is None
            else ""
        )
        raise RunError(f"distributed: expected processes to meet, got: {error}{hint}") from None


def is_first() -> bool:
    """Whether this is the process that prints and writes files (checkpoints: all do)."""
    return jax.process_index() == 0


@contextlib.contextmanager
def only_first_prints() -> Iterator[None]:
    """Standard output of the other processes goes nowhere; errors of all are seen."""
    if is_first():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def from_all(value: Any) -> list[Any]:
    """What each process brings to a call, in JSON values, by the number of the process."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value, default=int).encode(), np.uint8)
    length = int(multihost_utils.process_allgather(np.int32(len(text))).max())
    padded = np.full(length, ord(" "), np.uint8)
    padded[: len(text)] = text
    return [json.loads(row.tobytes()) for row in multihost_utils.process_allgather(padded)]


class Agreement:
    """The largest number that any process brought to a call, the same on all of them.

    With one process it is that of the call itself. With several it is that of the call before, so
    that no device waits for it: the numbers travel behind the step's own work.
    """

    def __init__(self) -> None:
        self._before: jax.Array | None = None
        self._alone = jax.process_count() == 1
        if not self._alone:
            mesh = jax.make_mesh((jax.device_count(),), ("all",), (AxisType.Auto,))
            self._each = NamedSharding(mesh, PartitionSpec("all"))
            self._largest = jax.jit(
                lambda numbers: numbers.max(), out_shardings=NamedSharding(mesh, PartitionSpec())
            )

    def __call__(self, number: int) -> int:
        """Brings a number, at least 0; every process makes the same calls."""
        if self._alone:
            return number
        mine = np.full(jax.local_device_count(), number, np.int32)
        before = self._before
        self._before = self._largest(jax.make_array_from_process_local_data(self._each, mine))
        return 0 if before is None else int(before)
