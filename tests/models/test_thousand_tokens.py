"""1,000 tokens at temperature 0: one by one, and all in one pass by the definition."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import CONFIGS
from mdn_jax import MDNForCausalLM, Sampling, generate
from mdn_jax.models import Decoder, steps
from mdn_jax.models.fused import fused_lacks, fused_structure

TOKENS = 1000
PROMPT = [1, 2, 3, 4, 5]


def smoke_model(**options):
    """With weights large enough that the likeliest token leads clearly."""
    config = dataclasses.replace(CONFIGS["smoke"]().model, initializer_range=0.3)
    return MDNForCausalLM(config, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize("kind", ["layers", "kernels"])
def test_tokens_one_by_one_are_those_of_one_pass(kind, monkeypatch):
    monkeypatch.setattr(steps, "fused_lacks", partial(fused_lacks, interpret=True))
    monkeypatch.setattr(steps, "fused_structure", partial(fused_structure, interpret=True))
    made = generate(
        Decoder(smoke_model(), steps=kind),
        [PROMPT],
        max_new_tokens=TOKENS,
        sampling=Sampling(temperature=0.0),
        block=256,
        logprobs=0,
    )
    (tokens,), (logprobs,) = made.tokens, made.logprobs
    definition = smoke_model(implementation="scan")
    whole = jax.jit(lambda model, x: model(x)[0])(definition, jnp.asarray([PROMPT + tokens[:-1]]))
    whole = np.asarray(jax.nn.log_softmax(whole[0, len(PROMPT) - 1 :]))
    np.testing.assert_array_equal(tokens, whole.argmax(-1))
    np.testing.assert_allclose(logprobs.drawn, whole.max(-1), atol=1e-4)
    # neither ends in a circle, where 1,000 tokens would be no more than few
    assert len({tuple(tokens[i : i + 3]) for i in range(TOKENS)}) > 0.9 * TOKENS
