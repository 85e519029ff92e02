"""Parameters of the published PyTorch implementation, in memory, both ways."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mdn_jax.layers.attention import SoftmaxAttention
from mdn_jax.layers.momentum_deltanet import MomentumDeltaNet
from mdn_jax.models.causal_lm import MDNForCausalLM
from mdn_jax.models.config import NOT_PUBLISHED, MDNConfig
from mdn_jax.ops.api import Implementation

_LAYER_NORM_EPS = 1e-5  # default of the published layer; that of the published model is 1e-6


class _Published(NamedTuple):
    """Name of a published tensor, and its layout: one that is its own inverse, or "conv"."""

    name: str
    layout: str = "same"


class _Layout(NamedTuple):
    ours: Callable[[Any], Any]
    published: Callable[[Any], Any]


class PublishedTensor(NamedTuple):
    """The published form of a parameter.

    Attributes:
      name: published.
      shape: in the published layout.
      ours: function from the published layout to ours.
      published: the inverse.
      one_for_all: whether it may have one entry, which all value heads share.
    """

    name: str
    shape: tuple[int, ...]
    ours: Callable[[Any], Any]
    published: Callable[[Any], Any]
    one_for_all: bool = False


_LAYOUTS = {
    "same": _Layout(lambda x: x, lambda x: x),
    "linear": _Layout(lambda x: x.T, lambda x: x.T),  # [out, in] <-> [in, out]
    "conv": _Layout(lambda x: x[:, 0].T, lambda x: x.T[:, None]),  # [C, 1, W] <-> [W, C]
}

# the published layer has one entry of these a key head; one key head's serves all value heads
_PER_KEY_HEAD = ("A_log", "Mu_log", "log_factor")

_MIXER = {
    **{
        f"{name}_proj.kernel": _Published(f"{name}_proj.weight", "linear")
        for name in ("q", "k", "v", "g", "o")
    },
    **{f"{name}_proj.bias": _Published(f"{name}_proj.bias") for name in ("q", "k", "v")},
    **{
        f"{name}_conv1d.kernel": _Published(f"{name}_conv1d.weight", "conv")
        for name in ("q", "k", "v")
    },
    **{f"{name}_conv1d.bias": _Published(f"{name}_conv1d.bias") for name in ("q", "k", "v")},
    **{
        f"gates.{name}_proj": _Published(f"{name}_proj.weight", "linear")
        for name in ("a", "b", "m", "e")
    },
    "gates.a_log": _Published("A_log"),
    "gates.mu_log": _Published("Mu_log"),
    "gates.log_factor": _Published("log_factor"),
    "gates.dt_bias": _Published("dt_bias"),
    "gates.mu_bias": _Published("mu_bias"),
    "d_log": _Published("D_log"),
    "g_proj.layers.0.kernel": _Published("g_proj.0.weight", "linear"),
    "g_proj.layers.1.kernel": _Published("g_proj.1.weight", "linear"),
    "g_proj.layers.1.bias": _Published("g_proj.1.bias"),
    "o_norm.scale": _Published("o_norm.weight"),
}

_BLOCK = {
    "mixer_norm.scale": _Published("attn_norm.weight"),
    "mlp_norm.scale": _Published("mlp_norm.weight"),
    "mlp.gate_proj.kernel": _Published("mlp.gate_proj.weight", "linear"),
    "mlp.up_proj.kernel": _Published("mlp.up_proj.weight", "linear"),
    "mlp.down_proj.kernel": _Published("mlp.down_proj.weight", "linear"),
    **{f"mixer.{ours}": _Published(f"attn.{p.name}", p.layout) for ours, p in _MIXER.items()},
}

_EMBEDDINGS, _LM_HEAD = "model.embeddings.weight", "lm_head.weight"

_MODEL = {
    "embeddings": _Published(_EMBEDDINGS),
    "norm.scale": _Published("model.norm.weight"),
    "lm_head": _Published(_LM_HEAD, "linear"),
}


def layer_from_official(
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    implementation: Implementation | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
) -> MomentumDeltaNet:
    """A layer with the parameters of a published one.

    Args:
      config: arguments of the published layer; what is missing takes the published default.
      tensors: its parameters by their published names and in their published layouts.
      implementation: of the momentum delta rule.
      dtype: of the computation.
      param_dtype: of the parameters; the tensors are converted to it.

    Raises:
      ValueError: an argument that is not known or not honoured; or missing, unexpected or
        mis-shaped tensors, all of them listed.
    """
    read = MDNConfig.from_dict({"norm_eps": _LAYER_NORM_EPS, **config})
    return load_official(
        lambda: MomentumDeltaNet(
            read,
            implementation=implementation,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=nnx.Rngs(0),
        ),
        tensors,
    )


def model_from_official(
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    implementation: Implementation | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
) -> MDNForCausalLM:
    """A model with the parameters of a published one.

    Args:
      config: the published JSON configuration.
      tensors: its parameters by their published names and in their published layouts. With tied
        embeddings `lm_head.weight` may be missing or equal to the embeddings.
      implementation: of the momentum delta rule.
      dtype: of the computation.
      param_dtype: of the parameters; the tensors are converted to it.

    Raises:
      ValueError: a key that is not known or not honoured; or missing, unexpected or mis-shaped
        tensors, all of them listed.
    """
    read = MDNConfig.from_dict(config)
    tensors = without_tied_head(read, tensors)
    return load_official(
        lambda: MDNForCausalLM(
            read,
            implementation=implementation,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=nnx.Rngs(0),
        ),
        tensors,
    )


def without_tied_head[T](config: MDNConfig, tensors: Mapping[str, T]) -> Mapping[str, T]:
    """The tensors without `lm_head.weight`, if the embeddings are tied and it equals them.

    Raises:
      ValueError: tied embeddings and another `lm_head.weight`.
    """
    if not config.tie_word_embeddings or not {_EMBEDDINGS, _LM_HEAD} <= tensors.keys():
        return tensors
    if not np.array_equal(np.asarray(tensors[_EMBEDDINGS]), np.asarray(tensors[_LM_HEAD])):
        raise ValueError(
            f"{_LM_HEAD}: expected the tensor of {_EMBEDDINGS} (tie_word_embeddings is true), "
            "got another one"
        )
    return {name: x for name, x in tensors.items() if name != _LM_HEAD}


def official_state_dict(module: nnx.Module) -> dict[str, np.ndarray]:
    """The parameters of a model or layer under their published names: the exact inverse.

    Args:
      module: `MDNForCausalLM`, `MomentumDeltaNet` or `SoftmaxAttention`.

    Returns:
      Tensors in the published layouts: `[out, in]` linears, `[channels, 1, taps]` convolutions, in
      the dtype of the parameters. With tied embeddings `lm_head.weight` is the embeddings.

    Raises:
      TypeError: another kind of module.
      ValueError: a model or layer that the published implementation does not have.
    """
    published = published_tensors(module)
    tensors = {}
    for path, parameter in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        tensor = published[path]
        tensors[tensor.name] = np.ascontiguousarray(
            tensor.published(np.asarray(parameter.get_value()))
        )
    if isinstance(module, MDNForCausalLM) and module.config.tie_word_embeddings:
        tensors[_LM_HEAD] = tensors[_EMBEDDINGS]
    return tensors


def load_official[M: nnx.Module](make: Callable[[], M], tensors: Mapping[str, np.ndarray]) -> M:
    """The module that `make` constructs, with published parameters in place of drawn ones.

    Args:
      make: constructs the module; only its shapes are evaluated.
      tensors: parameters by their published names and in their published layouts.

    Raises:
      ValueError: missing, unexpected or mis-shaped tensors, all of them listed.
      TypeError: a kind of module that `official_state_dict` does not know.
    """
    abstract = nnx.eval_shape(make)
    graph, state = nnx.split(abstract)
    published = published_tensors(abstract)
    check_tensors(tensors, published.values())
    filled = [
        (path, x.replace(jnp.asarray(p.ours(np.asarray(tensors[p.name])), x.dtype)))
        for path, x in nnx.to_flat_state(state)
        for p in (published[path],)
    ]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def published_tensors(module: nnx.Module) -> dict[tuple[Any, ...], PublishedTensor]:
    """The published form of every parameter of `module` (shapes are enough), by its path.

    Raises:
      TypeError: a kind of module that `official_state_dict` does not know.
    """
    table = _table(module)
    one_key_head = (
        isinstance(module, MDNForCausalLM | MomentumDeltaNet) and module.config.num_heads == 1
    )
    tensors = {}
    for path, parameter in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        name, layout = table[_join(path)]
        if name.rpartition(".")[2] in _PER_KEY_HEAD and one_key_head:
            tensors[path] = _one_key_head(name, parameter.shape)
            continue
        shape = jax.ShapeDtypeStruct(parameter.shape, parameter.dtype)
        back = _LAYOUTS[layout].published
        tensors[path] = PublishedTensor(name, jax.eval_shape(back, shape).shape, *_LAYOUTS[layout])
    return tensors


def _one_key_head(name: str, shape: tuple[int, ...]) -> PublishedTensor:
    """Of a parameter with an entry a value head, `shape`, of which the published may have one."""

    def published(x: Any) -> Any:
        return x[:1] if (x == x[:1]).all() else x

    return PublishedTensor(name, shape, lambda x: np.broadcast_to(x, shape), published, True)


def _table(module: nnx.Module) -> dict[str, _Published]:
    """Published name and layout of every parameter that `module` can have, by its path."""
    if isinstance(module, MomentumDeltaNet):
        _check_fields(module.config, ("use_momentum", "bound"))
        return _MIXER
    if isinstance(module, SoftmaxAttention):
        return _MIXER
    if isinstance(module, MDNForCausalLM):
        check_published(module.config)
        layers = {
            f"layers.{i}.{ours}": _Published(f"model.layers.{i}.{p.name}", p.layout)
            for i in range(module.config.num_hidden_layers)
            for ours, p in _BLOCK.items()
        }
        return _MODEL | layers
    raise TypeError(
        "module: expected MDNForCausalLM, MomentumDeltaNet or SoftmaxAttention, got "
        f"{type(module).__name__}"
    )


def check_published(config: MDNConfig) -> None:
    """Raises ValueError unless the published implementation has this model."""
    _check_fields(config, NOT_PUBLISHED)
    if config.mlp_width == 0:
        raise ValueError("intermediate_size: expected an MLP in a published model, got 0")


def _check_fields(config: MDNConfig, names: Iterable[str]) -> None:
    for name in names:
        expected = NOT_PUBLISHED[name]
        if (got := getattr(config, name)) != expected:
            raise ValueError(
                f"{name}: expected {expected!r} in a published model, whose layers are MDN and, at "
                f"attn.layers, softmax attention; got {got!r}"
            )


def _join(path: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in path)


def check_tensors(tensors: Mapping[str, Any], published: Iterable[PublishedTensor]) -> None:
    """Raises ValueError with every tensor that is missing, unexpected or mis-shaped."""
    got = {name: tuple(np.shape(x)) for name, x in tensors.items()}
    expected = {
        x.name: (1,) if x.one_for_all and got.get(x.name) == (1,) else x.shape for x in published
    }
    problems = [f"missing {n} {list(s)}" for n, s in expected.items() if n not in got]
    problems += [f"unexpected {n} {list(s)}" for n, s in got.items() if n not in expected]
    problems += [
        f"{name}: expected shape {list(shape)}, got {list(got[name])}"
        for name, shape in expected.items()
        if name in got and got[name] != shape
    ]
    if problems:
        raise ValueError("tensors: " + "; ".join(problems))
