"""Where the commands begin: a signal ends them in one line, from the first import on."""

import importlib
import sys

from train.interrupt import CommandSignals, status_of


def train() -> int:
    """`mdn-train`."""
    return _command("mdn-train", "train.main")


def generate() -> int:
    """`mdn-generate`."""
    return _command("mdn-generate", "train.cli.generate")


def evaluate() -> int:
    """`mdn-eval`."""
    return _command("mdn-eval", "train.cli.evaluate")


def convert() -> int:
    """`mdn-convert`."""
    return _command("mdn-convert", "train.cli.convert")


def tokenize() -> int:
    """`mdn-tokenize`."""
    return _command("mdn-tokenize", "train.cli.tokenize")


def plot() -> int:
    """`mdn-plot`."""
    return _command("mdn-plot", "train.cli.plot")


def inspect() -> int:
    """`mdn-inspect`."""
    return _command("mdn-inspect", "train.cli.inspect_checkpoint")


def _command(program: str, module: str) -> int:
    """Runs the `main` of a module on the arguments of the process; returns the exit status."""
    signals = CommandSignals(program)
    try:
        status: int = importlib.import_module(module).main()
    except KeyboardInterrupt as interrupt:  # while it was imported
        print(f"{program}: interrupted", file=sys.stderr)
        status = status_of(interrupt)
    signals.said = True  # what is left of the process can be cut short
    return status
