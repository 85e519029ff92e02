"""Several processes as one run: who they are, who speaks, what they agree on, how they end."""

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mdn_jax.errors import RunError
from train import PROGRAM
from train.config import TrainConfig, to_dict
from train.config_sections import DistributedConfig
from train.options import flatten, options
from train.parallel.lifeline import Lifeline, leave_now
from train.parallel.meeting import WAIT, Hub, Spoke
from train.parallel.relay import open_relay

_HEARTBEATS = 3600  # seconds that JAX may miss one: the lifeline sees the dead, and says so

_PROXIES = {"grpc_proxy", "https_proxy", "http_proxy"}  # that JAX's connections would take

_lifeline: Lifeline | None = None


@contextlib.contextmanager
def several(config: DistributedConfig) -> Iterator[None]:
    """A run with the other processes, where the configuration says that there are some.

    To be entered before anything else uses JAX. It is left when every process is done. What one of
    them raises ends all of them within seconds, and so does the death of one. A process that waits
    for a device then ends where it is, with the message and exit status 1.

    Raises:
      RunError: no cluster that JAX recognises, processes that do not come or do not fit, or the
        failure of another process.
    """
    _start(config)
    with together():
        yield
        if _lifeline is not None:
            _lifeline.gather("done")
            _lifeline.leaving = True


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What is raised within is told to the other processes, which end with it.

    Raises:
      RunError: in place of an error that came of another process's end, what ended that.
    """
    try:
        yield
    except BaseException as error:
        if _lifeline is None:
            raise
        if isinstance(error, RunError):
            message = str(error)
        elif isinstance(error, KeyboardInterrupt):
            message = "interrupted"
        else:
            message = f"{type(error).__name__}: {str(error).partition('\n')[0]}"
        ends = _lifeline.settle(error, message)
        if ends == str(error) or isinstance(error, KeyboardInterrupt):
            raise
        if ends == message:  # of this process, and nothing that was foreseen
            traceback.print_exc()
        raise RunError(ends) from None


def leave(status: int) -> int:
    """The exit status after an error; does not return where JAX would wait for other processes."""
    if _lifeline is not None:
        _lifeline.leaving = True
        leave_now(status)
    return status


def _start(config: DistributedConfig) -> None:
    global _lifeline
    if not config.enabled and config.coordinator is None:
        return
    address, count, index = _find(config)
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise RunError(f"distributed.coordinator: expected HOST:PORT, got {address!r}")
    lifeline: Lifeline
    if index == 0:
        lifeline = hub = Hub(int(port), count)
        local = hub.service
    else:
        lifeline = Spoke(host, int(port), index, count)
        local = open_relay(host, int(port), leaving=lambda: lifeline.leaving)
    _lifeline = lifeline
    with together():
        names = ("jax", "jaxlib", "mdn-jax")
        check_alike("versions", {name: version(name) for name in names})
        # signals are the run's own (mdn_jax.cli.interrupt)
        jax.config.update("jax_enable_preemption_service", False)
        if _PROXIES & os.environ.keys():  # not for this host
            os.environ.setdefault("no_grpc_proxy", "127.0.0.1")
        try:
            jax.distributed.initialize(
                f"127.0.0.1:{local}",
                count,
                index,
                coordinator_bind_address=f"127.0.0.1:{local}",
                heartbeat_timeout_seconds=_HEARTBEATS,
            )
        except (RuntimeError, ValueError) as error:
            raise RunError(f"distributed: expected JAX to start, got: {error}") from None


def _find(config: DistributedConfig) -> tuple[str, int, int]:
    """Address of process 0, number of processes, and which this is."""
    address, count, index = config.coordinator, config.processes, config.index
    if address is None:
        from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize asks

        try:
            address, count, index, _ = ClusterEnv.auto_detect_unset_distributed_params(
                os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, round(WAIT)
            )
        except (RuntimeError, ValueError, KeyError, OSError) as error:
            raise RunError(
                f"distributed: expected a cluster that JAX knows, got: {error}"
            ) from None
    if address is None or count is None or index is None:
        raise RunError(
            "distributed: expected an environment that names the processes (Slurm, Open MPI, "
            "Kubernetes, TPU), got none; name them with --distributed.coordinator HOST:PORT "
            "--distributed.processes N --distributed.index I"
        )
    return address, count, index


def is_first() -> bool:
    """Whether this is the process that prints and writes files (checkpoints: all do)."""
    return jax.process_index() == 0


def say(warning: str) -> None:
    """Prints a warning to standard error, in one process."""
    if is_first():
        print(f"{PROGRAM}: warning: {warning}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def only_first_prints() -> Iterator[None]:
    """Standard output of the other processes goes nowhere; errors of all are seen."""
    if is_first():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def from_all(value: Any) -> list[Any]:
    """What each process brings to a call, in JSON values, by the number of the process.

    Raises:
      RunError: another process failed.
    """
    if _lifeline is not None:
        return _lifeline.gather(value)
    if jax.process_count() == 1:
        return [value]
    # processes that someone else has brought together
    text = np.frombuffer(json.dumps(value, default=int).encode(), np.uint8)
    length = int(multihost_utils.process_allgather(np.int32(len(text))).max())
    padded = np.full(length, ord(" "), np.uint8)
    padded[: len(text)] = text
    return [json.loads(row.tobytes()) for row in multihost_utils.process_allgather(padded)]


def check_alike(what: str, values: Mapping[str, Any]) -> None:
    """Raises, in every process, unless all bring the same values.

    Args:
      what: they are, in words.
      values: JSON values by their names.

    Raises:
      RunError: names what differs first, and where.
    """
    first, *others = from_all(dict(values))
    for index, other in enumerate(others, 1):
        names = [x for x in first | other if first.get(x) != other.get(x)]
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise RunError(
                f"{names[0]}: expected the same {what} in every process, got "
                f"{first.get(names[0])!r} in process 0 and {other.get(names[0])!r} in process "
                f"{index}{more}"
            )


def check_configuration(config: TrainConfig) -> None:
    """Raises, in every process, unless all have the same flags and devices.

    But for the flags that a process may have as its own, which is metadata of the field.

    Args:
      config: resolved configuration.

    Raises:
      RunError: names what differs first, and where.
    """
    # documents and tokenizer are compared by their digests
    own = {name for name, option in options(TrainConfig).items() if option.processes == "own"}
    flags = flatten(to_dict(config))
    check_alike("flags", {name: x for name, x in flags.items() if name not in own})
    kinds = sorted(device.device_kind for device in jax.local_devices())
    check_alike("devices", {"devices": ", ".join(kinds)})


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
