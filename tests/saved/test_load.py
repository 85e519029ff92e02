"""`mdn_jax.load` takes every kind of directory that holds a model."""

import jax.numpy as jnp
import pytest
from flax import nnx

import mdn_jax
from mdn_jax.errors import RunError
from mdn_jax.interop import write_folder
from mdn_jax.saved.model import find_checkpoint, iterate_params, save_model
from tests.layers.helpers import TINY, call

TOKENS = jnp.asarray([[1, 2, 3, 4, 5]])


@pytest.fixture(scope="module")
def model():
    return mdn_jax.MDNForCausalLM(TINY, implementation="scan", rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    save_model(directory, TINY, nnx.to_pure_dict(nnx.state(model)))
    return directory


def test_a_checkpoint_and_a_folder_give_the_same_model(model, run, tmp_path):
    saved = find_checkpoint(run)
    write_folder(tmp_path, saved.model, iterate_params(saved))
    expected = call(model, TOKENS)
    for directory in (run, str(tmp_path)):
        assert (
            call(mdn_jax.load(directory, implementation="scan"), TOKENS)[0] == expected[0]
        ).all()
    wide = mdn_jax.load(tmp_path, dtype="bfloat16")
    assert (mdn_jax.load(tmp_path).dtype, wide.dtype) == ("float32", "bfloat16")
    assert mdn_jax.load(run, step=0, dtype="bfloat16").dtype == jnp.bfloat16
    with pytest.raises(RunError, match=r"^step: expected one of \[0\] .*, got 7"):
        mdn_jax.load(run, step=7)
    with pytest.raises(ValueError, match=r"^step: expected None for a folder of one model, got 0"):
        mdn_jax.load(tmp_path, step=0)


def test_another_directory_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^path: expected the output directory of a run"):
        mdn_jax.load(tmp_path)
