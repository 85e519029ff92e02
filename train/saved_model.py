"""Models in checkpoints: read without the optimizer, written without a run."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from numpy.typing import NDArray

from mdn_jax import MDNConfig, MDNForCausalLM
from mdn_jax.models.sizes import check_fits
from mdn_jax.ops.api import Implementation
from train.errors import RunError
from train.optimizer import Params

DIRECTORY = "checkpoints"


class Saved(NamedTuple):
    """A checkpoint on the disk.

    Attributes:
      path: its directory.
      step: training steps taken; 0 for a converted model.
      model: configuration of the model.
      dtype: compute dtype of the run; None for a converted model.
    """

    path: Path
    step: int
    model: MDNConfig
    dtype: str | None


def complete_steps(checkpoints: Path) -> list[int]:
    """Steps of the complete checkpoints in a run's directory of checkpoints, ascending."""
    return sorted(int(path.name) for path in checkpoints.glob("*") if path.name.isdigit())


def find_checkpoint(directory: Path, step: int | None = None) -> Saved:
    """A checkpoint of a run or of `save_model`.

    Args:
      directory: output directory of the run.
      step: which one; None: the latest.

    Raises:
      RunError: there is none, or it cannot be read.
    """
    steps = complete_steps(directory / DIRECTORY)
    if not steps:
        raise RunError(
            f"checkpoint: expected the output directory of a run or of a conversion, "
            f"got {directory}, which holds no checkpoints"
        )
    if step is not None and step not in steps:
        raise RunError(f"step: expected one of {steps} (checkpoints in {directory}), got {step}")
    step = steps[-1] if step is None else step
    path = (directory / DIRECTORY / str(step)).absolute()
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
            config = checkpointer.restore(path / "run")["config"]
        return Saved(path, step, MDNConfig.from_dict(config["model"]), config.get("dtype"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"checkpoint: expected a complete one in {path}: {error}") from None


def read_params(path: Path, config: MDNConfig, *, like: Params | None = None) -> Params:
    """The parameters of a checkpoint, and nothing else of it.

    Args:
      path: the checkpoint (`Saved.path`).
      config: its model's configuration.
      like: dtypes and shardings to restore to; None: the dtypes that they have there, on the first
        device.

    Raises:
      RunError: not the parameters of such a model, or files that cannot be read.
      ValueError: more of them than the device can hold.
    """
    if like is None:
        check_fits(config, bytes_each=2, device=jax.devices()[0])
    with _reading(path) as checkpointer:
        shapes = _saved_shapes(checkpointer, path, config)
        return _restore(checkpointer, path, shapes if like is None else like)


def iterate_params(path: Path, config: MDNConfig) -> Iterator[tuple[tuple[Any, ...], NDArray[Any]]]:
    """The parameters as of `read_params`, as numpy arrays with their paths, one at a time.

    Raises:
      RunError: not the parameters of such a model, or files that cannot be read.
    """
    with _reading(path) as checkpointer:
        shapes = _saved_shapes(checkpointer, path, config)
        leaves = jax.tree_util.tree_leaves_with_path(shapes)
        # the largest first: what is freed after each has room for the next
        for keys, shape in sorted(leaves, key=lambda leaf: -leaf[1].size):
            one: Any = shape
            for key in reversed(keys):
                one = {key.key: one}
            (parameter,) = jax.tree.leaves(_restore(checkpointer, path, one, on_host=True))
            yield tuple(key.key for key in keys), parameter
            del parameter  # before the next one is read


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[ocp.Checkpointer]:
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            yield checkpointer
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"checkpoint: expected a complete one in {path}: {error}") from None


def _saved_shapes(checkpointer: ocp.Checkpointer, path: Path, config: MDNConfig) -> Params:
    """Shapes and dtypes of the parameters, which are those of the model."""
    _, like = split_abstract(config)
    metadata = checkpointer.metadata(path / "state").item_metadata
    if metadata is None:
        raise ValueError("its files are damaged")
    saved = _flat(metadata.tree["params"])
    ours = {name: x.shape for name, x in _flat(like).items()}
    theirs = {name: tuple(x.shape) for name, x in saved.items()}
    odd = sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))
    if odd:
        raise RunError(
            f"checkpoint: expected the parameters of its configuration in {path}, "
            f"got others: {', '.join(odd)}"
        )
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree_util.tree_map_with_path(
        lambda keys, x: jax.ShapeDtypeStruct(x.shape, saved[_name(keys)].dtype, sharding=device),
        like,
    )


def _restore(
    checkpointer: ocp.Checkpointer, path: Path, shapes: Params, *, on_host: bool = False
) -> Params:
    item = {"params": shapes}
    restore_args = ocp.checkpoint_utils.construct_restore_args(item)
    if on_host:
        numpy = ocp.RestoreArgs(restore_type=np.ndarray)
        restore_args = jax.tree.map(lambda _: numpy, item)
    arguments = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
    return checkpointer.restore(path / "state", args=arguments)["params"]


def load_model(
    saved: Saved,
    *,
    dtype: str | None = None,
    implementation: Implementation | None = None,
) -> MDNForCausalLM:
    """The model of a checkpoint.

    Args:
      saved: from `find_checkpoint`.
      dtype: of the computation; None: as in training, or the parameters' for a converted model.
      implementation: of the momentum delta rule.

    Raises:
      RunError: parameters that do not fit or cannot be read.
    """
    params = read_params(saved.path, saved.model)
    dtype = dtype or saved.dtype or params["embeddings"].dtype.name
    graph, _ = split_abstract(saved.model, dtype=dtype, implementation=implementation)
    model: MDNForCausalLM = nnx.merge(graph, params)
    return model


def save_model(directory: Path, config: MDNConfig, params: Params) -> None:
    """Writes parameters alone as the checkpoint of step 0 of a new output directory.

    Writes one parameter at a time, so that little is held beside the parameters themselves.

    Args:
      directory: output directory; without checkpoints so far.
      config: of the model.
      params: its parameters, in the dtypes to write.
    """
    # the limit is on the bytes of tensors being written, in GB, and has to be above each of them
    limit = (max(x.nbytes for x in jax.tree.leaves(params)) + 1024) / 1e9
    handlers = {
        "state": ocp.PyTreeCheckpointHandler(save_concurrent_gb=limit),
        "run": ocp.JsonCheckpointHandler(),
    }
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    run = {"config": {"model": config.to_dict()}, "corpus": None}
    with ocp.CheckpointManager(
        (directory / DIRECTORY).absolute(), item_handlers=handlers, options=options
    ) as manager:
        manager.save(
            0,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave({"params": params}, ocdbt_target_data_file_size=1 << 26),
                run=ocp.args.JsonSave(run),
            ),
        )


def split_abstract(
    config: MDNConfig,
    *,
    dtype: str = "float32",
    implementation: Implementation | None = None,
) -> tuple[Any, Params]:
    """Graph definition of a model, and its parameters as shapes in nested dictionaries."""
    model = nnx.eval_shape(
        lambda: MDNForCausalLM(
            config, dtype=jnp.dtype(dtype), implementation=implementation, rngs=nnx.Rngs(0)
        )
    )
    graph, state = nnx.split(model)
    return graph, nnx.to_pure_dict(state)


def _name(keys: tuple[Any, ...]) -> str:
    return ".".join(str(getattr(key, "key", key)) for key in keys)


def _flat(tree: Any) -> dict[str, Any]:
    return {_name(keys): x for keys, x in jax.tree_util.tree_leaves_with_path(tree)}
