"""The published hybrid 400M model, three MDN layers to one of softmax attention."""

from mdn_jax import MDNConfig
from mdn_jax.models import AttentionConfig
from train.config import TrainConfig


def config() -> TrainConfig:
    """Published hybrid 400M model, softmax attention in every fourth layer; the 400M recipe."""
    return TrainConfig(
        name="hybrid_400m_3to1",
        model=MDNConfig(
            vocab_size=50_257,
            hidden_size=1024,
            num_hidden_layers=24,
            num_heads=8,
            head_dim=128,
            expand_v=1.0,
            min_log_mu=-2.0,
            tau_factor=1.0,
            attn=AttentionConfig(layers=tuple(range(3, 24, 4)), num_heads=8),
        ),
        fit_vocab_size=True,
        steps=30_720,
        batch_size=128,
        sequence_length=4096,
        accumulation=16,
        remat="states",
        checkpoint_every=2048,
    )
