"""Tokens by the kernels beside those by the model's layers, both against float32."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from mdn_jax import MDNForCausalLM
from mdn_jax.models.fused import FusedWeights, fused_structure
from mdn_jax.models.structure import LayerSteps

ALLOWED = 1.2
"""How much further from float32 the kernels may be than the model's own layers are."""

ASKED = 2e-2
"""What was asked for: how far log-probabilities of both may be from each other in 16 bits."""


class Found(NamedTuple):
    """What a check finds of all tokens; nats.

    Attributes:
      squares: mean squares of the kernels' and the layers' errors against float32, added up over
        the tokens.
      worst: their largest.
      apart: the largest distance of the kernels from the layers, over the whole vocabulary.
      taken: the same of the tokens that float32 takes.
      same: of how many tokens the likeliest is the same.
      lead: most by which the layers' likeliest token leads where it is not the kernels'.
    """

    squares: Any
    worst: Any
    apart: Any
    taken: Any
    same: Any
    lead: Any


NOTHING = Found(
    np.zeros(2, np.float32),
    np.zeros(2, np.float32),
    np.float32(0),
    np.float32(0),
    np.int32(0),
    np.float32(0),
)
"""Of no tokens."""


def check(
    model: MDNForCausalLM, weights: FusedWeights, batch: int, tokens: int, *, interpret: bool
) -> tuple[str, bool]:
    """Both paths and float32, each fed the tokens that are float32's likeliest.

    So tokens are the same at temperature 0 if and only if the likeliest one always is. In float32
    it has to be. In 16 bits both paths round, in different places: each is to be as near to float32
    as rounding lets the layers be, and then they are no further apart than both errors together.

    Args:
      model: in any dtype.
      weights: of it, joined.
      batch: rows.
      tokens: how many.
      interpret: in the interpreter, on any device.

    Returns:
      What was found, in a line, and whether it is right.
    """
    exact = MDNForCausalLM(model.config, rngs=nnx.Rngs(0))
    nnx.update(exact, jax.tree.map(lambda x: x.astype(jnp.float32), nnx.state(model)))
    is_exact = model.dtype == jnp.float32
    structure = fused_structure(model, interpret=interpret)
    memory = jax.jit(structure.steps(weights).enter)(model.init_cache(batch))
    (own, state), (best, wide) = _by_layers(model), _by_layers(exact)

    @jax.jit
    def by_kernels(weights: Any, memory: Any, tokens: Array) -> tuple[Array, Any]:
        return structure.steps(weights).step(memory, tokens)

    cache, exactly = model.init_cache(batch), exact.init_cache(batch)
    random = np.random.default_rng(0)
    ids = jnp.asarray(random.integers(model.config.vocab_size, size=batch), jnp.int32)
    found = NOTHING
    for _ in range(tokens):
        with jax.default_matmul_precision("highest"):
            true, exactly = best(wide, exactly, ids)
        got, memory = by_kernels(weights, memory, ids)
        layers = true
        if not is_exact:
            layers, cache = own(state, cache, ids)
        found, ids = compared(found, got, layers, true)
    return described(found, batch, tokens, is_exact=is_exact)


def _by_layers(model: MDNForCausalLM) -> tuple[Any, Any]:
    graph, state = nnx.split(model)

    def run(state: Any, cache: Any, tokens: Array) -> tuple[Array, Any]:
        return LayerSteps(nnx.merge(graph, state)).step(cache, tokens)

    return jax.jit(run), state


@jax.jit
def compared(found: Found, got: Array, layers: Array, true: Array) -> tuple[Found, Array]:
    """With one more token of every row, `[B, vocab]` each; the tokens that float32 takes."""
    got, layers, true = (jax.nn.log_softmax(x) for x in (got, layers, true))
    taken = jnp.argmax(true, axis=-1)
    errors = jnp.stack([got - true, layers - true])
    apart = jnp.abs(got - layers)
    of_taken = jnp.take_along_axis(apart, taken[:, None], axis=-1)
    same = jnp.argmax(got, axis=-1) == jnp.argmax(layers, axis=-1)
    first, second = jnp.moveaxis(jax.lax.top_k(layers, 2)[0], -1, 0)
    after = Found(
        found.squares + jnp.mean(errors * errors, axis=(1, 2)),
        jnp.maximum(found.worst, jnp.max(jnp.abs(errors), axis=(1, 2))),
        jnp.maximum(found.apart, jnp.max(apart)),
        jnp.maximum(found.taken, jnp.max(of_taken)),
        found.same + jnp.sum(same),
        jnp.maximum(found.lead, jnp.max(jnp.where(same, 0.0, first - second))),
    )
    return after, taken.astype(jnp.int32)


def described(found: Found, batch: int, tokens: int, *, is_exact: bool) -> tuple[str, bool]:
    """A line, and whether all is right."""
    kernels, layers = np.sqrt(np.asarray(found.squares) / tokens)
    worst, of_layers = np.asarray(found.worst)
    count, same = batch * tokens, int(found.same)
    line = (
        f"batch {batch}, {tokens:,} tokens: log-probabilities are {kernels:.1e} (root mean square; "
        f"at most {worst:.1e}) from float32"
    )
    if not is_exact:
        met = "met" if float(found.apart) <= ASKED else "missed"
        line += (
            f", those of the layers {layers:.1e} ({of_layers:.1e}); from each other at most "
            f"{float(found.apart):.1e} ({ASKED:g} {met}), of the tokens taken "
            f"{float(found.taken):.1e}"
        )
    line += f"; the likeliest token is the same in {same:,} of {count:,}"
    if same < count:
        line += f", where it is not it leads by at most {float(found.lead):.1e}"
    if kernels > ALLOWED * layers + 1e-5:
        return f"{line}: WRONG, expected at most {ALLOWED} times the layers'", False
    if is_exact and same < count:
        return f"{line}: WRONG, expected the same tokens in float32", False
    return line, True
