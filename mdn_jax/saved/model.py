"""Models in checkpoints: read without the optimizer, written without a run."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from numpy.typing import NDArray

from mdn_jax.errors import NoModelError, RunError
from mdn_jax.models import MDNConfig, MDNForCausalLM
from mdn_jax.models.sizes import check_fits
from mdn_jax.ops.api import Implementation
from mdn_jax.saved.digest import Digests, digests, file_digest
from mdn_jax.saved.record import (
    RECORD,
    STATE,
    DamagedError,
    Record,
    make_record,
    read_record,
    reading,
)
from mdn_jax.text.vocabulary import TOKENIZER_FILE

DIRECTORY = "checkpoints"

Params = Any  # nested dictionaries of arrays, by the names of the model's parameters


class Saved(NamedTuple):
    """A checkpoint on the disk.

    Attributes:
      path: its directory.
      step: training steps taken; 0 for a converted model.
      model: configuration of the model.
      dtype: compute dtype of the run; None for a converted model.
      digests: of the arrays; None for a converted model of before there were any.
      tokenizer: SHA-256 of the tokenizer's file beside the checkpoints; None where there was none,
        or of before.
      folder: whether it is a folder with safetensors files instead, which has no digests.
      ema: whether the moving average of its parameters is meant in their place.
    """

    path: Path
    step: int
    model: MDNConfig
    dtype: str | None
    digests: Digests | None = None
    tokenizer: str | None = None
    folder: bool = False
    ema: bool = False

    @property
    def place(self) -> tuple[str, ...]:
        """Where the parameters lie in the training state."""
        return ("opt_state", "average") if self.ema else ("params",)


def complete_steps(checkpoints: Path) -> list[int]:
    """Steps of the complete checkpoints in a run's directory of checkpoints, ascending.

    A name that Orbax would not write, such as `007`, is none of them, nor is a file.
    """
    return sorted(
        int(path.name)
        for path in checkpoints.glob("*")
        if re.fullmatch("0|[1-9][0-9]*", path.name) and path.is_dir()
    )


def find_checkpoint(directory: Path, step: int | None = None, *, ema: bool = False) -> Saved:
    """A checkpoint of a run or of `save_model`.

    Args:
      directory: output directory of the run.
      step: which one; None: the latest.
      ema: the moving average of its parameters in their place.

    Raises:
      RunError: there is none, or it cannot be read.
    """
    steps = complete_steps(directory / DIRECTORY)
    if not steps:
        raise NoModelError(
            "checkpoint: expected the output directory of a run or of a conversion, or a folder "
            f"with safetensors files, got {directory}, which holds neither"
        )
    if step is not None and step not in steps:
        raise RunError(f"step: expected one of {steps} (checkpoints in {directory}), got {step}")
    step = steps[-1] if step is None else step
    path = (directory / DIRECTORY / str(step)).absolute()
    try:
        with reading():
            return saved_at(path, read_record(path))._replace(ema=ema)
    except DamagedError as damage:
        raise _incomplete(path, damage) from None


def saved_at(path: Path, record: Record) -> Saved:
    """A checkpoint by its directory and its record.

    Raises:
      ValueError, TypeError, KeyError: a configuration that is none.
    """
    dtype = record.config.get("dtype")
    if dtype is not None:
        jnp.dtype(dtype)
    model = MDNConfig.from_dict(record.config["model"])
    return Saved(path, int(path.name), model, dtype, record.digests, record.tokenizer)


def read_params(saved: Saved, *, like: Params | None = None) -> Params:
    """The parameters of a checkpoint, and nothing else of it; their digests are checked.

    Args:
      saved: from `find_checkpoint`.
      like: dtypes and shardings to restore to; None: the dtypes that they have there, on the first
        device.

    Raises:
      RunError: not the parameters of such a model, or files that are damaged.
      ValueError: more of them than the device can hold.
    """
    if like is None:
        check_fits(saved.model, bytes_each=2, device=jax.devices()[0])
    try:
        with reading(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            shapes = _saved_shapes(checkpointer, saved)
            if like is None:
                # by way of the host, where digests need no compilation
                leaves, tree = jax.tree.flatten(_restore(checkpointer, saved, shapes, on_host=True))
                for i, x in enumerate(leaves):  # each goes from the host before the next one comes
                    leaves[i] = jax.device_put(x, jax.devices()[0])
                return jax.tree.unflatten(tree, leaves)
            there = jax.tree.map(
                lambda x, y: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=y.sharding),
                shapes,
                like,
            )
            params = _restore(checkpointer, saved, there)
            return jax.tree.map(lambda x, y: x.astype(y.dtype), params, like)
    except DamagedError as damage:
        raise _incomplete(saved.path, damage) from None


def iterate_params(saved: Saved) -> Iterator[tuple[tuple[Any, ...], NDArray[Any]]]:
    """The parameters as of `read_params`, as numpy arrays with their paths, one at a time.

    Raises:
      RunError: not the parameters of such a model, or files that are damaged.
    """
    try:
        with reading(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            leaves = jax.tree_util.tree_leaves_with_path(_saved_shapes(checkpointer, saved))
            # the largest first: what is freed after each has room for the next
            for keys, shape in sorted(leaves, key=lambda leaf: -leaf[1].size):
                one: Any = shape
                for key in reversed(keys):
                    one = {key.key: one}
                restored = _restore(checkpointer, saved, one, on_host=True)
                (parameter,) = jax.tree.leaves(restored)
                yield tuple(key.key for key in keys), parameter
                del restored, parameter  # before the next one is read
    except DamagedError as damage:
        raise _incomplete(saved.path, damage) from None


def _incomplete(path: Path, damage: DamagedError) -> RunError:
    return RunError(f"checkpoint: expected a complete one in {path}, got damaged files ({damage})")


def _saved_shapes(checkpointer: ocp.Checkpointer, saved: Saved) -> Params:
    """Shapes and dtypes of the parameters, which are those of the model."""
    _, like = split_abstract(saved.model)
    metadata = checkpointer.metadata(saved.path / STATE).item_metadata
    if metadata is None:
        raise DamagedError(f"the metadata of {STATE} cannot be read")
    tree = metadata.tree
    optimizer = tree.get("opt_state")
    if saved.ema and not (isinstance(optimizer, dict) and "average" in optimizer):
        raise RunError(
            "ema: expected a checkpoint with a moving average of the parameters "
            f"(optimizer.ema_decay), got {saved.path}, which has none"
        )
    for name in saved.place:
        tree = tree[name]
    there = _flat(tree)
    ours = {name: x.shape for name, x in _flat(like).items()}
    theirs = {name: tuple(x.shape) for name, x in there.items()}
    odd = sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))
    if odd:
        raise RunError(
            f"checkpoint: expected the parameters of its configuration in {saved.path}, "
            f"got others: {', '.join(odd)}"
        )
    return jax.tree_util.tree_map_with_path(
        lambda keys, x: jax.ShapeDtypeStruct(x.shape, there[_name(keys)].dtype), like
    )


def _restore(
    checkpointer: ocp.Checkpointer, saved: Saved, shapes: Params, *, on_host: bool = False
) -> Params:
    """Some or all of the parameters, as they were written."""
    item: Any = shapes
    for name in reversed(saved.place):
        item = {name: item}
    restore_args = ocp.checkpoint_utils.construct_restore_args(item)
    if on_host:
        numpy = ocp.RestoreArgs(restore_type=np.ndarray)
        restore_args = jax.tree.map(lambda _: numpy, item)
    arguments = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
    restored = checkpointer.restore(saved.path / STATE, args=arguments)
    if saved.digests is not None:
        saved.digests.check(restored)
    for name in saved.place:
        restored = restored[name]
    return restored


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
    params = read_params(saved)
    dtype = dtype or saved.dtype or params["embeddings"].dtype.name
    graph, _ = split_abstract(saved.model, dtype=dtype, implementation=implementation)
    model: MDNForCausalLM = nnx.merge(graph, params)
    return model


def save_model(directory: Path, config: MDNConfig, params: Params) -> None:
    """Writes parameters alone as the checkpoint of step 0 of a new output directory.

    A tokenizer's file belongs there before, so that it is known when it is read.
    Writes one parameter at a time, so that little is held beside the parameters themselves.

    Args:
      directory: output directory; without checkpoints so far.
      config: of the model.
      params: its parameters, in the dtypes to write.
    """
    # the limit is on the bytes of tensors being written, in GB, and has to be above each of them
    limit = (max(x.nbytes for x in jax.tree.leaves(params)) + 1024) / 1e9
    handlers = {
        STATE: ocp.PyTreeCheckpointHandler(save_concurrent_gb=limit),
        RECORD: ocp.JsonCheckpointHandler(),
    }
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    on_host = jax.tree.map(np.asarray, params)
    record = make_record(
        0,
        config={"model": config.to_dict()},
        digests=digests({"params": on_host}),
        tokenizer=file_digest(directory / TOKENIZER_FILE),
    )
    with ocp.CheckpointManager(
        (directory / DIRECTORY).absolute(), item_handlers=handlers, options=options
    ) as manager:
        manager.save(
            0,
            args=ocp.args.Composite(
                **{
                    STATE: ocp.args.PyTreeSave(
                        {"params": params}, ocdbt_target_data_file_size=1 << 26
                    ),
                    RECORD: ocp.args.JsonSave(record),
                }
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
