"""The short convolutions in the interpreter, against their definition; what they lower to."""

import platform
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from mdn_jax import MDNConfig
from mdn_jax.layers.momentum_deltanet import MomentumDeltaNet
from mdn_jax.layers.sharding import by_rows_and_channels
from mdn_jax.layers.short_conv import ShortConv, short_convolutions
from mdn_jax.ops import api
from mdn_jax.testing import relative_errors
from pallas_kernels import offline_compile
from pallas_kernels.short_convolution import MIN_STEPS, Branch, Tiles, short_convolution
from pallas_kernels.target import target_gpu
from tests.kernels.addresses import offsets
from tests.tiny import TINY_MODEL

TILES = Tiles(strips=2, steps=8, channels=8, unroll=1)
"""Several spans, strips and blocks at small sizes."""
KERNELS = ("short_convolution_fwd", "short_convolution_bwd")


def branches(widths, length, taps, *, dtype="float32", bias=True, tail=True, batch=2):
    rng = np.random.default_rng(len(widths) + length + taps)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    return tuple(
        Branch(
            normal(batch, length, width),
            normal(batch, taps - 1, width) if tail and taps > 1 else None,
            normal(taps, width),
            normal(width) if bias else None,
        )
        for width in widths
    )


def first_steps(batch, length, *rows):
    starts = np.zeros((batch, length), bool)
    for row, steps in enumerate(rows):
        starts[row, list(steps)] = True
    return jnp.asarray(starts)


def definition(branch, starts, d_y, *, activation=True):
    """Outputs and gradients, step by step in float64; what a tap sees is listed, not masked."""
    x, tail, taps, bias = (None if y is None else np.asarray(y, np.float64) for y in branch)
    size, (batch, length, width) = taps.shape[0], x.shape
    before = size - 1
    if tail is None:
        tail = np.zeros((batch, before, width))
    inputs = np.concatenate([tail, x], axis=1)
    y, d_inputs, d_taps = np.zeros(x.shape), np.zeros(inputs.shape), np.zeros(taps.shape)
    d_bias = np.zeros(width)
    for b in range(batch):
        start = 0  # of the document, among the inputs
        for t in range(length):
            start = t + before if starts is not None and starts[b, t] else start
            sees = range(max(start, t), t + before + 1)
            total = sum(taps[i - t] * inputs[b, i] for i in sees) + (0 if bias is None else bias)
            gate = 1 / (1 + np.exp(-total)) if activation else 1.0
            y[b, t] = total * gate
            slope = gate + y[b, t] * (1 - gate) if activation else 1.0
            d_total = np.asarray(d_y[b, t], np.float64) * slope
            d_bias += d_total
            for i in sees:
                d_inputs[b, i] += taps[i - t] * d_total
                d_taps[i - t] += inputs[b, i] * d_total
    d_tail = None if branch.tail is None else d_inputs[:, :before]
    d = Branch(d_inputs[:, before:], d_tail, d_taps, None if bias is None else d_bias)
    return y, d


def both_passes(given, starts, d_y, **options):
    return _both_passes(given, starts, d_y, tuple(options.items()))


@partial(jax.jit, static_argnums=3)
def _both_passes(given, starts, d_y, options):
    run = partial(short_convolution, starts=starts, tiles=TILES, interpret=True, **dict(options))
    y, pull = jax.vjp(lambda given: run(given), given)
    return y, pull(d_y)[0]


def check(given, starts, limit, **options):
    d_y = tuple(jnp.cos(jnp.arange(b.x.size)).reshape(b.x.shape).astype(b.x.dtype) for b in given)
    actual = both_passes(given, starts, d_y, **options)
    expected = [definition(b, starts, d, **options) for b, d in zip(given, d_y, strict=True)]
    y, gradients = zip(*expected, strict=True)
    errors = relative_errors(actual, (y, gradients))
    assert max(errors.values()) <= limit, errors


def test_packed_documents_with_tails_and_biases():
    """Two branches, ragged in time and width; documents shorter than the taps; two spans."""
    starts = first_steps(2, 37, (1, 2, 5, 8, 20), (15, 16, 31, 36))
    check(branches((5, 11), 37, 4), starts, 3e-6)


@pytest.mark.parametrize(
    ("length", "taps", "options"), [(16, 1, {}), (1, 3, {"activation": False}), (18, 8, {})]
)
def test_numbers_of_taps(length, taps, options, x64):
    """In 64-bit mode; without documents or tails, and a row shorter than the taps."""
    check(branches((3,), length, taps, bias=False, tail=taps == 3), None, 3e-6, **options)


@pytest.mark.parametrize(("dtype", "limit"), [("bfloat16", 4e-3), ("float16", 5e-4)])
def test_16_bits(dtype, limit):
    """Sums are float32: the errors are of one rounding."""
    check(branches((8,), 16, 2, dtype=dtype), first_steps(2, 16, (3,), ()), limit)


