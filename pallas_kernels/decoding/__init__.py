"""One token of every row through a model with the momentum delta rule: five kernels a layer."""

from pallas_kernels.decoding.head import logits
from pallas_kernels.decoding.layer import layer
from pallas_kernels.decoding.tiles import Tiles, product_tiles, unsupported
from pallas_kernels.decoding.types import (
    GATES,
    Gates,
    LayerMemory,
    LayerWeights,
    Plan,
    Stream,
)

__all__ = [
    "GATES",
    "Gates",
    "LayerMemory",
    "LayerWeights",
    "Plan",
    "Stream",
    "Tiles",
    "layer",
    "logits",
    "product_tiles",
    "unsupported",
]
