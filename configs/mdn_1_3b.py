"""The published 1.3B model."""

from mdn_jax import MDNConfig
from train.config import TrainConfig


def config() -> TrainConfig:
    """Published 1.3B model and recipe: 107 B tokens, 1,048,576 a step."""
    return TrainConfig(
        name="mdn_1_3b",
        model=MDNConfig(
            vocab_size=50_257,
            hidden_size=2048,
            num_hidden_layers=21,
            num_heads=6,
            head_dim=256,
            expand_v=2.0,
            min_log_mu=-1.0,
            tau_factor=8.0,
        ),
        fit_vocab_size=True,
        steps=102_400,
        batch_size=256,
        sequence_length=4096,
        accumulation=64,
        remat="states",
        checkpoint_every=2048,
    )
