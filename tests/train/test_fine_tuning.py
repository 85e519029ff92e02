"""Runs that begin with a model: its parameters, tokens and configuration; frozen parameters."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdn_jax import MDNConfig
from mdn_jax.cli.convert import main as convert
from mdn_jax.errors import RunError
from mdn_jax.saved.model import find_checkpoint, read_params
from tests.text.helpers import write_bpe
from tests.tiny import TINY_MODEL
from tests.train.helpers import assert_identical, random_batch, tiny_config
from train.cli.configuration import parse
from train.cli.train import main
from train.config_sections import DataConfig, OptimizerConfig
from train.freezing import frozen_mask, without_frozen
from train.loop import train
from train.metrics.log import read_metrics
from train.optimizer import make_optimizer, make_schedule
from train.origin import find_origin, origin_params
from train.run import Run
from train.step import init_state, make_train_step

FROZEN = ("embeddings", "layers.*.mlp")


@pytest.fixture(scope="module")
def base(corpus, tmp_path_factory):
    """The directory of a run to begin with."""
    config = tiny_config(corpus, tmp_path_factory.mktemp("base") / "run", sample_tokens=0)
    train(config)
    return config.directory


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Other documents than those of the base."""
    directory = tmp_path_factory.mktemp("new")
    for i in range(40):
        (directory / f"{i}.txt").write_text(f"{i} " + "xyz " * (10 + i % 5))
    return directory


def tuned(base, texts, output, **changes):
    config = tiny_config(texts, output, sample_tokens=0, **changes)
    return dataclasses.replace(config, init_from=str(base))


def params_of(directory, step=None):
    return jax.device_get(read_params(find_checkpoint(directory, step)))


def by_name(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


def test_the_parameters_are_those_of_the_run_and_of_its_export(base, texts, tmp_path):
    assert convert(["export", str(base), str(tmp_path / "folder")]) == 0
    like = Run(tuned(base, texts, tmp_path / "run").resolved()).like_params
    expected = params_of(base)
    for directory in (base, tmp_path / "folder"):
        origin = find_origin(str(directory))
        assert origin.tokenizer == "bytes"
        assert_identical(jax.device_get(origin_params(origin, like)), expected)


def test_fine_tuning_freezes_resumes_and_learns(base, texts, tmp_path):
    optimizer = OptimizerConfig(learning_rate=2e-2, warmup_steps=1, frozen=FROZEN)
    config = tuned(base, texts, tmp_path / "whole", optimizer=optimizer, sequence_length=24)
    result = train(config)
    records = read_metrics(config.directory / "metrics.jsonl")
    losses = [r["held_out_loss"] for r in records if "held_out_loss" in r]
    assert records[0]["step"] == 0
    assert losses[-1] < losses[0] - 0.1

    before, after = by_name(params_of(base)), by_name(params_of(config.directory))
    frozen = {name for name in before if name == "embeddings" or ".mlp." in name}
    assert len(frozen) == 4
    for name, x in before.items():
        assert np.array_equal(x, after[name]) == (name in frozen), name
    moments = by_name(result.state.opt_state)
    assert not [name for name in moments if name.endswith(("embeddings", "mlp.up_proj.kernel"))]
    assert [name for name in moments if name.endswith("q_proj.kernel")]
    steps = [r for r in records if "loss" in r]
    assert all(r["grad_norm/embeddings"] == r["grad_norm/mlp"] == 0 for r in steps)
    assert all(r["grad_norm/projections"] > 0 for r in steps)

    halved = dataclasses.replace(config, output_dir=str(tmp_path / "halved"), resume=True)
    shutil.copytree(config.directory, halved.directory)
    shutil.rmtree(halved.directory / "checkpoints" / "6")
    halved = dataclasses.replace(halved, init_from="gone")  # not read again
    assert_identical(train(halved).state, result.state)


def test_the_norm_is_that_of_the_trained_parameters():
    def loss(params, batch):  # its gradient is 3 and 4, and 12 of what is frozen
        weights = params["a"]["kernel"] * 3 + params["b"]["kernel"] * 4
        return (weights + params["c"]["kernel"] * 12).sum() * (batch["targets"] >= 0).sum()

    params = {name: {"kernel": jnp.full((1, 1), 1e-40)} for name in "abc"}
    before = jax.device_get(params)
    frozen = frozen_mask(params, ["c"])
    config = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, weight_decay=0.5)
    schedule = make_schedule(config, 10)
    optimizer = without_frozen(make_optimizer(config, schedule), frozen)
    step = make_train_step(loss, optimizer, schedule, frozen=frozen, accumulation=2)
    state, metrics = step(init_state(params, optimizer), random_batch(0, 4, 8))
    assert float(metrics.grad_norm) == pytest.approx(5)
    after = jax.device_get(state.params)
    assert np.array_equal(after["c"]["kernel"], before["c"]["kernel"])  # denormal: no sum keeps it
    # clipped to a norm of 1; both moments of the first step cancel
    np.testing.assert_allclose(after["a"]["kernel"], -1e-2, rtol=1e-5)
    assert len(jax.tree.leaves(state.opt_state)) == 2 * 2 + 2


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("layers.7",), r"optimizer\.frozen: expected a pattern .*embeddings.*got 'layers\.7'"),
        (("embed",), r"got 'embed', which matches none"),
        (("*",), r"optimizer\.frozen: expected patterns that leave something to train"),
    ],
)
def test_patterns_that_do_not_fit_are_named(corpus, tmp_path, patterns, message):
    optimizer = OptimizerConfig(warmup_steps=1, frozen=patterns)
    with pytest.raises(RunError, match=message):
        train(tiny_config(corpus, tmp_path / "run", optimizer=optimizer))


