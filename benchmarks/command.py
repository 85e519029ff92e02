"""The benchmarks as subcommands of `python -m benchmarks`."""

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.check import check
from benchmarks.context import context
from benchmarks.convolution import convolution
from benchmarks.corpus.command import corpus
from benchmarks.decode import decode
from benchmarks.decoding import decoding
from benchmarks.drift import drift
from benchmarks.generation import generation
from benchmarks.guard import guard
from benchmarks.inspect import inspect
from benchmarks.kernels import kernels
from benchmarks.language.command import language
from benchmarks.length import length
from benchmarks.mixers import mixers
from benchmarks.mqar.command import mqar
from benchmarks.numerics import numerics
from benchmarks.parity import parity
from benchmarks.residuals import residuals
from benchmarks.rowwise import rowwise
from benchmarks.scaling import scaling
from benchmarks.serving.command import serving
from benchmarks.stages import stages
from benchmarks.tasks.command import tasks
from benchmarks.throughput import throughput
from benchmarks.tracking.command import tracking
from benchmarks.training import training
from benchmarks.two_devices import two_devices
from mdn_jax.cli.common import parse_command

PROGRAM = "python -m benchmarks"
COMMANDS: dict[str, Callable[[Any], None]] = {
    "check": check,
    "context": context,
    "convolution": convolution,
    "corpus": corpus,
    "decode": decode,
    "decoding": decoding,
    "drift": drift,
    "generation": generation,
    "guard": guard,
    "inspect": inspect,
    "kernels": kernels,
    "language": language,
    "length": length,
    "mixers": mixers,
    "mqar": mqar,
    "numerics": numerics,
    "parity": parity,
    "residuals": residuals,
    "rowwise": rowwise,
    "scaling": scaling,
    "serving": serving,
    "stages": stages,
    "tasks": tasks,
    "throughput": throughput,
    "tracking": tracking,
    "training": training,
    "two_devices": two_devices,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      arguments: without the program's name; None means `sys.argv`.

    Returns:
      The exit status 0; a benchmark that fails raises.
    """
    parse(arguments)()
    return 0


def parse(arguments: Sequence[str] | None = None) -> Callable[[], None]:
    """The command line as a benchmark with its configuration.

    Raises:
      SystemExit: an unknown benchmark or flag or a value that does not fit (after a message), or a
        request for help.
    """
    about = "Benchmarks; each checks correctness before it times."
    return parse_command(PROGRAM, about, COMMANDS, arguments)
