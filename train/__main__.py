"""`python -m train`: trains a model; `tokenize` and `plot` are commands of their own."""

import sys

from mdn_jax.cli.commands import command
from train import PROGRAM
from train.cli import COMMANDS


def main() -> int:
    """Runs the command line of the process; returns the exit status."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] in COMMANDS:
        name, *rest = arguments
        return command(f"{PROGRAM} {name}", f"train.cli.{name}", rest, extra="train")
    return command(PROGRAM, "train.cli.train", arguments, extra="train")


if __name__ == "__main__":
    sys.exit(main())
