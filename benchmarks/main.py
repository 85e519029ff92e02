"""`mdn-bench`: the benchmarks as subcommands."""

import tyro

from benchmarks.check import check
from benchmarks.decode import decode
from benchmarks.generation import generation
from benchmarks.guard import guard
from benchmarks.inspect import inspect
from benchmarks.kernels import kernels
from benchmarks.language import language
from benchmarks.mixers import mixers
from benchmarks.numerics import numerics
from benchmarks.parity import parity
from benchmarks.scaling import scaling
from benchmarks.stages import stages
from benchmarks.tasks.command import tasks
from benchmarks.throughput import throughput
from benchmarks.training import training


def main() -> None:
    """Entry point of the console script."""
    tyro.extras.subcommand_cli_from_dict(
        {
            "check": check,
            "decode": decode,
            "generation": generation,
            "guard": guard,
            "inspect": inspect,
            "kernels": kernels,
            "language": language,
            "mixers": mixers,
            "numerics": numerics,
            "parity": parity,
            "scaling": scaling,
            "stages": stages,
            "tasks": tasks,
            "throughput": throughput,
            "training": training,
        },
        prog="mdn-bench",
        description="Benchmarks; each checks correctness before it times.",
    )


if __name__ == "__main__":
    main()
