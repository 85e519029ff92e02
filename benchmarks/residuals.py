"""What a block keeps for its backward pass on a GPU, array by array, as JAX traces it."""

from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
import tyro
from flax import nnx
from tabulate import tabulate

from configs import CONFIGS
from mdn_jax import MDNConfig
from mdn_jax.models.remat import Remat, with_remat
from mdn_jax.ops import target_gpu

ROWS, LENGTH = 2, 4096


@dataclass(frozen=True)
class ResidualsConfig:
    """Lists the arrays that a block of a model keeps; needs no GPU."""

    model: str = "mdn_400m"
    """Name of a configuration, as for `python -m train`."""
    remat: Remat = "none"
    """What is computed again in the backward pass."""

    def __post_init__(self) -> None:
        if self.model not in CONFIGS:
            raise ValueError(f"model: expected one of {', '.join(CONFIGS)}, got {self.model!r}")


def residuals(config: Annotated[ResidualsConfig, tyro.conf.arg(name="")]) -> None:
    """Prints the arrays of the first block, largest first."""
    model = CONFIGS[config.model]().model
    with target_gpu():
        held = kept(model, config.remat, ROWS)
    tokens = ROWS * LENGTH
    lines = [
        ["x".join(map(str, x.shape[2:])) or "1", x.dtype.name, f"{_bytes(x) / tokens:,.0f}"]
        for x in sorted(held, key=_bytes, reverse=True)
    ]
    total = sum(map(_bytes, held)) / tokens
    lines.append(["sum", "", f"{total:,.0f}"])
    headers = ["behind rows and steps, or rows and heads", "dtype", "bytes a token"]
    print(f"{config.model}, remat {config.remat}: a block, in bfloat16, capability 9.0")
    print(tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True))
    layers = model.num_hidden_layers
    print(f"{layers} blocks: {layers * total * 32768 / 1e9:.1f} GB for 32,768 tokens")


def _bytes(x: jax.ShapeDtypeStruct) -> int:
    return int(x.size) * x.dtype.itemsize


def kept(config: MDNConfig, remat: Remat, rows: int) -> list[jax.ShapeDtypeStruct]:
    """The arrays that the derivative of the first block holds, its parameters apart.

    Args:
      config: of the model.
      remat: see `mdn_jax.models.remat`.
      rows: of `LENGTH` tokens.
    """
    from mdn_jax.models.causal_lm import Block

    block = nnx.eval_shape(
        lambda: Block(
            config,
            0,
            remat=remat,
            dtype=jnp.bfloat16,
            param_dtype=jnp.bfloat16,
            rngs=nnx.Rngs(0),
        )
    )
    graph, state = nnx.split(block)
    h = jax.ShapeDtypeStruct((rows, LENGTH, config.hidden_size), jnp.bfloat16)

    def pullback(state: object, h: jax.Array) -> object:
        run = with_remat(lambda state, h: nnx.merge(graph, state)(h)[0], remat)
        return jax.vjp(run, state, h)[1]

    held = jax.tree.leaves(jax.eval_shape(pullback, state, h))
    return [x for x in held if x.ndim > 2]
