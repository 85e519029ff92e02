"""Statistics of the gates of a model's heads against plain numpy."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mdn_jax import MDNConfig, MDNForCausalLM
from mdn_jax.analysis.inspection import LayerSteps, record_steps, report_layer, to_json
from mdn_jax.analysis.inspection_figures import short
from mdn_jax.cli.inspect_checkpoint import choose_rows
from mdn_jax.errors import RunError
from mdn_jax.evaluation.token_losses import Row
from mdn_jax.models import AttentionConfig
from tests.tiny import TINY_MODEL


def build(**changes):
    config = MDNConfig(**TINY_MODEL | {"num_hidden_layers": 2, "num_heads": 2} | changes)
    return MDNForCausalLM(config, implementation="scan", rngs=nnx.Rngs(0))


def random_rows(count, width, documents=True):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 256, (count, width), dtype=np.int32)
    ids = np.sort(rng.integers(0, 3, (count, width), dtype=np.int32), axis=1)
    return [Row(t, t, i if documents else None) for t, i in zip(tokens, ids, strict=True)]


@pytest.mark.slow
def test_the_steps_are_those_of_the_model_whatever_the_batch():
    model, rows = build(attn=AttentionConfig(layers=(0,), num_heads=2)), random_rows(3, 9)
    layers = record_steps(model, rows, batch_size=2)
    assert list(layers) == [1]  # softmax attention has no gates
    steps = layers[1]
    assert steps.beta.shape == (3, 9, 2)
    assert steps.memory_norm.shape == (3, 2)

    @nnx.jit
    def reference(model, tokens, ids):
        h, _ = model.layers[0](jnp.take(model.embeddings[...], tokens, axis=0), ids)
        mixer = model.layers[1].mixer
        return mixer.gates(model.layers[1].mixer_norm(h)), model(tokens, ids)[1]

    for i, row in [(0, rows[0]), (2, rows[2])]:
        tokens, ids = jnp.asarray(row.tokens)[None], jnp.asarray(row.documents)[None]
        gates, cache = reference(model, tokens, ids)
        for name, expected in gates._asdict().items():
            np.testing.assert_allclose(getattr(steps, name)[i], expected[0], rtol=1e-4, atol=1e-6)
        for name, state in zip(("memory", "momentum"), cache[1].state, strict=True):
            norm = np.linalg.norm(np.asarray(state[0]).reshape(2, -1), axis=1)
            np.testing.assert_allclose(getattr(steps, f"{name}_norm")[i], norm, rtol=1e-4)
    np.testing.assert_allclose(steps.erase, np.exp(steps.log_alpha), rtol=1e-6)
    ones = record_steps(build(use_p_times_alpha=False), rows[:1], batch_size=1)[0].erase
    np.testing.assert_array_equal(ones, 1.0)


def test_the_report_is_that_of_numpy():
    rng = np.random.default_rng(1)
    shape = (3, 40, 2)
    log_alpha, log_mu = -rng.exponential(0.3, (2, *shape))
    beta, eta = rng.random(shape), 2 * rng.random(shape)
    beta[..., 1] = 40.0  # far outside of the stable region
    alpha, mu = np.exp(log_alpha), np.exp(log_mu)
    norms = rng.random((2, 3, 2))
    steps = LayerSteps(log_alpha, log_mu, beta, eta, alpha, *norms)
    reports = report_layer(7, steps, window=5)
    for head, report in enumerate(reports):
        assert (report.layer, report.head) == (7, head)
        pick = [x[..., head] for x in (alpha, mu, beta, eta)]
        a, m, b, e = pick
        matrices = np.empty((*a.shape, 2, 2))
        matrices[..., 0, 0], matrices[..., 0, 1] = a - b * e * a, -b * m
        matrices[..., 1, 0], matrices[..., 1, 1] = e * a, m
        values = np.linalg.eigvals(matrices)
        radius = np.abs(values).max(-1)
        complex_ = values[..., 0].imag != 0
        assert report.oscillating == pytest.approx(complex_.mean())
        assert report.unstable == pytest.approx((radius >= 1).mean())
        assert report.load == pytest.approx((b * e * a / (1 + a) / (1 + m)).max())
        levels = (0.05, 0.25, 0.5, 0.75, 0.95)
        assert report.spectral_radius == pytest.approx(np.quantile(radius, levels))
        assert report.mu == pytest.approx(np.quantile(m, levels))
        assert report.memory_half_life == pytest.approx(np.log(0.5) / np.log(a).mean())
        assert report.momentum_half_life == pytest.approx(np.log(0.5) / np.log(m).mean())
        median = np.median(radius)
        expected = np.log(0.5) / np.log(median) if median < 1 else np.inf
        assert report.key_half_life == pytest.approx(expected)
        if complex_.any():
            angle = np.abs(np.angle(values[..., 0]))[complex_]
            assert report.period == pytest.approx(np.median(2 * np.pi / angle))
        growth = 0.0
        for row in matrices:
            for t in range(36):
                growth = max(growth, np.linalg.norm(np.linalg.multi_dot(row[t : t + 5][::-1]), 2))
        assert report.window_growth == pytest.approx(growth)
        assert report.memory_norm == pytest.approx(norms[0][:, head].mean())
    assert reports[0].unstable < reports[1].unstable
    plain = json.loads(json.dumps(to_json(reports[1]), allow_nan=False))
    assert plain["key_half_life"] is None  # inf
    assert plain["alpha"].keys() == {"5%", "25%", "50%", "75%", "95%"}


def test_rows_are_of_one_width_and_spread_over_the_text():
    documents = [list(range(100)), list(range(100, 150))]
    rows = choose_rows(documents, width=10, tokens=70)
    assert [len(row.tokens) for row in rows] == [10] * 7
    assert [int(row.tokens[0]) for row in rows] == [0, 20, 40, 60, 80, 100, 120]
    assert len(choose_rows(documents, width=10, tokens=10**6)) == 14  # the rest is shorter
    (short_row,) = choose_rows([[1, 2, 3]], width=10, tokens=5)
    assert short_row.tokens.tolist() == [1, 2]
    assert len(choose_rows(documents, width=10, tokens=1)) == 1
    with pytest.raises(RunError, match="files: expected text of more than one token"):
        choose_rows([[1]], width=10, tokens=5)


def test_half_lives_in_few_characters():
    texts = [short(x) for x in (0.04, 9.96, 123.4, 12_345.6, np.inf, np.nan)]
    assert texts == ["0.0", "10", "123", "12k", "∞", "nan"]
