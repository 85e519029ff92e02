"""The published 400M model."""

from mdn_jax import MDNConfig
from train.config import TrainConfig


def config() -> TrainConfig:
    """Published 400M model and recipe: 16.1 B tokens, 524,288 a step."""
    return TrainConfig(
        name="mdn_400m",
        model=MDNConfig(
            vocab_size=50_257,
            hidden_size=1024,
            num_hidden_layers=21,
            num_heads=6,
            head_dim=128,
            expand_v=2.0,
            min_log_mu=-2.0,
            tau_factor=1.0,
        ),
        fit_vocab_size=True,
        steps=30_720,
        batch_size=128,
        sequence_length=4096,
        accumulation=16,
        remat="none",
        checkpoint_every=2048,
    )
