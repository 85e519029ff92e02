"""`mdn-bench`: the benchmarks as subcommands."""

import tyro

from benchmarks.inspect import inspect
from benchmarks.kernels import kernels
from benchmarks.parity import parity


def main() -> None:
    """Entry point of the console script."""
    tyro.extras.subcommand_cli_from_dict(
        {"inspect": inspect, "kernels": kernels, "parity": parity},
        prog="mdn-bench",
        description="Benchmarks; each checks correctness before it times.",
    )


if __name__ == "__main__":
    main()
