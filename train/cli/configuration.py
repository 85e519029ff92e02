"""What a command line of `python -m train` describes: a recipe, a file or a run, and flags."""

import argparse
import dataclasses
import importlib.util
import inspect
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from configs import CONFIGS, describe
from mdn_jax import __version__
from mdn_jax.errors import RunError
from mdn_jax.saved.model import DIRECTORY, complete_steps
from mdn_jax.saved.record import DamagedError, read_record
from mdn_jax.text.tokenizer import BYTES, TOKENIZER_FILE
from train import PROGRAM
from train.cli import COMMANDS
from train.cli.json_flags import json_flags
from train.config import TrainConfig, from_dict, to_dict
from train.config_file import READERS, as_toml, is_config_file, read_config_file, write_config_file
from train.config_sections import DistributedConfig
from train.origin import find_origin

# A section whose name alone is a flag.
_SHORT = {
    "--distributed": "--distributed.enabled",
    "--no-distributed": "--distributed.no-enabled",
}
_RECIPE = "config"  # the name in a Python file


def parse(arguments: Sequence[str]) -> TrainConfig:
    """Reads what to begin with, and the flags that change its fields.

    It is the name of a recipe, a configuration file, a Python file with a recipe, or the directory
    of a run. A run that resumes begins with what its last checkpoint has, whatever is named.

    Raises:
      SystemExit: an unknown name or flag or a value that does not fit (after a message), or a
        request for help or for the configuration.
    """
    parser = _parser()
    first, *_ = [*arguments, "--"]
    named = not first.startswith("-") or first in ("-h", "--help", "--version")
    chosen = parser.parse_args(arguments if named else ["", *arguments])
    own, flags = _own_flags(chosen.flags)
    try:
        config, about, resumed = _begin(chosen.configuration, own)
        if not resumed:
            config = _with_origin(config, chosen.configuration, own.init_from)
    except (RunError, ValueError) as error:
        parser.exit(2, f"{PROGRAM}: error: {error}\n")
    config = tyro.cli(
        TrainConfig,
        prog=f"{PROGRAM} {chosen.configuration}".strip(),
        description=about,
        default=config,
        args=[_SHORT.get(flag, flag) for flag in flags],
        registry=json_flags(),
    )
    if _states(flags, "--model.vocab-size"):
        config = dataclasses.replace(config, fit_vocab_size=False)
    if own.save_config is not None:
        try:
            write_config_file(own.save_config, config)
        except RunError as error:
            parser.exit(2, f"{PROGRAM}: error: {error}\n")
    if own.print_config:
        print(as_toml(config), end="")
    if own.print_config or own.save_config is not None:
        raise SystemExit(0)
    return config


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Trains a model from a recipe, a configuration file or a run's directory.",
        epilog="recipes:\n"
        + "\n".join(f"  {name:20}{describe(name)}" for name in CONFIGS)
        + "\n\nor a file: "
        + ", ".join(READERS)
        + f" (fields), .py (a recipe of your own: `{_RECIPE}`)"
        + "\n\ncommands in place of a recipe:\n"
        + "\n".join(f"  {name:20}{what}" for name, what in COMMANDS.items())
        + "\n\n  --print-config      prints the whole configuration as TOML, and ends"
        + "\n  --save-config PATH  writes it to a file, by its suffix, and ends"
        + f"\n\n'{PROGRAM} smoke --help' lists the fields, every one a flag, with their defaults.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} (mdn-jax) {__version__}")
    parser.add_argument("configuration", help="a recipe, a file, or a run's directory to resume")
    parser.add_argument(
        "flags", nargs=argparse.REMAINDER, metavar="--field value", help="fields to change"
    )
    return parser


def _own_flags(flags: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags that are no fields, and those that say where a configuration is; all fields."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--print-config", "--print_config", action="store_true")
    parser.add_argument("--save-config", "--save_config")
    own, fields = parser.parse_known_args(flags)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--resume-step", "--resume_step", type=int)
    parser.add_argument("--output-dir", "--output_dir")
    parser.add_argument("--init-from", "--init_from")
    parser.add_argument("--name")
    parser.parse_known_args(fields, own)
    return own, fields


def _states(flags: Sequence[str], flag: str) -> bool:
    names = (name.partition("=")[0].replace("_", "-") for name in flags)
    return flag in names


def _begin(name: str, own: argparse.Namespace) -> tuple[TrainConfig, str, bool]:
    """What the flags change, a line on it, and whether it is what a run that resumes has.

    Raises:
      RunError, ValueError: nothing of this name, or a file that is no configuration.
    """
    directory = Path(os.path.expanduser(name)) if name else None
    if directory is not None and complete_steps(directory / DIRECTORY):
        if not own.resume:
            raise RunError(f"resume: expected --resume with the directory of a run, got {name}")
        saved = _saved(directory, own.resume_step)
        if saved is None:
            raise RunError(f"configuration: expected that of a run in {name}, got a model's alone")
        return saved, f"The run in {name}.", True
    begin, about = None, ""
    if name:
        begin, about = _named(name)
    if own.resume:
        place = own.output_dir or (begin and (begin.output_dir or f"runs/{own.name or begin.name}"))
        if not place:
            raise RunError("output_dir: expected the directory of the run to resume, got none")
        saved = _saved(Path(os.path.expanduser(place)), own.resume_step)
        if saved is not None:
            if begin is not None:
                saved = _with_stated(saved, begin, name)
            return saved, about or f"The run in {place}.", True
    if begin is None:
        where = f"a run in {own.output_dir}" if own.resume else "a recipe, a file or a directory"
        raise RunError(f"configuration: expected {where}, got none; recipes: {', '.join(CONFIGS)}")
    return begin, about, False


