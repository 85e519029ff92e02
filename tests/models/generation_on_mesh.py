"""Generation over four devices and on one; prints tokens and where states lie, as JSON."""

import json
import sys

from tests.mesh_program import prepare

if __name__ == "__main__":
    prepare()

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType

from mdn_jax import MDNConfig, MDNForCausalLM, Sampling, generate
from mdn_jax.models import shard_model
from tests.tiny import TINY_MODEL

HYBRID = {
    "vocab_size": 31,
    "num_hidden_layers": 2,
    "intermediate_size": 8,
    "num_heads": 2,
    "head_dim": 4,
    "initializer_range": 0.3,
    "other_mixer": "attention",
    "other_layers": (1,),
}
PROMPTS = [np.arange(n) % 31 for n in (16, 3, 8, 11)]
SAMPLINGS = [
    Sampling(temperature=0.0),
    Sampling(temperature=0.9, top_k=7),
    Sampling(temperature=0.0, repetition_penalty=1.3),
    Sampling(min_p=0.05),
]


def made(model):
    piece = generate(
        model,
        PROMPTS,
        sampling=SAMPLINGS,
        max_new_tokens=[17, 9, 13, 17],
        stop_tokens=[[], [5], [], []],
        piece=8,
        block=8,
        logprobs=1,
    )
    numbers = [number for row in piece.logprobs for number in row.drawn]
    memory = piece.state.cache[0].state.s.sharding.shard_shape(piece.state.cache[0].state.s.shape)
    return {"tokens": piece.tokens, "numbers": numbers, "memory": list(memory)}


def cases():
    config = MDNConfig(**TINY_MODEL | HYBRID)
    model = MDNForCausalLM(
        config, implementation="scan", dtype=jnp.float64, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
    )
    yield "one", made(model)
    auto = (AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=auto, devices=jax.devices()[:4])
    yield "data tensor", made(shard_model(model, mesh))


if __name__ == "__main__":
    json.dump(dict(cases()), sys.stdout)
