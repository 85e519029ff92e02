"""`mdn-bench`: the benchmarks as subcommands."""

import tyro

from benchmarks.inspect import inspect
from benchmarks.kernels import kernels


def main() -> None:
    """Entry point of the console script."""
    tyro.extras.subcommand_cli_from_dict(
        {"inspect": inspect, "kernels": kernels},
        prog="mdn-bench",
        description="Benchmarks; each checks correctness before it times.",
    )


if __name__ == "__main__":
    main()