def test_joined_inputs_are_read_where_they_lie():
    """One array of the inputs of all, and one of their gradients: the same bits."""
    starts = first_steps(2, 18, (5, 8), ())
    given = branches((5, 11), 18, 2, bias=False, tail=False)
    d_y = tuple(jnp.cos(b.x) for b in given)
    y, apart = both_passes(given, starts, d_y)

    @jax.jit
    def joined(x, given):
        run = partial(short_convolution, starts=starts, tiles=TILES, interpret=True)
        y, pull = jax.vjp(lambda given, x: run(given, joined=x), given, x)
        return y, *pull(d_y)

    none = tuple(b._replace(x=None) for b in given)
    actual, d, d_x = joined(jnp.concatenate([b.x for b in given], axis=2), none)
    expected = y, tuple(b._replace(x=None) for b in apart)
    jax.tree.map(np.testing.assert_array_equal, (actual, d), expected)
    np.testing.assert_array_equal(d_x, np.concatenate([b.x for b in apart], axis=2))


def test_what_is_not_finite_stays_in_its_document():
    starts = first_steps(2, 37, (5, 8, 20), (16,))
    (given, other) = branches((5, 11), 37, 4)
    number = np.cumsum(np.asarray(starts), axis=1)
    d_y = (jnp.ones(given.x.shape), jnp.ones(other.x.shape))
    expected, d = both_passes((given, other), starts, d_y)
    for bad in (0, 2):  # with the tail, and in the middle
        own = number == bad
        x = jnp.where(own[:, :, None], jnp.nan, given.x)
        tail = given.tail * (jnp.inf if bad == 0 else 1)
        y, d_bad = both_passes((given._replace(x=x, tail=tail), other), starts, d_y)
        for actual, wanted in ((y[0], expected[0]), (d_bad[0].x, d[0].x)):
            np.testing.assert_array_equal(actual[~own], wanted[~own])
            assert not np.isfinite(actual[own]).any()
        np.testing.assert_array_equal(y[1], expected[1])


def test_vmap_equals_a_loop():
    (given,) = branches((8,), 16, 2, batch=1)
    stack = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), given)
    starts = first_steps(1, 16, (3,))
    d_y = (jnp.ones((1, 16, 8)),)
    mapped = jax.vmap(lambda given: both_passes((given,), starts, d_y))(stack)
    looped = [
        both_passes((jax.tree.map(lambda x, i=i: x[i], stack),), starts, d_y) for i in range(2)
    ]
    errors = relative_errors(mapped, jax.tree.map(lambda *x: jnp.stack(x), *looped))
    assert max(errors.values()) <= 1e-6


def shapes(given):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), given)


def training(run, given, starts):
    y, pull = jax.vjp(lambda given: run(given, starts), given)
    return y, pull(y)


def test_on_a_mesh_each_device_has_its_rows_and_channels():
    """As they lower, with `check_vma`, which the interpreter lacks."""
    starts = jax.ShapeDtypeStruct((4, 64), jnp.bool_)
    given = shapes(branches((16, 32), 64, 4, dtype="bfloat16", batch=4))
    with target_gpu((9, 0), {"data": 2, "tensor": 2}):
        run = partial(by_rows_and_channels, short_convolution)
        traced = jax.jit(partial(training, run)).trace(given, starts)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        # where a caller's own `shard_map` has cut the rows, the taps are everybody's
        rows = PartitionSpec("data")
        cuts = (Branch(rows, rows, PartitionSpec(), PartitionSpec()),) * 2
        own = jax.shard_map(
            partial(training, short_convolution),
            in_specs=(cuts, rows),
            out_specs=((rows,) * 2, (cuts,)),
            axis_names={"data", "tensor"},
        )
        jax.jit(own).trace(given, starts).lower(lowering_platforms=("cuda",))
    calls = [line for line in text.splitlines() if "triton" in line]
    assert len(calls) == 2
    assert all("tensor<2x64x8xbf16>" in call for call in calls)
    assert all("tensor<2x64x16xbf16>" in call for call in calls)


def layer(**options):
    options = {"dtype": jnp.bfloat16, "rngs": nnx.Rngs(0)} | options
    return ShortConv(24, options.pop("size", 4), **options)


def test_a_gpu_gets_the_kernel(monkeypatch, x64):
    def calls(conv, length):
        x, tail = jnp.zeros((1, length, 24), conv.dtype), conv.init_cache(1)
        return str(jax.make_jaxpr(lambda x: conv(x, tail)[0])(x)).count(f"name={KERNELS[0]}")

    assert calls(layer(), MIN_STEPS) == 0
    monkeypatch.setattr(api, "_capability", lambda: (9, 0))
    assert calls(layer(), MIN_STEPS) == 1
    for other in (layer(size=9), layer(dtype=jnp.float64), layer(implementation="xla")):
        assert calls(other, MIN_STEPS) == 0
    assert calls(layer(), MIN_STEPS - 1) == 0
    assert calls(layer(implementation="pallas_triton"), 1) == 1
    with pytest.raises(ValueError, match=r'implementation: "pallas_triton" expects at most 8 taps'):
        calls(layer(size=9, implementation="pallas_triton"), MIN_STEPS)