def _with_origin(config: TrainConfig, name: str, flag: str | None) -> TrainConfig:
    """The configuration with the model that it begins with, where it begins with one.

    What a file states of the model is kept: what contradicts is an error later.

    Raises:
      RunError: nothing to begin with.
    """
    origin = config.init_from if flag is None else flag
    if origin is None or origin == "None":
        return config
    model = find_origin(origin).model
    config = dataclasses.replace(config, model=model, fit_vocab_size=False)
    if is_config_file(name):
        config = read_config_file(name, CONFIGS, base=to_dict(config))
    return config


def _named(name: str) -> tuple[TrainConfig, str]:
    file, _, recipe = name.partition(".py:")
    if name.lower().endswith(".py") or recipe:
        return _python_recipe(Path(os.path.expanduser(f"{file}.py" if recipe else name)), recipe)
    if is_config_file(name):
        return read_config_file(name, CONFIGS), f"The configuration in {name}."
    if name not in CONFIGS:
        raise RunError(
            f"configuration: expected one of {', '.join(CONFIGS)}, a file "
            f"({', '.join(READERS)}, .py) or the directory of a run, got {name!r}"
        )
    return CONFIGS[name](), describe(name)


def _python_recipe(path: Path, name: str) -> tuple[TrainConfig, str]:
    """The recipe in a Python file: a function that returns one, or a variable."""
    name = name or _RECIPE
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # where dataclasses of the file look for themselves
    try:
        spec.loader.exec_module(module)
        found = getattr(module, name, None)
        config = found() if callable(found) else found
    except Exception as error:  # of somebody's program
        reason = " ".join(str(error).split())
        raise RunError(f"{path}: expected a recipe, got {type(error).__name__}: {reason}") from None
    if not isinstance(config, TrainConfig):
        raise RunError(
            f"{path}: expected a TrainConfig as {name}, or a function {name}() that returns one, "
            f"got {'none' if found is None else type(config).__name__}"
        )
    about = inspect.getdoc(found) if callable(found) else None
    return config, (about or f"The recipe {name} of {path}.").partition("\n")[0]


def _saved(directory: Path, step: int | None) -> TrainConfig | None:
    """What a checkpoint of a run has, but for what is of one start; None: there is no run.

    The record of a checkpoint has a digest; `config.json` has none.

    Raises:
      RunError: no record that can be read.
      ValueError: a field that is not known, of a later version.
    """
    steps = complete_steps(directory / DIRECTORY)
    steps = [step] if step in steps else steps[::-1]
    damage = ""
    for number in steps:
        try:
            record = read_record(directory.absolute() / DIRECTORY / str(number))
        except DamagedError as error:  # which reading the state names, with the way out
            damage = damage or f"{error} in the checkpoint of step {number}"
            continue
        if record.corpus is None:  # a converted model
            return None
        values = dict(record.config)
        # before the field there was, no files meant the standard library
        values["data"] = {"standard_library": True} | values.get("data", {})
        saved = from_dict({k: x for k, x in values.items() if k not in ("resume", "resume_step")})
        data, own = saved.data, directory.absolute() / TOKENIZER_FILE
        named = None if data.tokenizer in (None, BYTES) else Path(str(data.tokenizer)).expanduser()
        if named is not None and not named.exists() and own.exists():
            data = dataclasses.replace(data, tokenizer=str(own))
        return dataclasses.replace(
            saved,
            output_dir=str(directory.absolute()),
            distributed=DistributedConfig(),
            data=data,
        )
    if damage:
        raise RunError(f"resume: expected an intact checkpoint in {directory}, got {damage}")
    return None


def _with_stated(saved: TrainConfig, begin: TrainConfig, name: str) -> TrainConfig:
    """A run's configuration, resumed under the name of a recipe, or with the fields of a file.

    Raises:
      RunError: a recipe of another model, or a file that does not fit.
    """
    if is_config_file(name):
        stated = read_config_file(name, CONFIGS, base=to_dict(saved))
        return dataclasses.replace(stated, output_dir=saved.output_dir)
    if begin.name != saved.name and begin.model != saved.model:
        raise RunError(
            f"configuration: expected that of the run in {saved.output_dir} (name {saved.name!r}), "
            f"got {name}, which has another name and another model; to resume the run as it is: "
            f"{PROGRAM} {saved.output_dir} --resume"
        )
    return saved
