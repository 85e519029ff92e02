"""The models of `python -m benchmarks language`."""

from typing import get_args

from benchmarks.equal_models import model_size
from benchmarks.language.models import Ablation, make_models
from benchmarks.style import STYLES
from mdn_jax.models import Mixer


def test_models_of_equal_parameters_hybrids_and_ablations():
    made = make_models(
        get_args(Mixer),
        ("mdn", "gdn"),
        get_args(Ablation),
        vocab_size=300,
        hidden_size=128,
        layers=4,
        heads=2,
    )
    models = {model.name: model for model in made}
    assert len(models) == 16
    assert set(models) <= set(STYLES)
    counts = [model_size(model.config).parameters for model in made]
    assert max(counts) / min(counts) < 1.01
    full = models["mdn"].config
    for name, field, value in (
        ("no-momentum", "use_momentum", False),
        ("no-output-correction", "use_output_correction", False),
        ("no-beta-bound", "bound", "alpha"),
        ("no-alpha-bound", "bound", "beta"),
        ("no-mu-clamp", "min_log_mu", None),
    ):
        other = models[name].config
        assert {n: x for n, x in vars(other).items() if x != getattr(full, n)} == {field: value}
        assert models[name].rate_of == "mdn"
    for mixer in ("mdn", "gdn"):
        hybrid = models[f"{mixer}_hybrid"].config
        assert hybrid.mixers == (mixer, mixer, mixer, "attention")
        assert hybrid.attention.num_heads == 2  # of 64


def test_the_size_of_the_defaults():
    (model,) = make_models(("mdn",), (), (), vocab_size=16_384, hidden_size=512, layers=8, heads=4)
    embeddings = 16_384 * 512
    assert 29e6 < model_size(model.config).parameters - embeddings < 31e6
