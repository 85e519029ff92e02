"""The mixer's kernel of a decoding step against the layer, and which shapes run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.decoding_inspect import lowered_step
from mdn_jax import MDNConfig, MDNForCausalLM
from mdn_jax.models.fused import fused_structure, fused_weights
from pallas_kernels.decoding import product_tiles, unsupported
from pallas_kernels.decoding.kernels import Projected, mixer
from tests.kernels import compiled

CONFIG = MDNConfig(
    vocab_size=19,
    hidden_size=32,
    num_hidden_layers=1,
    num_heads=1,
    head_dim=16,
    expand_v=2.0,
    intermediate_size=48,
)


def drawn(config: MDNConfig, dtype: str = "float32") -> MDNForCausalLM:
    """A model in which every parameter matters."""
    model = MDNForCausalLM(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    random = np.random.default_rng(1)

    def moved(x: jax.Array) -> jax.Array:
        """On the host, where no shape has programs of its own."""
        y = np.asarray(x, np.float32) + 0.3 * random.standard_normal(x.shape, np.float32)
        return jnp.asarray(y.astype(x.dtype))

    nnx.update(model, jax.tree.map(moved, nnx.state(model, nnx.Param)))
    return model


@pytest.mark.parametrize(
    "options",
    [
        {"num_v_heads": 2, "conv_bias": True},
        {"bound": "stable", "use_p_times_alpha": False, "use_output_correction": False},
        {"bound": "none", "use_momentum": False, "use_gate": False, "conv_size": 1},
    ],
    ids=lambda options: "-".join(options),
)
def test_the_mixer_is_that_of_the_layer(options):
    config = dataclasses.replace(CONFIG, **options)
    model = drawn(config)
    norm = model.layers[0].mixer_norm.scale  # which goes into the projections
    norm[...] = jnp.ones_like(norm[...])
    layer = model.layers[0].mixer
    structure, weights = fused_structure(model, interpret=True), fused_weights(model).layers[0]
    plan = structure.plan
    batch, active = 3, jnp.asarray([1, 0, 1])
    steps = structure.steps(fused_weights(model))
    cache = model.init_cache(batch)
    memory, rounded = steps.enter(cache), plan.rounded

    @jax.jit
    def by_kernel(x, memory, slot):
        y = jnp.dot(x, weights.projections.T, precision="highest")
        projected = Projected(y[:, :rounded], y[:, rounded:])
        mixed, memory = mixer(projected, weights, memory, slot, active, plan)
        heads = mixed.gated.reshape(batch, plan.value_heads, plan.value_dim)
        mean = jnp.sum(mixed.squares, axis=-1, keepdims=True) / plan.value_dim
        normed = (heads * jax.lax.rsqrt(mean + plan.eps)).reshape(batch, -1)
        return jnp.dot(normed, weights.output.T, precision="highest"), memory

    own, (entry,), slot = memory.layers[0], cache, memory.slot
    run = jax.jit(lambda x, cache: layer(x[:, None], None, cache, active))
    for key in jax.random.split(jax.random.key(2), 6):
        x = jax.random.normal(key, (batch, config.hidden_size))
        got, own = by_kernel(x, own, slot)
        slot = (slot + active) % config.conv_size
        expected, entry = run(x, entry)
        np.testing.assert_allclose(got[::2], expected[::2, 0], atol=2e-5)
        assert not got[1].any()
    after = steps.leave(memory._replace(layers=(own,), slot=slot))
    for got, expected in zip(jax.tree.leaves(after), jax.tree.leaves((entry,)), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-5)
        assert not got[1].any()


def test_tiles_cover_the_width_and_fill_the_device():
    for batch in (1, 2, 8, 64, 200):
        for outputs, width in ((4632, 1024), (1024, 2816), (50257, 2048), (48, 48)):
            for itemsize in (2, 4):
                tiles = product_tiles(batch, outputs, width, itemsize)
                assert width % (tiles.width * tiles.at_once) == 0
                assert tiles.dot == (batch > 1 and itemsize == 2)
                assert not tiles.dot or min(tiles[:3]) >= 16
                inner = tiles.within(32, width)
                assert 32 % inner.width == 0
                assert width % (inner.width * inner.at_once) == 0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"dtype": "float64"}, "models, got float64"),
        ({"key_dim": 48}, "K one of 16, 32, 64, 128, 256, got 48"),
        ({"value_dim": 48}, "V a power of two from 16 to 128, or 256, 384 or 512, got 48"),
        ({"conv_size": 9}, "at most 8 taps, got 9"),
        ({"widths": {"hidden_size": 40}}, "hidden_size a multiple of 16, got 40"),
        ({"largest": 2**31}, "fewer than 2\\^31 elements, got 2,147,483,648"),
        ({"capability": None}, "a CUDA GPU, got none"),
        ({"capability": (7, 5)}, "compute capability 8.0, .*, got 7.5"),
    ],
)
def test_what_does_not_run_is_named(changes, expected):
    arguments = {
        "dtype": "bfloat16",
        "capability": (9, 0),
        "key_dim": 128,
        "value_dim": 256,
        "conv_size": 4,
        "widths": {"hidden_size": 1024},
        "largest": 1000,
    } | changes
    lacking = unsupported(**arguments)
    if expected is None:
        assert lacking is None
    else:
        with pytest.raises(ValueError, match=expected):
            raise ValueError(lacking)


@pytest.mark.slow
@pytest.mark.parametrize("case", compiled.STEPS, ids=lambda case: f"K{case[0].head_dim}-{case[1:]}")
def test_kernels_compile_without_spills_and_fit(case):
    """Compiling needs Triton and is left out where that does not install; see `compiled`."""
    kernels = lowered_step(*case)
    assert [kernel.name for kernel in kernels] == [
        f"mdn_decode_{name}" for name in ("projections", "mixer", "output", "up", "down", "head")
    ]
    assert [kernel.in_place for kernel in kernels] == [0, 3, 0, 0, 0, 0]
    pytest.importorskip("triton", reason="the development version is for x86-64 Linux")
    for kernel in kernels:
        report = compiled.report(kernel, (9, 0))
        assert not report.spilled, report
        assert not report.over_limit, report
