"""The published hybrid 400M model, seven MDN layers to one of softmax attention."""

import dataclasses

from configs import hybrid_400m_3to1
from mdn_jax.models import AttentionConfig
from train.config import TrainConfig


def config() -> TrainConfig:
    """Published hybrid 400M model, softmax attention in every eighth layer; the 400M recipe."""
    base = hybrid_400m_3to1.config()
    attention = AttentionConfig(layers=tuple(range(7, 24, 8)), num_heads=8)
    return dataclasses.replace(
        base,
        name="hybrid_400m_7to1",
        model=dataclasses.replace(base.model, attn=attention),
    )
