"""The cross entropy against optax's on the logits of all tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mdn_jax import MDNConfig, MDNForCausalLM
from mdn_jax.models.loss import IGNORED, LOGIT_BYTES, _parts, summed_loss, token_losses
from tests.tiny import TINY_MODEL
from tests.train.helpers import random_batch
from train.step import split_model

ROWS, LENGTH, HIDDEN, VOCAB = 3, 10, 8, 37


def inputs(dtype, *, seed=0):
    rng = np.random.default_rng(seed)
    h = jnp.asarray(rng.normal(size=(ROWS, LENGTH, HIDDEN)), dtype)
    kernel = jnp.asarray(rng.normal(size=(HIDDEN, VOCAB)), jnp.float32)
    targets = rng.integers(0, VOCAB, (ROWS, LENGTH))
    return h, kernel, np.where(rng.random((ROWS, LENGTH)) < 0.3, IGNORED, targets)


def on_all_logits(h, kernel, targets):
    """The losses of every target, from the logits of every token."""
    logits = jnp.matmul(h, kernel.astype(h.dtype), preferred_element_type=jnp.float32)
    counted = targets != IGNORED
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(counted, targets, 0))
    return jnp.where(counted, losses, 0.0)


@jax.jit
def wanted_of(h, kernel, targets):
    """Losses, their sum and its gradients, from the logits of every token."""

    def loss(h, kernel):
        losses = on_all_logits(h, kernel, targets)
        return jnp.sum(losses), losses

    (value, losses), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(h, kernel)
    return losses, value, gradients


@pytest.mark.parametrize("parts", [None, 1, 3, 5])  # 3 does not divide the length
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_value_and_gradients_are_those_on_all_logits(dtype, bound, parts):
    h, kernel, targets = inputs(dtype)

    @jax.jit
    def ours(h, kernel, targets):
        def loss(h, kernel):
            return 3.0 * summed_loss(h, kernel, targets, parts=parts)

        losses = token_losses(h, kernel, targets, parts=parts)
        return losses, loss(h, kernel), jax.value_and_grad(loss, (0, 1))(h, kernel)

    losses, alone, (value, gradients) = ours(h, kernel, targets)
    # bfloat16 operands, exactly the same values in float32: what rounding the result costs
    exact = (h.astype(jnp.float32), kernel.astype(dtype).astype(jnp.float32))
    wanted_losses, expected, expected_gradients = wanted_of(*exact, targets)
    np.testing.assert_allclose(losses, wanted_losses, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(value, 3.0 * expected, rtol=1e-6)
    np.testing.assert_allclose(alone, 3.0 * expected, rtol=1e-6)
    assert [g.dtype for g in gradients] == [h.dtype, kernel.dtype]
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        actual, wanted = np.asarray(actual, np.float32), 3.0 * np.asarray(wanted)
        assert np.abs(actual - wanted).max() <= bound * np.abs(wanted).max()


def test_the_kernel_gradient_adds_up_in_float32():
    h = jnp.ones((1, 4096, 1), jnp.bfloat16)  # a bfloat16 sum of halves would stop at 128
    gradient = jax.grad(summed_loss, 1)(h, jnp.zeros((1, 2)), jnp.zeros((1, 4096), int), parts=64)
    np.testing.assert_array_equal(gradient, [[-2048.0, 2048.0]])


def test_targets_at_the_end_of_a_vocabulary_of_any_size():
    h, _, _ = inputs("float32")
    for vocab in (1, 63, 64, 65, 130):
        kernel = np.random.default_rng(vocab).normal(size=(HIDDEN, vocab)).astype(np.float32)
        targets = np.full((ROWS, LENGTH), vocab - 1)
        value, gradient = jax.jit(jax.value_and_grad(summed_loss, 1))(h, kernel, targets)
        _, expected, (_, wanted) = wanted_of(h, kernel, targets)
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-5)


def test_ignored_positions_contribute_nothing_even_with_logits_that_overflow():
    h, kernel, targets = inputs("float32")
    poisoned = jnp.where(targets[..., None] == IGNORED, 1e30, h)
    assert summed_loss(poisoned, kernel * 1e9, targets) == summed_loss(h, kernel * 1e9, targets)
    gradient = jax.grad(summed_loss)(h, kernel, targets)
    np.testing.assert_array_equal(gradient[targets == IGNORED], 0)
    assert summed_loss(h, kernel, np.full_like(targets, IGNORED)) == 0


@pytest.mark.parametrize(
    "target",
    [
        *(np.int32(x) for x in (VOCAB, VOCAB + 5, 64, -1, -VOCAB, -99, -101, 2**31 - 1, -(2**31))),
        np.int8(-1),
        np.uint8(156),  # -100 in 8 bits
        np.int64(2**32 + 1),
        np.int64(2**32 - 100),
    ],
    ids=repr,
)
def test_a_target_that_is_no_token_is_nan(target):
    h, kernel, targets = inputs("float32")
    targets = np.maximum(targets, 0).astype(target.dtype)
    expected = token_losses(h, kernel, targets.astype(np.int32))
    wanted = jax.grad(summed_loss)(h, kernel, targets.astype(np.int32))
    targets[1, 4] = target
    losses = np.asarray(token_losses(h, kernel, targets))
    at = np.zeros(targets.shape, bool)
    at[1, 4] = True
    np.testing.assert_array_equal(np.isnan(losses), at)
    np.testing.assert_array_equal(losses[~at], expected[~at])
    loss, (d_h, d_kernel) = jax.value_and_grad(summed_loss, (0, 1))(h, kernel, targets)
    assert np.isnan(loss)
    np.testing.assert_array_equal(np.isnan(d_h).all(axis=-1), at)
    np.testing.assert_array_equal(d_h[~at], wanted[~at])
    assert np.isnan(d_kernel).any()


@pytest.mark.parametrize("dtype", ["float32", "bool"])
def test_targets_are_integers(dtype):
    h, kernel, targets = inputs("float32")
    for loss in (summed_loss, token_losses):
        with pytest.raises(TypeError, match=f"targets: expected an integer dtype, got {dtype}"):
            loss(h, kernel, targets.astype(dtype))


def shapes(jaxpr):
    """Shape and type of every value in a program, programs within it included."""
    for equation in jaxpr.eqns:
        for value in equation.outvars:
            yield value.aval.shape, value.aval.dtype
        for parameter in jax.tree.leaves(equation.params, is_leaf=is_program):
            if is_program(parameter):
                yield from shapes(getattr(parameter, "jaxpr", parameter))


def is_program(x):
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_array_has_the_logits_of_all_tokens(tied, dtype):
    config = MDNConfig(**TINY_MODEL, tie_word_embeddings=tied)
    model = nnx.eval_shape(
        lambda: MDNForCausalLM(
            config, implementation="scan", dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)
        )
    )
    loss, params = split_model(model)
    batch = random_batch(0, 4, 16)
    size = 4 * 16 * config.vocab_size

    def largest(function):
        jaxpr = jax.make_jaxpr(function)(params, batch).jaxpr
        wide = [shape for shape, _ in shapes(jaxpr) if shape and shape[-1] >= config.vocab_size]
        return max(map(np.prod, wide))

    assert largest(loss) < size
    assert largest(jax.value_and_grad(loss)) < size

    def of_all(params, batch):  # the search finds what it looks for
        h = jnp.ones((4, 16, config.hidden_size), dtype)
        return jnp.sum(on_all_logits(h, params["embeddings"].T, batch["targets"]))

    assert largest(of_all) >= size


@pytest.mark.parametrize(
    ("rows", "length", "vocab", "parts"),
    [(8, 4096, 50257, 8), (1, 4096, 50257, 2), (1, 1, 50257, 1), (4, 4093, 50257, 4), (1, 6, 9, 2)],
)
def test_parts(rows, length, vocab, parts):
    assert _parts(rows, length, vocab) == parts
    assert rows * -(-length // parts) * vocab * 4 <= LOGIT_BYTES
