"""Published checkpoint folders: `config.json` and safetensors files, one tensor at a time.

Needs the safetensors library (the extra `huggingface`).
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import DTypeLike, NDArray

from mdn_jax.extras import install
from mdn_jax.interop.official import (
    check_tensors,
    model_from_official,
    published_tensors,
    without_tied_head,
)
from mdn_jax.models.causal_lm import MDNForCausalLM
from mdn_jax.models.config import MDNConfig
from mdn_jax.models.sizes import check_fits
from mdn_jax.ops.api import Implementation

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

ParameterPath = tuple[Any, ...]

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclasses.dataclass(frozen=True)
class FolderTensor:
    """A tensor in a file, read when it is made an array.

    Attributes:
      file: where it is.
      name: published.
      shape: published.
      dtype: its own.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        """Reads it."""
        # opened anew each time: the memory of what was read before goes back
        with _open(self.file) as file:
            x: NDArray[Any] = file.get_tensor(self.name)
        return x if dtype is None else x.astype(dtype)


class PublishedFolder(NamedTuple):
    """A published checkpoint, its tensors still on the disk.

    Attributes:
      config: of the model.
      tensors: by their published names.
    """

    config: MDNConfig
    tensors: dict[str, FolderTensor]


def read_folder(path: Path) -> PublishedFolder:
    """Reads the configuration and the headers of the files.

    Args:
      path: folder with `config.json` and `model.safetensors`, or several files and their index.

    Raises:
      ValueError: a file that is missing, damaged or does not fit the others, by name; a model
        that is larger than the machine's memory.
      ImportError: without the safetensors library.
    """
    published = _read_json(path / CONFIG_FILE)
    if not published:
        raise ValueError(
            f"{path / CONFIG_FILE}: expected the fields of a model, got an empty object"
        )
    try:
        config = MDNConfig.from_dict(published)
        check_fits(config, bytes_each=2)
    except ValueError as error:
        raise ValueError(f"{path / CONFIG_FILE}: {error}") from None
    files, weight_map = _files(path)
    tensors: dict[str, FolderTensor] = {}
    problems = []
    for file in files:
        for tensor in _headers(file):
            if tensor.name in tensors:
                problems.append(
                    f"{tensor.name} is in {tensors[tensor.name].file.name} and {file.name}"
                )
            if weight_map is not None and weight_map.get(tensor.name) != file.name:
                problems.append(f"{tensor.name} in {file.name} is not there in the index")
            tensors[tensor.name] = tensor
    for name, file_name in (weight_map or {}).items():
        if name not in tensors:
            problems.append(f"{name} of the index is not in {file_name}")
    if problems:
        raise ValueError(f"{path}: expected files that fit together, got: " + "; ".join(problems))
    return PublishedFolder(config, tensors)


def folder_parameters(folder: PublishedFolder) -> Iterator[tuple[ParameterPath, NDArray[Any]]]:
    """The parameters in our layout and in their own dtypes, by path, one at a time.

    Args:
      folder: from `read_folder`.

    Raises:
      ValueError: before the first one: tensors that are missing, unexpected, mis-shaped or of
        another dtype than float32, bfloat16 or float16, all of them listed; or a damaged file.
    """
    published = published_tensors(_abstract(folder.config))
    tensors = without_tied_head(folder.config, folder.tensors)
    check_tensors(tensors, published.values())
    # the largest first: what is freed after each has room for the next
    for path, tensor in sorted(published.items(), key=lambda x: -math.prod(x[1].shape)):
        yield path, tensor.ours(np.asarray(tensors[tensor.name]))


def model_from_folder(
    path: Path,
    *,
    implementation: Implementation | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
) -> MDNForCausalLM:
    """The model of a published folder; arguments as of `model_from_official`.

    `dtype=None` is that of the folder's largest tensor, but float32 for float16.

    Raises:
      ValueError: a file that is missing or damaged, or tensors that do not fit.
      ImportError: without the safetensors library.
    """
    config, tensors = read_folder(path)
    if dtype is None:
        own = max(tensors.values(), key=lambda x: math.prod(x.shape)).dtype
        dtype = "float32" if own == "float16" else own
    options: Any = {"implementation": implementation, "dtype": dtype, "param_dtype": param_dtype}
    lazy: Any = tensors
    return model_from_official(config.to_dict(), lazy, **options)


