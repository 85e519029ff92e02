"""Where the commands begin: a signal ends them in one line, from the first import on."""

import contextlib
import gc
import importlib
import sys
from collections.abc import Iterator, Sequence

from mdn_jax._version import __version__
from mdn_jax.cli.interrupt import CommandSignals, reader_left, status_of
from mdn_jax.extras import install

_OURS = {"", "mdn_jax", "pallas_kernels", "train", "configs", "benchmarks"}


def generate() -> int:
    """`mdn-generate`."""
    return command("mdn-generate", "mdn_jax.cli.generate")


def evaluate() -> int:
    """`mdn-eval`."""
    return command("mdn-eval", "mdn_jax.cli.evaluate")


def convert() -> int:
    """`mdn-convert`."""
    return command("mdn-convert", "mdn_jax.cli.convert")


def inspect() -> int:
    """`mdn-inspect`."""
    return command("mdn-inspect", "mdn_jax.cli.inspect_checkpoint")


def serve() -> int:
    """`mdn-serve`."""
    return command("mdn-serve", "mdn_jax.cli.serve", extra="serve")


def command(
    program: str, module: str, arguments: Sequence[str] | None = None, *, extra: str = "cli"
) -> int:
    """Runs the `main` of a module, or prints the version.

    Args:
      program: name in messages.
      module: has a function `main` from arguments to an exit status; it is imported here.
      arguments: without the program's name; None means `sys.argv`.
      extra: of mdn-jax, with the packages that the module imports.

    Returns:
      The exit status: that of `main`, 1 where a package is missing, 128 + n after signal n.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments == ["--version"]:
        print(f"{program} (mdn-jax) {__version__}")
        return 0
    signals = CommandSignals(program)
    try:
        with _lasting():
            main = importlib.import_module(module).main
    except KeyboardInterrupt as interrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        status = status_of(interrupt)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in _OURS:
            raise
        print(
            f"{program}: error: expected the package {error.name}, got none: {install(extra)}",
            file=sys.stderr,
        )
        status = 1
    else:
        try:
            try:
                status = main(arguments)
            finally:
                sys.stdout.flush()
        except BrokenPipeError:  # while it printed help
            status = reader_left()
        except KeyboardInterrupt as interrupt:  # while it read the arguments
            print(f"{program}: interrupted", file=sys.stderr)
            status = status_of(interrupt)
    signals.said = True  # what is left of the process can be cut short
    return status


@contextlib.contextmanager
def _lasting() -> Iterator[None]:
    """What is made inside stays to the end of the process: no search for garbage walks over it."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
