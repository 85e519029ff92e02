"""Named configurations of `python -m train`: files with a function `config`, and `baselines`."""

import inspect
from collections.abc import Callable

from configs import baselines, hybrid_400m_3to1, hybrid_400m_7to1, mdn_1_3b, mdn_400m, smoke
from train.config import TrainConfig

CONFIGS: dict[str, Callable[[], TrainConfig]] = {
    "smoke": smoke.config,
    "mdn_400m": mdn_400m.config,
    "mdn_1_3b": mdn_1_3b.config,
    "hybrid_400m_3to1": hybrid_400m_3to1.config,
    "hybrid_400m_7to1": hybrid_400m_7to1.config,
    **baselines.BASELINES,
}


def describe(name: str) -> str:
    """The first line on a configuration."""
    return (inspect.getdoc(CONFIGS[name]) or "").partition("\n")[0]
