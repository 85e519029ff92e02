"""The layer inside a Flax Linen model, by Flax's own bridge.

    python examples/linen_bridge.py

Parameters are where Linen has them (`variables["params"]`), so that a Linen training loop, its
optimizer and its checkpoints take them as any others.
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import nnx

from mdn_jax import MDNConfig, MomentumDeltaNet

CONFIG = MDNConfig(hidden_size=64, num_heads=2, head_dim=32)


class Block(nn.Module):
    """A Linen block with a layer of Momentum DeltaNet where attention would be."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`x` and the result: `[B, T, hidden]`."""
        mixer = nnx.bridge.to_linen(MomentumDeltaNet, CONFIG, name="mixer")
        y, _ = mixer(nn.RMSNorm()(x))
        x = x + y
        return x + nn.Dense(64)(nn.silu(nn.Dense(128)(nn.RMSNorm()(x))))


class Model(nn.Module):
    """Tokens to logits."""

    kinds: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Tokens `[B, T]` to logits `[B, T, kinds]`."""
        x = nn.Embed(self.kinds, 64)(tokens)
        return nn.Dense(self.kinds)(Block()(x))


def train(steps: int) -> tuple[float, float]:
    """First and last loss (nats a token) on rows that say a phrase twice."""
    model, optimizer = Model(kinds=16), optax.adam(3e-3)
    phrase = jax.random.randint(jax.random.key(0), (8, 12), 0, 16)
    tokens = jnp.concatenate([phrase, phrase], axis=1)
    params = model.init(jax.random.key(1), tokens)["params"]

    def loss_of(params: optax.Params) -> jax.Array:
        logits = model.apply({"params": params}, tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return losses.mean()

    @jax.jit
    def step(
        params: optax.Params, state: optax.OptState
    ) -> tuple[optax.Params, optax.OptState, jax.Array]:
        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = optimizer.init(params), []
    for _ in range(steps):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    return losses[0], losses[-1]


def main() -> None:
    """Prints the first and the last loss."""
    first, last = train(60)
    print(f"loss {first:.3f} -> {last:.3f} nats a token in 60 steps")


if __name__ == "__main__":
    main()
