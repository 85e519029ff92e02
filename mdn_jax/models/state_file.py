"""Generation states in files: prompts that need no second prefill."""

import dataclasses
import hashlib
import json
import os
import secrets
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from numpy.typing import NDArray

from mdn_jax.layers.attention import AttentionCache
from mdn_jax.models import npz
from mdn_jax.models.causal_lm import MDNForCausalLM
from mdn_jax.models.generation_state import GenerationState, initial_state

_FORMAT = "mdn-jax generation state 1"
_HEADER = "header"
_MAX_HEADER = 1 << 24  # bytes
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
    # a name of its own: several processes and threads may write one state at a time
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.partial")
    try:
        with temporary.open("xb") as file:
            np.savez(file, allow_pickle=False, **{_HEADER: np.array(json.dumps(header))}, **stored)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_state(path: str | os.PathLike[str], model: MDNForCausalLM) -> GenerationState:
    """Reads a state that `save_state` wrote.

    Whose it is, names, shapes and sizes are checked before any array is read.

    Args:
      path: the file.
      model: the model that is to go on; the one that made the state.

    Raises:
      ValueError: not such a file, a damaged one, or one of another model.
      OSError: the file cannot be read.
    """
    expected = f"state: expected a file of save_state, got {path}"
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError(f"{expected}: no regular file")
    with open(path, "rb") as opened:
        with npz.damage(expected):
            archive = zipfile.ZipFile(opened)
            members = npz.members(archive)
            header = _read_header(archive, members.pop(_HEADER))
        _check_maker(header, model, path)
        _check_names(members.keys(), model, path)
        with npz.damage(expected):
            entries = {name: npz.entry(archive, info) for name, info in members.items()}
        like = _template(model, entries, path)
        _check_entries(like, entries, header.dtypes, path)

        def read(keys: Any, leaf: Any) -> Any:
            return jnp.asarray(npz.read(archive, entries[_name(keys)]).view(leaf.dtype))

        with npz.damage(expected):
            state = jax.tree_util.tree_map_with_path(read, like)
    return _beside(model, state)


class _Header(NamedTuple):
    config: str  # digest
    parameters: str  # digest
    dtypes: dict[str, str]


def _read_header(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Header:
    entry = npz.entry(archive, info)
    if entry.dtype.kind != "U" or entry.shape or info.file_size > _MAX_HEADER:
        raise ValueError(f"a header {entry.dtype}{list(entry.shape)}")
    values = json.loads(str(npz.read(archive, entry)))
    if values["format"] != _FORMAT:
        raise ValueError(f"format {values['format']!r}")
    header = _Header(values["config"], values["parameters"], values["dtypes"])
    if not (isinstance(header.config, str) and isinstance(header.dtypes, dict)):
        raise ValueError("a header of other types")
    return header


def _check_maker(header: _Header, model: MDNForCausalLM, path: str | os.PathLike[str]) -> None:
    ours = _config_digest(model)
    if header.config != ours:
        raise ValueError(
            f"state: expected one of this model's configuration (digest {ours[:12]}), "
            f"got {path} of another ({header.config[:12]})"
        )
    if header.parameters != _parameter_digest(model):
        raise ValueError(
            f"state: expected one made with this model's parameters, got {path}, "
            "made with others of the same configuration (another checkpoint?)"
        )


def _check_names(
    names: Collection[str], model: MDNForCausalLM, path: str | os.PathLike[str]
) -> None:
    like = jax.eval_shape(lambda: initial_state(model, 1))
    ours = {_name(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(like)}
    for name in sorted(ours - set(names)):
        raise ValueError(f"state: expected an array {name!r} in {path}, got none")
    for name in sorted(set(names) - ours):
        raise ValueError(f"state: expected no array {name[:80]!r} in {path}, got one")


def _check_entries(
    like: GenerationState,
    entries: dict[str, npz.Entry],
    dtypes: dict[str, str],
    path: str | os.PathLike[str],
) -> None:
    for keys, leaf in jax.tree_util.tree_leaves_with_path(like):
        entry, dtype = entries[_name(keys)], dtypes.get(_name(keys))
        stored = _AS_INTEGERS.get(leaf.dtype, leaf.dtype)
        if (entry.shape, entry.dtype, dtype) != (leaf.shape, stored, leaf.dtype.name):
            got = entry.dtype.name if dtype == leaf.dtype.name else str(dtype)[:80]
            raise ValueError(
                f"state: expected {_name(keys)} {leaf.dtype.name}{list(leaf.shape)}, "
                f"got {got}{list(entry.shape)} in {path}"
            )


def _beside(model: MDNForCausalLM, state: GenerationState) -> GenerationState:
    """The state on the model's devices, so that its first block compiles for what follows."""
    parameter = model.embeddings[...]
    if not parameter.committed:
        return state
    sharding = parameter.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.device_put(state, sharding)


def _name(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator=".")


def _named(tree: Any) -> dict[str, NDArray[Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_name(keys): np.ascontiguousarray(x) for keys, x in leaves}


def _template(
    model: MDNForCausalLM, entries: dict[str, npz.Entry], path: str | os.PathLike[str]
) -> GenerationState:
    """Shapes and types of the state; attention caches as long as those in the file."""
    rows = entries["position"].shape
    if len(rows) != 1:
        raise ValueError(f"state: expected position [B], got {list(rows)} in {path}")
    state = jax.eval_shape(lambda: initial_state(model, rows[0]))
    cache: list[Any] = list(state.cache)
    for i, entry in enumerate(cache):
        if isinstance(entry, AttentionCache) and len(entries[f"cache.{i}.k"].shape) == 4:
            length = entries[f"cache.{i}.k"].shape[1]
            cache[i] = jax.eval_shape(lambda e=entry, n=length: _zeros(e).resized(n))
            # a window goes on limiting the entries
            cache[i] = dataclasses.replace(cache[i], capacity=entry.capacity)
    return state._replace(cache=tuple(cache))


def _zeros(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)


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
