"""The benchmarks as subcommands of `python -m benchmarks`."""

from collections.abc import Sequence

import tyro

from benchmarks.check import check
from benchmarks.context import context
from benchmarks.convolution import convolution
from benchmarks.corpus.command import corpus
from benchmarks.decode import decode
from benchmarks.generation import generation
from benchmarks.guard import guard
from benchmarks.inspect import inspect
from benchmarks.kernels import kernels
from benchmarks.language.command import language
from benchmarks.mixers import mixers
from benchmarks.mqar.command import mqar
from benchmarks.numerics import numerics
from benchmarks.parity import parity
from benchmarks.scaling import scaling
from benchmarks.stages import stages
from benchmarks.tasks.command import tasks
from benchmarks.throughput import throughput
from benchmarks.tracking.command import tracking
from benchmarks.training import training


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      arguments: without the program's name; None means `sys.argv`.

    Returns:
      The exit status 0; a benchmark that fails raises.
    """
    tyro.extras.subcommand_cli_from_dict(
        {
            "check": check,
            "context": context,
            "convolution": convolution,
            "corpus": corpus,
            "decode": decode,
            "generation": generation,
            "guard": guard,
            "inspect": inspect,
            "kernels": kernels,
            "language": language,
            "mixers": mixers,
            "mqar": mqar,
            "numerics": numerics,
            "parity": parity,
            "scaling": scaling,
            "stages": stages,
            "tasks": tasks,
            "throughput": throughput,
            "tracking": tracking,
            "training": training,
        },
        prog="python -m benchmarks",
        description="Benchmarks; each checks correctness before it times. --version: prints it.",
        args=arguments,
    )
    return 0
