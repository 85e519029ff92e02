"""The engine over four devices and on one; prints texts as JSON."""

import json
import sys
import threading
import time

from tests.mesh_program import prepare

if __name__ == "__main__":
    prepare()

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType

from mdn_jax import MDNConfig, MDNForCausalLM, Sampling
from mdn_jax.models import shard_model
from mdn_jax.serving.jobs import Job
from mdn_jax.serving.limits import Limits
from tests.serving.running import make_engine
from tests.tiny import TINY_MODEL

SMALL = {
    "vocab_size": 31,
    "intermediate_size": 8,
    "num_heads": 2,
    "head_dim": 4,
    "initializer_range": 0.3,
    "num_hidden_layers": 2,
    "other_mixer": "attention",
    "other_layers": (1,),
}


def made(model):
    """Tokens of more texts than there are slots, and how a slot's memory lies."""
    engine = make_engine(model, Limits(slots=2), piece=4, block=4)
    jobs, done = [], []
    for i in range(5):
        tokens, ended = [], threading.Event()

        def receive(event, tokens=tokens, ended=ended):
            tokens.extend(event.tokens)
            if event.end is not None:
                ended.set()

        sampling = Sampling(temperature=0.5 * i)
        prompt = [(7 * i + k) % 31 for k in range(5 + 5 * i)]
        jobs.append(
            Job(prompt=prompt, max_tokens=3 + 4 * i, sampling=sampling, seed=i, receive=receive)
        )
        done.append((tokens, ended))
    engine.device.warm = lambda: None  # of what it compiles half is not needed
    ways = set()  # how memory lies after each program: another way is another program, and a move

    def watched(program):
        def run(*args, **kwargs):
            result = program(*args, **kwargs)
            cache = jax.tree.leaves(engine.device._rows.state.cache)
            ways.add(tuple(x.sharding.shard_shape(x.shape) for x in cache))
            return result

        return run

    engine.device.read = watched(engine.device.read)
    engine.device.decode = watched(engine.device.decode)
    engine.start()
    while engine.status == "starting":
        time.sleep(0.005)
    engine.submit(jobs)
    for _, ended in done:
        ended.wait()
    memory = engine.device._rows.state.cache[0].state.s
    engine.close()
    assert engine.status == "ended"
    return {
        "tokens": [tokens for tokens, _ in done],
        "ways": len(ways),
        "memory": list(memory.sharding.shard_shape(memory.shape)),
    }


def cases():
    model = MDNForCausalLM(
        MDNConfig(**TINY_MODEL | SMALL),
        implementation="scan",
        dtype=jnp.float64,
        param_dtype=jnp.float64,
        rngs=nnx.Rngs(0),
    )
    yield "one", made(model)
    auto = (AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=auto, devices=jax.devices()[:4])
    yield "mesh", made(shard_model(model, mesh))


if __name__ == "__main__":
    json.dump(dict(cases()), sys.stdout)
