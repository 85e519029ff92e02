"""Models where they lie: in the directory of a run or a conversion, or in a published folder."""

from pathlib import Path

from mdn_jax.models import MDNForCausalLM
from mdn_jax.ops.api import Implementation
from mdn_jax.saved.model import DIRECTORY, Saved, find_checkpoint, load_model


def find_model(directory: Path, step: int | None = None, *, ema: bool = False) -> Saved:
    """What `directory` holds: a checkpoint, or a folder with safetensors files.

    Args:
      directory: of a run, of `mdn-convert import`, published or of `mdn-convert export`.
      step: the checkpoint of this step; None: the latest. A folder has none.
      ema: the moving average of a run's parameters in their place. A folder has none.

    Raises:
      NoModelError: neither of these.
      RunError: a checkpoint that is not there or is damaged.
      ValueError: files of a folder that do not fit, or a step or an average of one.
      ImportError: a folder, without the safetensors library.
    """
    if (directory / DIRECTORY).is_dir() or not any(directory.glob("*.safetensors")):
        return find_checkpoint(directory, step, ema=ema)
    if step is not None:
        raise ValueError(f"step: expected None for a folder of one model, got {step}")
    if ema:
        raise ValueError("ema: expected False for a folder of one model, got True")
    from mdn_jax.interop.folder import read_folder  # a checkpoint needs none of interop

    return Saved(directory, 0, read_folder(directory).config, None, folder=True)


def load_found(
    saved: Saved, *, dtype: str | None = None, implementation: Implementation | None = None
) -> MDNForCausalLM:
    """The model.

    Args:
      saved: from `find_model`.
      dtype: of the computation; None: as in training, or the parameters' own.
      implementation: of the momentum delta rule.

    Raises:
      RunError: parameters that do not fit or cannot be read.
      ValueError: the same, of a folder.
    """
    if not saved.folder:
        return load_model(saved, dtype=dtype, implementation=implementation)
    from mdn_jax.interop.folder import model_from_folder

    return model_from_folder(saved.path, dtype=dtype, implementation=implementation)
