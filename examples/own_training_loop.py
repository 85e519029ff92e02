"""A training loop of your own: the model as a Flax NNX module, Optax, nothing of `train`.

    python examples/own_training_loop.py

Rows are a random phrase said twice. The first half cannot be known; the second is in the memory,
and the loss on it falls towards 0 in a few hundred steps, in about a minute on one core.
"""

import argparse
import math

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mdn_jax import MDNConfig, MDNForCausalLM

KINDS, PHRASE, ROWS = 16, 12, 64
GUESSING = math.log(KINDS)


def batch(key: jax.Array) -> jax.Array:
    """Tokens `[ROWS, 2 PHRASE]`."""
    phrase = jax.random.randint(key, (ROWS, PHRASE), 0, KINDS)
    return jnp.concatenate([phrase, phrase], axis=1)


def loss_of(model: MDNForCausalLM, tokens: jax.Array) -> jax.Array:
    """Mean cross entropy of the repetition, nats a token."""
    logits, _ = model(tokens[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.mean(losses[:, PHRASE:])


@nnx.jit
def step(model: MDNForCausalLM, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
    """One update in place; the loss before it."""
    loss, gradients = nnx.value_and_grad(loss_of)(model, tokens)
    optimizer.update(model, gradients)
    return loss


def train(steps: int) -> tuple[float, float]:
    """The first and the last loss."""
    config = MDNConfig(
        vocab_size=KINDS, hidden_size=64, num_hidden_layers=2, num_heads=2, head_dim=32
    )
    model = MDNForCausalLM(config, rngs=nnx.Rngs(0))
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, steps // 10, steps)
    optimizer = nnx.Optimizer(model, optax.adamw(schedule, weight_decay=0.1), wrt=nnx.Param)
    losses = []
    for i in range(steps):
        losses.append(float(step(model, optimizer, batch(jax.random.key(i)))))
        if i % 50 == 0 or i == steps - 1:
            print(f"step {i:4}  loss {losses[-1]:.3f} nats a token, guessing {GUESSING:.3f}")
    return losses[0], losses[-1]


def main() -> None:
    """Trains as long as asked for."""
    parser = argparse.ArgumentParser(description="Trains a small model to repeat a phrase.")
    parser.add_argument("--steps", type=int, default=400)
    train(parser.parse_args().steps)


if __name__ == "__main__":
    main()
