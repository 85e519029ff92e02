"""Published checkpoints and configurations, both ways."""

from mdn_jax.interop.folder import (
    folder_parameters,
    model_from_folder,
    read_folder,
    write_folder,
)
from mdn_jax.interop.new_directory import new_directory
from mdn_jax.interop.official import (
    layer_from_official,
    model_from_official,
    official_state_dict,
)

__all__ = [
    "folder_parameters",
    "layer_from_official",
    "model_from_folder",
    "model_from_official",
    "new_directory",
    "official_state_dict",
    "read_folder",
    "write_folder",
]
