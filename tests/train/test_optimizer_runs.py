"""Runs with other optimizers than the published one: exact resume, the average on request."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from mdn_jax.cli.convert import main as convert
from mdn_jax.errors import RunError
from mdn_jax.saved.model import find_checkpoint, iterate_params, read_params
from tests.train.helpers import assert_identical, tiny_config
from train.config_sections import OptimizerConfig
from train.loop import train
from train.metrics.log import read_metrics
from train.run import Run

MUON = OptimizerConfig(
    name="muon", schedule="wsd", cooldown_steps=2, learning_rate=1e-2, warmup_steps=1, ema_decay=0.5
)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """A run with Muon, a cool-down and an average, and its result."""
    output = tmp_path_factory.mktemp("muon") / "run"
    config = tiny_config(corpus, output, optimizer=MUON, sample_tokens=0)
    return config, train(config)


def test_resuming_is_identical_to_never_stopping(whole, tmp_path):
    config, result = whole
    shutil.copytree(config.directory, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    halved = dataclasses.replace(config, output_dir=str(tmp_path / "run"), resume=True)
    again = train(halved)
    assert_identical(again.state, result.state)
    records = read_metrics(config.directory / "metrics.jsonl")
    rates = [r["learning_rate"] for r in records if "loss" in r]
    np.testing.assert_allclose(rates, [0, 1e-2, 1e-2, 1e-2, 1e-2, 5.5e-3], rtol=1e-5)
    changed = dataclasses.replace(MUON, muon_beta=0.9)
    with pytest.raises(RunError, match=r"optimizer\.muon_beta: the checkpoint has 0\.95"):
        train(dataclasses.replace(halved, optimizer=changed))


def test_the_average_is_measured_read_and_exported(whole, tmp_path):
    config, result = whole
    average = result.state.opt_state.average
    assert not np.array_equal(average["embeddings"], result.state.params["embeddings"])
    records = read_metrics(config.directory / "metrics.jsonl")
    measured = [r["held_out_loss_ema"] for r in records if "held_out_loss" in r]
    assert measured[-1] == Run(config).evaluate(average).mean != result.held_out_loss
    saved = find_checkpoint(config.directory, ema=True)
    for x, y in zip(jax.tree.leaves(read_params(saved)), jax.tree.leaves(average), strict=True):
        np.testing.assert_array_equal(x, y)
    ways = dict(iterate_params(saved))
    np.testing.assert_array_equal(ways["embeddings",], average["embeddings"])
    assert convert(["export", "--ema", str(config.directory), str(tmp_path / "folder")]) == 0
    assert convert(["import", str(tmp_path / "folder"), str(tmp_path / "ours")]) == 0
    again = read_params(find_checkpoint(tmp_path / "ours"))
    np.testing.assert_array_equal(again["embeddings"], average["embeddings"])
    with pytest.raises(RunError, match="ema: expected a checkpoint with a moving average"):
        read_params(find_checkpoint(tmp_path / "ours", ema=True))
