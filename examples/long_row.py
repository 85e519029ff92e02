"""One row over several devices: a model of your own under `jax.shard_map`, trained.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python examples/long_row.py

The mesh cuts rows over `data` and the tokens of each row over `context`. Documents may cross from
one device to the next. The flag simulates eight devices on a CPU; without it the program runs on
the devices that there are.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from mdn_jax import MDNConfig, MomentumDeltaNet

HIDDEN, VOCABULARY, ROWS, LENGTH = 32, 64, 2, 64
CONFIG = MDNConfig(hidden_size=HIDDEN, num_heads=2, head_dim=16)
TOKENS = PartitionSpec("data", "context")


class Model(nnx.Module):
    """An embedding, one layer, an output projection."""

    def __init__(self, context_axis: str | None, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, HIDDEN, rngs=rngs)
        self.mixer = MomentumDeltaNet(CONFIG, context_axis=context_axis, rngs=rngs)
        self.output = nnx.Linear(HIDDEN, VOCABULARY, rngs=rngs)

    def __call__(self, tokens: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """Logits of this device's tokens."""
        h = self.embed(tokens)
        y, _ = self.mixer(h, segment_ids)  # the convolutions and the rule see across devices
        return self.output(h + y)


def make_step(
    mesh: jax.sharding.Mesh | None, optimizer: optax.GradientTransformation
) -> tuple[Any, Callable[..., Any]]:
    """The parameters, and a training step on a mesh; on one device where there is none."""
    axes = None if mesh is None else ("data", "context")
    model = Model(None if axes is None else "context", nnx.Rngs(0))
    graph, params = nnx.split(model)

    def step(
        params: Any, moments: Any, tokens: jax.Array, targets: jax.Array, segment_ids: jax.Array
    ) -> Any:
        def loss(params: Any) -> jax.Array:
            logits = nnx.merge(graph, params)(tokens, segment_ids)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            total = losses.sum() / (ROWS * LENGTH)
            return total if axes is None else jax.lax.psum(total, axes)

        value, gradients = jax.value_and_grad(loss)(params)  # summed over all devices
        updates, moments = optimizer.update(gradients, moments, params)
        return optax.apply_updates(params, updates), moments, value

    if mesh is None:
        return params, jax.jit(step)
    whole = PartitionSpec()
    specs = (whole, whole, TOKENS, TOKENS, TOKENS)
    return params, jax.jit(jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=whole))


def train(mesh: jax.sharding.Mesh | None, steps: int) -> list[float]:
    """The losses of a few steps."""
    tokens = jnp.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) * 7 % 11
    targets = jnp.roll(tokens, -1, axis=1)  # cut whole rows: a target may be on the next device
    segment_ids = (jnp.arange(LENGTH) // 23)[None].repeat(ROWS, 0)  # ends where no device does
    batch = (tokens, targets, segment_ids)
    if mesh is not None:
        batch = jax.device_put(batch, NamedSharding(mesh, TOKENS))
    optimizer = optax.adam(1e-2)
    params, step = make_step(mesh, optimizer)
    moments, losses = optimizer.init(params), []
    if mesh is not None:  # where each step leaves them: its program is one
        params, moments = jax.device_put((params, moments), NamedSharding(mesh, PartitionSpec()))
    for _ in range(steps):
        params, moments, loss = step(params, moments, *batch)
        losses.append(float(loss))
    return losses


def main() -> None:
    """Trains on one device and on all, and prints both."""
    rows = ROWS if jax.device_count() % ROWS == 0 else 1
    shape = (rows, jax.device_count() // rows)
    mesh = jax.make_mesh(shape, ("data", "context"))
    print("one device:", *(f"{loss:.5f}" for loss in train(None, 4)))
    print(f"data {shape[0]} x context {shape[1]}:", *(f"{loss:.5f}" for loss in train(mesh, 4)))


if __name__ == "__main__":
    main()
