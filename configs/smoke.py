"""A model small enough for two CPU cores."""

from mdn_jax import MDNConfig
from mdn_jax.text.tokenizer import VOCAB_SIZE
from train.config import TrainConfig
from train.config_sections import DataConfig, OptimizerConfig


def config() -> TrainConfig:
    """Small model on the standard library's source text: a few minutes on two CPU cores."""
    return TrainConfig(
        name="smoke",
        model=MDNConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=128,
            num_hidden_layers=2,
            num_heads=2,
            head_dim=32,
            expand_v=2.0,
            hidden_ratio=3.0,
        ),
        fit_vocab_size=True,
        data=DataConfig(standard_library=True),
        optimizer=OptimizerConfig(learning_rate=4e-3),
        steps=300,
        batch_size=16,
        sequence_length=256,
        dtype="float32",
        log_every=10,
        eval_every=100,
        eval_rows=128,
        checkpoint_every=100,
        sample_tokens=400,
    )
