"""A recipe of your own: `python -m train examples/own_recipe.py --data.files ...`."""

import dataclasses

from configs import smoke
from train.config import TrainConfig


def config() -> TrainConfig:
    """The small model of `smoke`, wider and for longer."""
    base = smoke.config()
    model = dataclasses.replace(base.model, hidden_size=192)
    return dataclasses.replace(base, name="own", model=model, steps=1000)


longer = dataclasses.replace(config(), name="longer", steps=5000)
"""Another one: `python -m train examples/own_recipe.py:longer`."""