def test_the_layer_on_the_kernel(monkeypatch):
    """Three convolutions in one call: outputs, tails and gradients of XLA's code."""
    interpreted = partial(short_convolution, tiles=TILES, interpret=True)
    monkeypatch.setattr("pallas_kernels.short_convolution.short_convolution", interpreted)
    monkeypatch.setattr(api, "_capability", lambda: (9, 0))
    ids = jnp.asarray([[0] * 7 + [1] * 12, [2] * 19])
    x = jax.random.normal(jax.random.key(0), (2, 19, 24))
    tail = jax.random.normal(jax.random.key(1), (2, 4, 24))
    results = []
    for implementation in ("pallas_triton", "xla"):
        options = {"dtype": jnp.float32, "initializer_range": 1.0, "use_bias": True}
        convs = [layer(implementation=implementation, **options) for _ in range(2)]
        graph, params = nnx.split(convs)

        def run(params, x, tail, graph=graph):
            convs = nnx.merge(graph, params)
            return short_convolutions(convs, (x, 2 * x), (tail, tail), segment_ids=ids)

        def gradients(*given, run=run):
            y, pull = jax.vjp(run, *given)
            return y, pull(jax.tree.map(jnp.sin, y))

        results.append(jax.jit(gradients)(params, x, tail))
    errors = relative_errors(*jax.tree.map(np.asarray, results))
    assert max(errors.values()) <= 3e-6, errors


def test_a_mixer_projects_once(monkeypatch):
    """Queries, keys and values of one product: as of three, gradients of every parameter too."""
    config = MDNConfig(**TINY_MODEL | {"num_heads": 2, "num_v_heads": 4, "conv_bias": True})
    mixer = MomentumDeltaNet(config, rngs=nnx.Rngs(0))
    graph, params = nnx.split(mixer)
    x = jax.random.normal(jax.random.key(0), (2, 19, config.hidden_size))
    ids = jnp.asarray([[0] * 7 + [1] * 12, [2] * 19])

    def both(params, x):
        def run(params, x):
            mixer = nnx.merge(graph, params)
            return mixer.qkv(x, ids, mixer.init_cache(2))

        y, pull = jax.vjp(run, params, x)
        return y, pull(jax.tree.map(jnp.sin, y))

    apart = jax.jit(both)(params, x)
    interpreted = partial(short_convolution, tiles=TILES, interpret=True)
    monkeypatch.setattr("pallas_kernels.short_convolution.short_convolution", interpreted)
    monkeypatch.setattr(api, "_capability", lambda: (9, 0))
    joined = jax.jit(lambda *given: both(*given))
    text = str(joined.trace(params, x).jaxpr)
    assert text.count("dot_general") == 3  # forward, and for either gradient
    errors = relative_errors(joined(params, x), apart)
    assert max(errors.values()) <= 1e-5, errors


@pytest.mark.slow
def test_no_index_overflows():
    """Queries, keys and values of 3.2e9 numbers each."""
    given = shapes(branches((8,), 16, 4, dtype="bfloat16"))
    x = jax.ShapeDtypeStruct((512, 4096, 1536), jnp.bfloat16)
    given = (given[0]._replace(x=x, tail=None, taps=x.update(shape=(4, 1536)), bias=None),)
    starts = jax.ShapeDtypeStruct((512, 4096), jnp.bool_)
    for kernel in offline_compile.lowered(
        partial(training, short_convolution), (9, 0), given, starts
    ):
        assert max(int(offset.max()) for offset in offsets(kernel)) >= 2**31, kernel.name


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="the development version of Triton is for x86-64 Linux",
)
def test_nothing_spills_at_the_published_size():
    def row(width):
        x = jax.ShapeDtypeStruct((8, 4096, width), jnp.bfloat16)
        return Branch(x, x.update(shape=(8, 3, width)), x.update(shape=(4, width)), None)

    given = (row(768), row(768), row(1536))
    starts = jax.ShapeDtypeStruct((8, 4096), jnp.bool_)
    kernels = offline_compile.lowered(partial(training, short_convolution), (9, 0), given, starts)
    assert [kernel.name for kernel in kernels] == list(KERNELS)
    for kernel in kernels:
        report = offline_compile.compile_kernel(kernel, (9, 0))
        assert not report.spilled, report
        assert report.registers <= 128, report  # four programs a multiprocessor
