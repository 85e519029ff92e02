"""A run small enough to compile and train in seconds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mdn_jax import MDNConfig
from mdn_jax.text.tokenizer import ByteTokenizer
from tests.tiny import TINY_MODEL
from train.config import TrainConfig
from train.config_sections import DataConfig, OptimizerConfig
from train.data import Batch
from train.data.documents import Documents, tokenize

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
