"""What fine-tuning begins with: the model, the parameters and the tokens of another one."""

import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdn_jax.errors import NoModelError, RunError
from mdn_jax.models import MDNConfig
from mdn_jax.saved.anywhere import find_model
from mdn_jax.saved.digest import json_digest
from mdn_jax.saved.model import Saved, read_params
from mdn_jax.saved.tokens import tokenizer_beside
from mdn_jax.text.tokenizer import BYTES, VOCAB_SIZE, Tokenizer, make_tokenizer
from train.config import TrainConfig
from train.optimizer import Params
from train.parallel.distributed import check_alike


class Origin(NamedTuple):
    """A model on the disk, found and not read yet.

    Attributes:
      path: its directory.
      model: its configuration.
      tokenizer: "bytes", or where its file is; None: there is none.
      saved: its checkpoint; None: a folder with safetensors files.
    """

    path: Path
    model: MDNConfig
    tokenizer: str | None
    saved: Saved | None


def find_origin(name: str) -> Origin:
    """The model in the directory of a run or a conversion, or in an exported or published folder.

    Raises:
      RunError: neither of these, or one that is damaged.
    """
    path = Path(os.path.expanduser(name)).absolute()
    try:
        saved = find_model(path)
    except NoModelError:
        raise RunError(
            "init_from: expected the directory of a run, or a folder with safetensors files, "
            f"got {name}"
        ) from None
    except (ValueError, ImportError) as error:
        raise RunError(f"init_from: {error}") from None
    beside, tokenizer = tokenizer_beside(path, saved), None
    is_run = saved.dtype is not None
    if beside is not None:
        tokenizer = str(beside)
    elif is_run or saved.model.vocab_size == VOCAB_SIZE:
        tokenizer = BYTES
    return Origin(path, saved.model, tokenizer, None if saved.folder else saved)


def begin_with(config: TrainConfig, origin: Origin) -> TrainConfig:
    """The configuration of a run that begins with a model: it has its configuration and tokenizer.

    Raises:
      RunError: another model, or no tokenizer.
    """
    ours, theirs = (dataclasses.replace(x, extras=()) for x in (config.model, origin.model))
    for field in dataclasses.fields(ours):
        got, expected = getattr(ours, field.name), getattr(theirs, field.name)
        if got != expected:
            raise RunError(
                f"model.{field.name}: expected {expected!r}, that of init_from {origin.path}, "
                f"got {got!r}"
            )
    data = config.data
    if data.tokenizer is None:
        if origin.tokenizer is None:
            raise RunError(
                f"data.tokenizer: expected the tokenizer of init_from {origin.path}, which has "
                "none beside it, got none"
            )
        data = dataclasses.replace(data, tokenizer=origin.tokenizer)
    return dataclasses.replace(config, model=origin.model, data=data, fit_vocab_size=False)


def check_origin_alike(origin: Origin) -> None:
    """Raises, in every process, unless all begin with the same parameters.

    Raises:
      RunError: names the process that has others.
    """
    if origin.saved is not None and origin.saved.digests is not None:
        what = json_digest(dict(origin.saved.digests.arrays))
    else:  # folders have no digests: names and sizes
        files = sorted(origin.path.glob("*.safetensors"))
        what = json_digest([[file.name, file.stat().st_size] for file in files])
    check_alike("parameters", {"init_from": f"digest {what[:12]}"})


def check_origin_tokenizer(origin: Origin, tokenizer: Tokenizer) -> None:
    """Raises unless the tokens are those that the model was trained on.

    Raises:
      RunError: of another tokenizer.
    """
    if origin.tokenizer is None:
        return
    expected = make_tokenizer(origin.tokenizer, None)
    if tokenizer.fingerprint != expected.fingerprint:
        raise RunError(
            f"data.tokenizer: expected that of init_from {origin.path} ({origin.tokenizer}), got "
            "another, which gives other tokens"
        )


def origin_params(origin: Origin, like: Params) -> Params:
    """The parameters, in float32.

    Args:
      origin: from `find_origin`.
      like: shapes and shardings of the parameters.

    Raises:
      RunError: files that are damaged.
    """
    if origin.saved is not None:
        return read_params(origin.saved, like=like)
    from mdn_jax.interop.folder import folder_parameters, read_folder

    params: dict[Any, Any] = {}
    try:
        for path, x in folder_parameters(read_folder(origin.path)):
            *above, last = path
            place, shape = params, like
            for key in above:
                place, shape = place.setdefault(key, {}), shape[key]
            place[last] = _placed(np.asarray(x), shape[last])
    except (ValueError, ImportError) as error:
        raise RunError(f"init_from: {error}") from None
    return jax.tree.map(lambda _, x: x, like, params)  # the order of the model


def _placed(x: np.ndarray, like: Any) -> jax.Array:
    x = x.astype(jnp.float32)
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: x[index])
