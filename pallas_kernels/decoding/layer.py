"""One token of every row through one layer: the five kernels in their order."""

from pallas_kernels.decoding.mixer import mixer
from pallas_kernels.decoding.mlp import down, up
from pallas_kernels.decoding.output import output
from pallas_kernels.decoding.projections import projections
from pallas_kernels.decoding.types import LayerMemory, LayerWeights, Leaf, Plan, Stream


def layer(
    stream: Stream,
    weights: LayerWeights,
    memory: LayerMemory,
    slot: Leaf,
    active: Leaf,
    plan: Plan,
) -> tuple[Stream, LayerMemory]:
    """The residual stream and the memory after the layer.

    Args:
      stream: before it.
      weights: of the layer.
      memory: before the token; its arrays are overwritten.
      slot: `[B]` int32, where each row's ring of inputs has the one to be overwritten.
      active: `[B]` int32, zero for rows whose memory stays as it is.
      plan: what is fixed.
    """
    projected = projections(stream, weights.projections, plan)
    mixed, memory = mixer(projected, weights, memory, slot, active, plan)
    stream = output(stream.h, mixed, weights.output, plan)
    if weights.up is not None:
        activations = up(stream, weights.up, plan)
        stream = down(stream.h, activations, weights.down, plan)
    return stream, memory