def test_a_pattern_is_a_name_or_its_beginning():
    params = {"layers": {0: {"mlp": {"a": 1}}, 1: {"mlp": {"a": 1}, "b": 1}}, "c": 1}
    for patterns, expected in (
        (["layers.0"], [True, False, False, False]),
        (["layers.*.mlp"], [True, True, False, False]),
        (["*.a", "c"], [True, True, False, True]),
        (["layers.1.b"], [False, False, True, False]),
    ):
        mask = frozen_mask(params, patterns)
        assert [
            by_name(mask)[x] for x in ("layers.0.mlp.a", "layers.1.mlp.a", "layers.1.b", "c")
        ] == (expected)


def test_the_command_line_takes_the_model_from_there(base, texts, tmp_path, capsys):
    arguments = ["smoke", "--init-from", str(base), "--data.files", str(texts)]
    assert parse(arguments).model == MDNConfig(**TINY_MODEL)
    output = ["--output-dir", str(tmp_path / "run")]
    assert main([*arguments, *output, "--model.hidden-size", "32"]) == 1
    assert "error: model.hidden_size: expected 16, that of init_from" in capsys.readouterr().err
    bpe = write_bpe(tmp_path / "bpe")
    assert main([*arguments, *output, "--data.tokenizer", str(bpe)]) == 1
    assert "error: data.tokenizer: expected that of init_from" in capsys.readouterr().err
    file = tmp_path / "a.toml"
    file.write_text(f'recipe = "smoke"\ninit_from = "{base}"\nmodel.head_dim = 16')
    assert main([str(file), *output, "--data.files", str(texts)]) == 1
    assert "error: model.head_dim: expected 8, that of init_from" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["smoke", "--init-from", str(texts)])
    assert "init_from: expected the directory of a run, or a folder" in capsys.readouterr().err


def test_a_folder_without_a_tokenizer_asks_for_one(base, texts, tmp_path):
    assert convert(["export", str(base), str(tmp_path / "folder")]) == 0
    config_file = tmp_path / "folder" / "config.json"
    origin = find_origin(str(tmp_path / "folder"))
    assert origin.tokenizer == "bytes"  # by its size
    config_file.write_text(
        config_file.read_text().replace('"vocab_size": 257', '"vocab_size": 300')
    )
    config = dataclasses.replace(
        tuned(tmp_path / "folder", texts, tmp_path / "run"),
        model=MDNConfig(**TINY_MODEL | {"vocab_size": 300}),
        data=DataConfig(files=(str(texts),)),
    )
    with pytest.raises(RunError, match=r"data\.tokenizer: expected the tokenizer of init_from"):
        train(config)
    (tmp_path / "folder" / "tokenizer.json").write_text("{}")
    beside = str(tmp_path / "folder" / "tokenizer.json")
    assert find_origin(str(tmp_path / "folder")).tokenizer == beside
