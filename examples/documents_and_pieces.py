"""The operator on packed documents, and on a text that comes in pieces.

    python examples/documents_and_pieces.py

Documents of different lengths lie in one row and do not see each other. A long text is read piece
by piece, with a state that stays as large as it is, and gives what one call gives; gradients go
through the state from one piece into those before.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdn_jax import momentum_delta_rule
from mdn_jax.testing import random_inputs, relative_error

LENGTHS = (70, 5, 125)


def steps(inputs: dict[str, Any], first: int, end: int) -> dict[str, Any]:
    """The arguments cut along time."""
    return {name: x[:, first:end] for name, x in inputs.items()}


def packed_and_separate(inputs: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    """Outputs of the documents in one row, and of each in a call of its own."""
    segment_ids = jnp.asarray(np.repeat(np.arange(len(LENGTHS)), LENGTHS)[None])
    packed, _ = momentum_delta_rule(**inputs, segment_ids=segment_ids)
    ends = [sum(LENGTHS[: i + 1]) for i in range(len(LENGTHS))]
    separate = [
        momentum_delta_rule(**steps(inputs, end - length, end))[0]
        for end, length in zip(ends, LENGTHS, strict=True)
    ]
    return packed, jnp.concatenate(separate, axis=1)


def in_pieces(inputs: dict[str, Any], size: int) -> jax.Array:
    """Outputs, `size` steps a call; each begins with the state that the one before ended with."""
    state, outputs = None, []
    for first in range(0, inputs["q"].shape[1], size):
        piece = steps(inputs, first, first + size)
        o, state = momentum_delta_rule(**piece, initial_state=state)
        outputs.append(o)
    return jnp.concatenate(outputs, axis=1)


def main() -> None:
    """Prints how far both ways are from each other."""
    inputs: dict[str, Any] = random_inputs(
        seed=0, batch=1, length=sum(LENGTHS), regime="ballistic", initial_state=False
    )
    error = relative_error(*packed_and_separate(inputs))
    print(f"documents packed or separate: relative difference {error:.1e}")

    whole, state = momentum_delta_rule(**inputs)
    error = relative_error(in_pieces(inputs, 64), whole)
    numbers = sum(x.size for x in jax.tree.leaves(state))
    print(f"in pieces or at once: {error:.1e}; {numbers:,} numbers of state at any length")

    def last(v: jax.Array, size: int) -> jax.Array:
        """Of the last outputs, which earlier values reach through the states alone."""
        return jnp.sum(in_pieces(inputs | {"v": v}, size)[:, -1] ** 2)

    gradients = [jax.grad(last)(inputs["v"], size) for size in (64, sum(LENGTHS))]
    print(f"gradients through the states: {relative_error(*gradients):.1e}")


if __name__ == "__main__":
    main()
