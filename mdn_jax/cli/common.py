"""What the commands share: exit statuses, messages, the checkpoint to use."""

import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import tyro

from mdn_jax.cli.interrupt import reader_left, status_of
from mdn_jax.compiled import compiled_once
from mdn_jax.errors import RunError
from mdn_jax.models import MDNForCausalLM
from mdn_jax.ops.api import Implementation
from mdn_jax.saved.anywhere import find_model, load_found
from mdn_jax.saved.tokens import load_text
from mdn_jax.text.text import Text


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Which model, and how it computes."""

    checkpoint: tyro.conf.Positional[Path]
    """Output directory of a training run or of mdn-convert, or a published folder."""

    step: int | None = None
    """Checkpoint of this step; None: the latest."""

    ema: bool = False
    """Take the moving average of a run's parameters (its optimizer.ema_decay) in their place."""

    tokenizer: Path | Literal["bytes"] | None = None
    """A tokenizer.json, or "bytes"; None: the one in the checkpoint's directory, else bytes."""

    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of activations; None: that of the training, or of the converted parameters."""

    implementation: Implementation | None = None
    """Implementation of the momentum delta rule; None: the best that supports the call."""


def open_checkpoint(config: CheckpointConfig) -> tuple[MDNForCausalLM, Text]:
    """The model and its tokens.

    Raises:
      RunError: no such checkpoint, or one that cannot be read.
      ValueError: a folder whose files do not fit.
    """
    saved = find_model(config.checkpoint, config.step, ema=config.ema)
    text = load_text(config.tokenizer, config.checkpoint, saved)
    return load_found(saved, dtype=config.dtype, implementation=config.implementation), text


def parse[C](
    program: str, description: str | None, kind: type[C], arguments: Sequence[str] | None
) -> C:
    """The command line as a configuration; `~` is the home directory in every path.

    Raises:
      SystemExit: an unknown flag or a value that does not fit (after a message), or a request for
        help.
    """
    try:
        return at_home(
            tyro.cli(kind, prog=program, description=_about(description), args=arguments)
        )
    except ValueError as error:  # of a field that is not under a prefix
        print(f"{program}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _about(description: str | None) -> str:
    return f"{description or ''}\n\n--version alone prints the version.".strip()


def at_home[T](value: T) -> T:
    """A value with `~` as the home directory in its paths, and in those of its fields and entries.

    The shell does this only for the start of a word: not in `--output=~/x` or in quotes.
    """
    new: Any = value
    if isinstance(value, Path):
        new = Path(os.path.expanduser(value))
    elif isinstance(value, tuple):
        new = tuple(at_home(entry) for entry in value)
    elif dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        new = dataclasses.replace(value, **{k: at_home(x) for k, x in fields.items()})  # type: ignore[type-var]
    return new


def parse_command[R](
    program: str,
    description: str | None,
    commands: Mapping[str, Callable[[Any], R]],
    arguments: Sequence[str] | None,
) -> Callable[[], R]:
    """The command line as one of several commands with its configuration; `~` as in `parse`.

    Args:
      program: name in messages.
      description: for the help.
      commands: functions of one configuration, which is annotated.
      arguments: without the program's name; None means `sys.argv`.

    Raises:
      SystemExit: as of `parse`.
    """

    def bind(command: Callable[[Any], R]) -> Callable[..., Callable[[], Any]]:
        kind = get_type_hints(command)["config"]

        def bound(config: Annotated[kind, tyro.conf.arg(name="")]) -> Callable[[], Any]:  # type: ignore[valid-type]
            return partial(command, at_home(config))

        bound.__doc__ = command.__doc__
        return bound

    try:
        chosen: Callable[[], R] = tyro.extras.subcommand_cli_from_dict(
            {name: bind(command) for name, command in commands.items()},
            prog=program,
            description=_about(description),
            args=arguments,
        )
        return chosen
    except ValueError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def run(program: str, command: Callable[[], int]) -> int:
    """Runs a command with an error in what the user asked for as one line.

    What it compiles is kept for the next one (`mdn_jax/compiled.py`).

    Args:
      program: name in messages.
      command: returns the exit status.

    Returns:
      The exit status: the command's, 1 after an error, 128 + n after signal n.
    """
    # Orbax logs the stack of every error that it raises as well
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        with compiled_once():
            return command()
    except (RunError, ValueError, OSError, ImportError) as error:
        if isinstance(error, BrokenPipeError):  # the reader has had enough
            return reader_left()
        print(f"{program}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print(f"\n{program}: interrupted", file=sys.stderr)
        return status_of(interrupt)
