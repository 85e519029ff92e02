from pathlib import Path

import pytest
from flax import nnx

from mdn_jax import MDNConfig, MDNForCausalLM
from mdn_jax.saved.model import save_model
from tests.tiny import TINY_MODEL
from train.step import split_model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of bytes with clear choices, in a directory as mdn-convert writes it."""
    config = MDNConfig(**TINY_MODEL | {"initializer_range": 0.5})
    directory = tmp_path_factory.mktemp("checkpoint") / "model"
    save_model(directory, config, split_model(MDNForCausalLM(config, rngs=nnx.Rngs(0)))[1])
    return directory
