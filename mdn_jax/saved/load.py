"""A model from wherever it lies."""

import os
from pathlib import Path
from typing import Literal

from mdn_jax.models.causal_lm import MDNForCausalLM
from mdn_jax.ops.api import Implementation


def load(
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    implementation: Implementation | None = None,
) -> MDNForCausalLM:
    """The model of a training run, of `mdn-convert`, or of a published folder.

    Args:
      path: the directory of a run or of `mdn-convert import`, or a folder with `config.json` and
        safetensors files, published or of `mdn-convert export`.
      step: the checkpoint of this step; None: the latest. A folder has none.
      dtype: of the computation. None: as in training; for a converted model the parameters' own,
        for a folder float32.
      implementation: of the momentum delta rule; None: the best that supports the call.

    Raises:
      ValueError: neither of these, a step of a folder, or files that do not fit.
      RunError: a checkpoint that is not there or is damaged.
      ImportError: a folder, without the safetensors library.
    """
    # what reads checkpoints takes longer to import than the library itself
    from mdn_jax.interop.folder import model_from_folder
    from mdn_jax.saved.model import DIRECTORY, find_checkpoint, load_model

    directory = Path(path).expanduser()
    if (directory / DIRECTORY).is_dir():
        return load_model(
            find_checkpoint(directory, step), dtype=dtype, implementation=implementation
        )
    if not any(directory.glob("*.safetensors")):
        raise ValueError(
            f"path: expected a directory with {DIRECTORY}/ or with safetensors files, got {path}"
        )
    if step is not None:
        raise ValueError(f"step: expected None for a folder of one model, got {step}")
    return model_from_folder(directory, dtype=dtype or "float32", implementation=implementation)
