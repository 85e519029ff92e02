"""Generation states in files: prompts that need no second prefill."""

import dataclasses
import hashlib
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from numpy.typing import NDArray

from mdn_jax.layers.attention import AttentionCache
from mdn_jax.models.causal_lm import MDNForCausalLM
from mdn_jax.models.generate import GenerationState, initial_state

_FORMAT = "mdn-jax generation state 1"
_HEADER = "header"
# npz has no type of these, so they are stored as integers of their size
_AS_INTEGERS = {np.dtype(ml_dtypes.bfloat16): np.dtype(np.uint16)}


def save_state(path: str | os.PathLike[str], state: GenerationState, model: MDNForCausalLM) -> None:
    """Writes a state, complete or not at all: `.npz` with a header that names the model.

    Args:
      path: file to write; one that is there is replaced.
      state: what to write.
      model: the model that made it.

    Raises:
      OSError: the file cannot be written.
    """
    newest = int(np.max(np.asarray(state.position), initial=0))
    cache = tuple(  # without the entries that are still empty
        entry.resized(min(entry.k.shape[1], newest)) if isinstance(entry, AttentionCache) else entry
        for entry in state.cache
    )
    arrays = _named(state._replace(cache=cache))
    header = {
        "format": _FORMAT,
        "config": _config_digest(model),
        "parameters": _parameter_digest(model),
        "dtypes": {name: x.dtype.name for name, x in arrays.items()},
    }
    stored = {name: x.view(_AS_INTEGERS.get(x.dtype, x.dtype)) for name, x in arrays.items()}
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **{_HEADER: np.array(json.dumps(header))}, **stored)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_state(path: str | os.PathLike[str], model: MDNForCausalLM) -> GenerationState:
    """Reads a state that `save_state` wrote.

    Args:
      path: the file.
      model: the model that is to go on; the one that made the state.

    Raises:
      ValueError: not such a file, a damaged one, or one of another model.
      OSError: the file cannot be read.
    """
    expected = f"state: expected a file of save_state, got {path}"
    with open(path, "rb") as opened:
        if not zipfile.is_zipfile(opened):
            raise ValueError(f"{expected}: no npz file, or one cut short")
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(str(arrays.pop(_HEADER)))
        if header["format"] != _FORMAT:
            raise ValueError(f"format {header['format']!r}")
        dtypes = {name: np.dtype(dtype) for name, dtype in header["dtypes"].items()}
        arrays = {name: x.view(dtypes[name]) for name, x in arrays.items()}
    except (zipfile.BadZipFile, EOFError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{expected}: damaged or of another kind ({error})") from None
    if header["config"] != _config_digest(model):
        raise ValueError(
            f"state: expected one of this model's configuration (digest "
            f"{_config_digest(model)[:12]}), got {path} of another ({header['config'][:12]})"
        )
    if header["parameters"] != _parameter_digest(model):
        raise ValueError(
            f"state: expected one made with this model's parameters, got {path}, "
            "made with others of the same configuration (another checkpoint?)"
        )
    return _beside(model, _filled(_template(model, arrays, path), arrays, path))


def _beside(model: MDNForCausalLM, state: GenerationState) -> GenerationState:
    """The state on the model's devices, so that its first block compiles for what follows."""
    parameter = model.embeddings[...]
    if not parameter.committed:
        return state
    sharding = parameter.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.device_put(state, sharding)


def _named(tree: Any) -> dict[str, NDArray[Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(p, simple=True, separator="."): np.ascontiguousarray(x)
        for p, x in leaves
    }


def _template(
    model: MDNForCausalLM, arrays: dict[str, NDArray[Any]], path: str | os.PathLike[str]
) -> GenerationState:
    """Shapes and types of the state; attention caches as long as those in the file."""
    if "position" not in arrays or arrays["position"].ndim != 1:
        raise ValueError(f"state: expected an array 'position' [B] in {path}, got none")
    state = jax.eval_shape(lambda: initial_state(model, arrays["position"].shape[0]))
    cache: list[Any] = list(state.cache)
    for i, entry in enumerate(cache):
        keys = arrays.get(f"cache.{i}.k")
        if isinstance(entry, AttentionCache) and keys is not None and keys.ndim == 4:
            length = keys.shape[1]
            cache[i] = jax.eval_shape(lambda e=entry, n=length: _zeros(e).resized(n))
            # a window goes on limiting the entries
            cache[i] = dataclasses.replace(cache[i], capacity=entry.capacity)
    return state._replace(cache=tuple(cache))


def _zeros(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)


def _filled(
    template: GenerationState, arrays: dict[str, NDArray[Any]], path: str | os.PathLike[str]
) -> GenerationState:
    def fill(keys: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(keys, simple=True, separator=".")
        x = arrays.get(name)
        if x is None:
            raise ValueError(f"state: expected an array {name!r} in {path}, got none")
        if x.shape != leaf.shape or x.dtype != leaf.dtype:
            raise ValueError(
                f"state: expected {name} {leaf.dtype.name}{list(leaf.shape)}, "
                f"got {x.dtype.name}{list(x.shape)} in {path}"
            )
        return jnp.asarray(x)

    return jax.tree_util.tree_map_with_path(fill, template)


def _config_digest(model: MDNForCausalLM) -> str:
    fields = dataclasses.replace(model.config, extras=()).to_dict()
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _parameter_digest(model: MDNForCausalLM, *, samples: int = 64) -> str:
    """Digest of some entries of every parameter: cheap, and different after any training step."""
    digest = hashlib.sha256()
    for path, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = parameter.get_value()
        picked = np.linspace(0, value.size - 1, min(samples, value.size)).astype(np.int64)
        entries = np.asarray(value[np.unravel_index(picked, value.shape)])
        digest.update(".".join(map(str, path)).encode())
        digest.update(entries.astype(np.float64).tobytes())
    return digest.hexdigest()
