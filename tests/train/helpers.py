"""A model and a run small enough to compile and train in seconds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mdn_jax import MDNConfig, MDNForCausalLM
from mdn_jax.text.tokenizer import ByteTokenizer
from train.config import TrainConfig
from train.config_sections import DataConfig, OptimizerConfig
from train.data import Batch
from train.data.documents import Documents, tokenize

TINY_MODEL = {
    "vocab_size": 257,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_heads": 1,
    "head_dim": 8,
    "expand_v": 1.0,
    "intermediate_size": 16,
}
TINY_RUN = {
    "steps": 6,
    "batch_size": 4,
    "sequence_length": 16,
    "dtype": "float32",
    "implementation": "scan",
    "log_every": 1,
    "eval_every": 3,
    "eval_rows": 8,
    "checkpoint_every": 3,
    "sample_tokens": 8,
}


def tiny_config(corpus: Path, output: Path, **changes: Any) -> TrainConfig:
    return TrainConfig(
        name="tiny",
        output_dir=str(output),
        model=MDNConfig(**TINY_MODEL),
        data=DataConfig(files=(str(corpus / "*.txt"),)),
        optimizer=changes.pop("optimizer", OptimizerConfig(learning_rate=1e-2, warmup_steps=1)),
        **TINY_RUN | changes,
    )


def chain_model(following: Sequence[int]) -> MDNForCausalLM:
    """A model that knows one thing: after token `i` comes `following[i]`."""
    size = len(following)
    config = MDNConfig(**TINY_MODEL | {"vocab_size": size})
    model = MDNForCausalLM(config, implementation="scan", rngs=nnx.Rngs(0))
    model.layers[0].mixer.o_proj.kernel[...] *= 0
    model.layers[0].mlp.down_proj.kernel[...] *= 0
    model.embeddings[...] = jnp.eye(size, config.hidden_size)
    head = jnp.zeros((config.hidden_size, size))
    model.lm_head[...] = head.at[jnp.arange(size), jnp.asarray(following)].set(5.0)
    return model


def break_model(model: MDNForCausalLM) -> MDNForCausalLM:
    """A copy with logits of nan."""
    broken = nnx.clone(model)
    broken.norm.scale[...] = broken.norm.scale[...] * jnp.nan
    return broken


def byte_documents(texts: Sequence[bytes]) -> Documents:
    return tokenize(texts, ByteTokenizer())


def random_batch(seed: int, rows: int, length: int, *, ignored: float = 0.3) -> Batch:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 256, (rows, length), dtype=np.int32)
    targets = rng.integers(0, 256, (rows, length), dtype=np.int32)
    return Batch(
        tokens=tokens,
        segment_ids=np.sort(rng.integers(0, 3, (rows, length), dtype=np.int32), axis=1),
        targets=np.where(rng.random((rows, length)) < ignored, np.int32(-100), targets),
    )


def assert_identical(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    expected_leaves = jax.tree.leaves(expected)
    for (path, a), b in zip(
        jax.tree_util.tree_flatten_with_path(actual)[0], expected_leaves, strict=True
    ):
        assert a.dtype == b.dtype, path
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(path))