def write_folder(
    path: Path,
    config: MDNConfig,
    parameters: Iterable[tuple[ParameterPath, Any]],
    *,
    shard_bytes: int = 4 << 30,
) -> None:
    """Writes a published checkpoint into an empty folder.

    Holds the tensors of one file at a time. With tied embeddings there is no `lm_head.weight`.

    Args:
      path: the folder.
      config: of the model.
      parameters: by path, in our layout and in the dtypes to write.
      shard_bytes: most bytes of tensors in one file, unless one tensor alone has more.

    Raises:
      ValueError: parameters that are missing, unexpected or mis-shaped.
      ImportError: without the safetensors library.
    """
    save_file = _safetensors("safetensors.numpy").save_file
    published = published_tensors(_abstract(config))
    shard: dict[str, NDArray[Any]] = {}
    shards: list[list[str]] = []
    written: dict[str, FolderTensor] = {}

    def flush() -> None:
        file = path / f"{len(shards)}.partial"
        save_file(shard, file, metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for parameter_path, parameter in parameters:
        tensor = published.get(parameter_path)
        if tensor is None:
            raise ValueError(f"parameters: unexpected {'.'.join(map(str, parameter_path))}")
        x = np.ascontiguousarray(tensor.published(np.asarray(parameter)))
        written[tensor.name] = FolderTensor(path, tensor.name, x.shape, x.dtype.name)
        if shard and sum(y.nbytes for y in shard.values()) + x.nbytes > shard_bytes:
            flush()
        shard[tensor.name] = x
    check_tensors(written, published.values())
    flush()
    text = json.dumps(_published_config(config, written), indent=2)
    (path / CONFIG_FILE).write_text(text + "\n")
    _name_files(path, shards, written)


def _name_files(path: Path, shards: list[list[str]], written: Mapping[str, FolderTensor]) -> None:
    names = [SINGLE_FILE]
    if len(shards) > 1:
        count = len(shards)
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        size = sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in written.values())
        index = {
            "metadata": {"total_size": size},
            "weight_map": {x: name for name, xs in zip(names, shards, strict=True) for x in xs},
        }
        (path / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    for i, name in enumerate(names):
        shutil.copymode(path / CONFIG_FILE, path / f"{i}.partial")  # the library's is 0600
        (path / f"{i}.partial").rename(path / name)


def _published_config(config: MDNConfig, written: Mapping[str, FolderTensor]) -> dict[str, Any]:
    published = {"model_type": "momentum_deltanet"} | config.to_dict()
    dtypes = {tensor.dtype for tensor in written.values()}
    if len(dtypes) == 1:
        published["dtype" if "dtype" in published else "torch_dtype"] = dtypes.pop()
    return published


def _abstract(config: MDNConfig) -> MDNForCausalLM:
    return nnx.eval_shape(lambda: MDNForCausalLM(config, rngs=nnx.Rngs(0)))


def _files(path: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files, and which tensor the index says is in which."""
    if (path / INDEX_FILE).exists():
        weight_map = _read_json(path / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{path / INDEX_FILE}: expected an object 'weight_map', got none")
        names = sorted(set(map(str, weight_map.values())))
        for name in names:
            if Path(name).name != name or not (path / name).is_file():
                raise ValueError(
                    f"{path / INDEX_FILE}: expected names of files beside it, got {name!r}, "
                    "which is not there"
                )
        return [path / name for name in names], weight_map
    files = sorted(file for file in path.glob("*.safetensors") if file.is_file())
    if not files:
        raise ValueError(f"{path}: expected {SINGLE_FILE} or {INDEX_FILE}, found neither")
    return files, None


def _headers(file: Path) -> Iterator[FolderTensor]:
    with _open(file) as opened:
        for name in opened.keys():  # noqa: SIM118 (not a mapping)
            x = opened.get_slice(name)
            dtype = _DTYPES.get(x.get_dtype())
            if dtype is None:
                raise ValueError(
                    f"{file}: expected {name} of dtype F32, BF16 or F16, got {x.get_dtype()}"
                )
            yield FolderTensor(file, name, tuple(x.get_shape()), dtype)


class _open:  # noqa: N801
    """`safetensors.safe_open` for numpy, with errors that name the file."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __enter__(self) -> Any:
        safetensors = _safetensors("safetensors")
        try:
            self._opened = safetensors.safe_open(self._file, framework="numpy", backend="pread")
            return self._opened.__enter__()
        except (safetensors.SafetensorError, OSError) as error:
            raise self._damaged(error) from None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._opened.__exit__(kind, error, trace)
        if isinstance(error, _safetensors("safetensors").SafetensorError):
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> ValueError:
        return ValueError(
            f"{self._file}: expected a complete safetensors file, got a damaged one ({error})"
        )


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():  # nor something that never ends
        raise ValueError(f"{file}: expected a readable file, got none")
    try:
        values = json.loads(file.read_text())
    except OSError as error:
        raise ValueError(f"{file}: expected a readable file: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: expected JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(values).__name__}")
    return values


def _safetensors(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise ImportError(
            f"published folders need the safetensors library: {install('huggingface')}"
        ) from None
