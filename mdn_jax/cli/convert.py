"""`mdn-convert`: published checkpoint folders to ours and back."""

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro

from mdn_jax.cli.common import parse_command, run
from mdn_jax.interop import folder_parameters, new_directory, read_folder, write_folder
from mdn_jax.interop.companions import (
    copy_companions,
    model_card,
    with_tokens,
    write_companions,
)
from mdn_jax.models.sizes import parameter_count
from mdn_jax.saved.model import find_checkpoint, iterate_params, save_model
from mdn_jax.saved.record import read_record
from mdn_jax.saved.tokens import tokenizer_beside
from mdn_jax.text.vocabulary import TOKENIZER_FILE, Vocabulary

PROGRAM = "mdn-convert"

_Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Published folder (config.json and safetensors files) to a checkpoint of ours."""

    folder: tyro.conf.Positional[Path]
    """The published folder."""

    output: tyro.conf.Positional[Path]
    """Directory to make; it can be used where the output directory of a run can."""

    dtype: _Dtype | None = None
    """Type to convert the parameters to; None: they keep their own, bit for bit."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Checkpoint of ours to a published folder."""

    checkpoint: tyro.conf.Positional[Path]
    """Output directory of a training run or of mdn-convert."""

    output: tyro.conf.Positional[Path]
    """Folder to make."""

    step: int | None = None
    """Checkpoint of this step; None: the latest."""

    ema: bool = False
    """Take the moving average of a run's parameters (its optimizer.ema_decay) in their place."""

    dtype: _Dtype | None = None
    """Type to convert the parameters to; None: they keep their own, bit for bit."""

    shard_gb: float = 4.0
    """Most bytes of tensors in one file, in GB (1e9)."""

    def __post_init__(self) -> None:
        if not self.shard_gb > 0:
            raise ValueError(f"shard_gb: expected a number > 0, got {self.shard_gb!r}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    commands: dict[str, Callable[[Any], int]] = {"import": _import, "export": _export}
    return run(PROGRAM, parse_command(PROGRAM, __doc__, commands, arguments))


def _import(config: ImportConfig) -> int:
    """Published folder (config.json and safetensors files) to a checkpoint of ours."""
    folder = read_folder(config.folder)
    with new_directory(config.output) as directory, jax.default_device(jax.devices("cpu")[0]):
        params: dict[str, Any] = {}
        for path, x in _converted(folder_parameters(folder), config.dtype):
            inner = params
            for part in path[:-1]:
                inner = inner.setdefault(part, {})
            inner[path[-1]] = jax.device_put(x)
        _copy_tokenizer(config.folder / TOKENIZER_FILE, directory)
        copy_companions(config.folder, directory)
        save_model(directory, folder.config, params)
    _report(config.output, params)
    return 0


def _export(config: ExportConfig) -> int:
    """Checkpoint of ours to a published folder."""
    saved = find_checkpoint(config.checkpoint, config.step, ema=config.ema)
    tokenizer = tokenizer_beside(config.checkpoint, saved)
    vocabulary = None if tokenizer is None else Vocabulary(tokenizer)
    model = with_tokens(saved.model, vocabulary)
    record = read_record(saved.path)
    card = model_card(
        model,
        parameters=parameter_count(saved.model),
        run=record.config,
        step=saved.step,
        held_out_loss=None if config.ema else record.held_out_loss,
    )
    with new_directory(config.output) as directory:
        params = iterate_params(saved)
        limit = round(config.shard_gb * 1e9)
        write_folder(directory, model, _converted(params, config.dtype), shard_bytes=limit)
        _copy_tokenizer(tokenizer, directory)
        copy_companions(config.checkpoint, directory)
        write_companions(directory, model, vocabulary, card)
    files = sorted(path.name for path in config.output.iterdir())
    print(f"{config.output}: {', '.join(files)}")
    return 0


def _converted(
    parameters: Iterator[tuple[tuple[Any, ...], Any]], dtype: _Dtype | None
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    for path, x in parameters:
        yield path, x if dtype is None else x.astype(jnp.dtype(dtype))


def _copy_tokenizer(source: Path | None, target: Path) -> None:
    if source is not None and source.exists():
        shutil.copyfile(source, target / TOKENIZER_FILE)


def _report(output: Path, params: Any) -> None:
    leaves = jax.tree.leaves(params)
    dtypes = ", ".join(sorted({x.dtype.name for x in leaves}))
    print(f"{output}: {sum(x.size for x in leaves):,} parameters, {dtypes}")


if __name__ == "__main__":
    sys.exit(main())
