"""A model from wherever it lies."""

import os
from pathlib import Path
from typing import Literal

from mdn_jax.errors import NoModelError
from mdn_jax.models.causal_lm import MDNForCausalLM
from mdn_jax.ops.api import Implementation


def load(
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    ema: bool = False,
    dtype: Literal["float32", "bfloat16"] | None = None,
    implementation: Implementation | None = None,
) -> MDNForCausalLM:
    """The model of a training run, of `mdn-convert`, or of a published folder.

    Args:
      path: the directory of a run or of `mdn-convert import`, or a folder with `config.json` and
        safetensors files, published or of `mdn-convert export`.
      step: the checkpoint of this step; None: the latest. A folder has none.
      ema: the moving average of a run's parameters (`optimizer.ema_decay`) in their place.
      dtype: of the computation. None: as in training; for a converted model or a folder the
        parameters' own.
      implementation: of the momentum delta rule; None: the best that supports the call.

    Raises:
      ValueError: neither of these, a step or an average of a folder, or files that do not fit.
      RunError: a checkpoint that is not there or is damaged.
      ImportError: a folder, without the safetensors library.
    """
    # what reads checkpoints takes longer to import than the library itself
    from mdn_jax.saved.anywhere import find_model, load_found

    directory = Path(path).expanduser()
    try:
        saved = find_model(directory, step, ema=ema)
    except NoModelError:
        raise ValueError(
            "path: expected the output directory of a run or of a conversion, or a folder with "
            f"safetensors files, got {path}"
        ) from None
    return load_found(saved, dtype=dtype, implementation=implementation)
